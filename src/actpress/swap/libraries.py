"""Layers of other libraries, and of users, that are no stock type but compute what one does.

A subclass of a stock layer (timm's BatchNormAct2d, LayerNorm2d, weight-standardised and same-padded convolutions, torchvision's
LayerNorm2d) keeps its own forward; in it, the call of the stock layer's function (F.batch_norm) is handed to ours. So its output is its
own, to the bit, whatever else it does. RMS norms that are written out in operations are recognised by their formula, which is tried, not by
their name alone.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from actpress import layers
from actpress.layers.rms_norm import rms_formula
from actpress.swap.functional import Functions

# qualified name -> the stock type that it stands in for, and the function that its forward calls
STANDS_FOR: dict[str, tuple[type[nn.Module], str, Callable]] = {
    "transformers.pytorch_utils.Conv1D": (nn.Linear, "addmm", layers.addmm),
    **{
        f"timm.layers.{file}.{name}": (nn.RMSNorm, "rms_norm", layers.rms_norm)
        for file, names in {"norm": ("RmsNorm",), "norm_act": ("RmsNormAct",)}.items()
        for name in names
    },
}
NEVER_CALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)  # nn.MultiheadAttention reads its weights


class Calling(layers.Extended):
    """A layer of a library. Its own forward runs; the call of one function in it is handed to ours."""

    library: tuple[str, Callable]  # name of the function, and ours

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, ours = self.library
        ours = partial(ours, codec=self.codec, context=self.context, origin=self.origin)
        return Functions({name: ours})(self.stock, *args, **kwargs)


def _is_called(stock: type[nn.Module]) -> bool:
    """Whether subclasses of a stock layer call its function (F.conv2d) in their own forward."""
    return stock in layers.LAYERS and layers.LAYERS[stock].kind in ("maps", "tokens", "token norms")


def stand_in(
    module: nn.Module, rules: Mapping[type[nn.Module], Any]
) -> tuple[type[nn.Module], type, tuple | None] | None:
    """(the stock type whose rule holds for this module, the mixin that takes its place, the mixin's `library`); None if there is none."""
    cls = type(module)
    if isinstance(module, (layers.Layer, LazyModuleMixin, *NEVER_CALLED)):
        return None
    named = STANDS_FOR.get(f"{cls.__module__}.{cls.__qualname__}")
    if named is not None and named[0] in rules:
        return named[0], Calling, named[1:]
    base = next((base for base in cls.__mro__[1:] if base in rules and _is_called(base)), None)
    if base is not None:
        return base, Calling, next(iter(layers.functions_of(layers.LAYERS[base]).items()))
    if nn.RMSNorm in rules and cls.__name__.endswith(("RMSNorm", "T5LayerNorm")):
        formula = rms_formula(module)
        if formula is not None:
            return nn.RMSNorm, layers.LibraryRMSNorm, formula
    return None
