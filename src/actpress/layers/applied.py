"""What `apply` notes on each module that it changes, so that errors can name the layer and `restore` finds the way back."""

from typing import Any, NamedTuple

from torch import nn

ATTRIBUTES = ("_actpress", "codec", "context", "_around", "library")  # that `apply` gives to modules


class Applied(NamedTuple):
    """A changed module carries it as `module._actpress`. It survives pickle and deepcopy with the module."""

    name: str  # in the model that apply was called with, as in model.named_modules(); "" is the model itself
    method: str  # the method with the options that differ from their defaults: "Division(bits=4)"
    stock: type[nn.Module]  # the module's class before
    now: str  # the name of its class since, see class_name
    swap: Any = None  # the edit that changed its layer, see actpress.swap.Swap
    compiled: bool = False  # was it compiled in place?


def of(module: nn.Module) -> Applied | None:
    """The note of `apply`; None on a module that it left as it was."""
    return vars(module).get("_actpress")


def attributes(module: nn.Module) -> dict[str, Any]:
    """Those of ATTRIBUTES that a module has."""
    return {name: vars(module)[name] for name in ATTRIBUTES if name in vars(module)}


def class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def type_name(cls: type) -> str:
    """A type with the library it is from: nn.Conv2d, actpress.Conv2d, timm.LayerNorm."""
    library = cls.__module__.split(".")[0]
    return f"{ {'torch': 'nn'}.get(library, library) }.{cls.__name__}".replace(" ", "")
