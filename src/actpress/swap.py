"""Applying a method to a model, in place.

A replaced module stays the object it was and only changes class (nn.Conv2d -> actpress.layers.Conv2d), so parameters,
buffers, hooks, state_dict keys and every reference to the module survive. Only exact types are replaced: a subclass may have
a forward of its own.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from actpress import functional
from actpress.applied import Applied
from actpress.codec import Context, Dense


class Replacement(NamedTuple):
    """The layer class that takes a module's place and, if it keeps more than masks, what decides how: a Codec for a layer that keeps its
    input, an activation's own kind of codec for one that does not."""

    layer: type[nn.Module]
    codec: Any = None
    start_epoch: int = 0  # a Codec's first epoch, see set_epoch; until then the layer keeps its input dense


class Method:
    """Base of all methods: says for each module what replaces it. Most only map types, in `rules`."""

    changes_model = True  # False: matching nothing is not an error

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        """Stock layer type -> its replacement."""
        raise NotImplementedError

    def functions(self) -> Mapping[str, Callable]:
        """Name of a function that forward methods call, such as relu -> its replacement, with the same arguments."""
        return {}

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        """What replaces `module`, called `name` in the model; None leaves it as it is. Override to go by name."""
        return self.rules().get(type(module))

    def attach(self, model: nn.Module) -> None:
        """Called once `model` has its new layers: to leave a hook on it, for instance."""


@dataclass(frozen=True)
class Composition(Method):
    """Several methods as one: for each module the first with a replacement wins."""

    methods: tuple[Method, ...]

    @property
    def changes_model(self) -> bool:
        return any(method.changes_model for method in self.methods)

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        return {layer: ours for method in reversed(self.methods) for layer, ours in method.rules().items()}

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        found = (method.replacement(name, module) for method in self.methods)
        return next((replacement for replacement in found if replacement is not None), None)

    def functions(self) -> Mapping[str, Callable]:
        return {name: ours for method in reversed(self.methods) for name, ours in method.functions().items()}

    def attach(self, model: nn.Module) -> None:
        for method in self.methods:
            method.attach(model)


def compose(*methods: Method) -> Composition:
    """Several methods as one: for each module the first that has a rule for it wins. Raises TypeError for what is no Method."""
    for method in methods:
        _check_method(method)
    return Composition(methods)


def label(method: Method, also: Collection[str] = ()) -> str:
    """A method with the options that differ from their defaults, and those named in `also`: Division(bits=4)."""
    if isinstance(method, Composition):
        return " + ".join(label(part, also) for part in method.methods)
    options = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    shown = [
        f"{option.name}={getattr(method, option.name)!r}"
        for option in options
        if option.name in also or getattr(method, option.name) != _default(option)
    ]
    return type(method).__name__ + (f"({', '.join(shown)})" if shown else "")


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def _check_method(method: object) -> None:
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be an actpress.swap.Method, one of those in actpress.methods for instance, got {method!r}"
        )


@dataclass(frozen=True)
class Report:
    """What `apply` did. Names are those of model.named_modules(); a function called in a module's forward is "<module>.relu()"."""

    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (old type, new type)
    untouched: dict[str, str] = field(
        default_factory=dict
    )  # name of a leaf module or function -> why it stays as it is

    def __str__(self) -> str:
        lines = [f"{count:4d}  {old} -> {new}" for (old, new), count in sorted(Counter(self.replaced.values()).items())]
        lines += [f"{count:4d}  {why}" for why, count in sorted(Counter(self.untouched.values()).items())]
        return "\n".join(lines)


def apply(model: nn.Module, method: Method) -> Report:
    """Replace, in place, every module of `model` that `method` has a rule for, and the functions its forward methods call.

    Parameters, buffers, state_dict keys and forward outputs stay the same. Raises TypeError if `method` is not a Method, ValueError if
    it matches nothing in the model (applying a method twice matches nothing the second time).
    """
    _check_method(method)
    plan = [(name, module, method.replacement(name, module)) for name, module in model.named_modules()]
    report, context, functions = Report(), Context(torch.initial_seed()), method.functions()
    for name, module, replacement in plan:
        stock = type(module)
        old = type_name(stock)
        if replacement is not None:
            module.__class__ = replacement.layer
            module._actpress = Applied(name, label(method), stock)
            if replacement.codec is not None:
                module.codec, module.context = replacement.codec, context
            if replacement.start_epoch:
                module.late_codec = (replacement.start_epoch, replacement.codec)
            report.replaced[name] = (old, type_name(replacement.layer))
            continue
        if next(module.children(), None) is None:
            report.untouched[name] = _why_untouched(module, method)
        called = functional.calls(module)
        ours = {function: functions[function] for function in called if function in functions}
        if ours:
            functional.intercept(module, ours)
            module._actpress = Applied(name, label(method), stock)
        for function in sorted(called):
            where = f"{name}.{function}()".lstrip(".")
            if function in ours:
                report.replaced[where] = (f"{function}()", f"actpress.{function}()")
            else:
                report.untouched[where] = f"{function}() untouched: no rule"
    if method.changes_model and not report.replaced:
        raise ValueError(f"{method} matches nothing in {type(model).__name__}; it has: {_listed(plan)}")
    set_epoch(model, 0)
    method.attach(model)
    return report


def _why_untouched(module: nn.Module, method: Method) -> str:
    cls = type(module)
    rules = method.rules()
    base = next((base for base in cls.__mro__ if base in rules), None)
    why = "no rule" if base is None else f"a subclass of {type_name(base)}, whose forward may differ"
    why = "the method leaves it dense by its name" if base is cls else why
    return f"{type_name(cls)} untouched: {why}"


def _listed(plan: list[tuple[str, nn.Module, Replacement | None]]) -> str:
    return ", ".join(
        sorted({type_name(type(module)) for _, module, _ in plan if next(module.children(), None) is None})
    )


def state(model: nn.Module) -> dict[str, int]:
    """What the model's method has to remember beside the weights (position of its noise stream, epoch), to be stored with a
    checkpoint; empty for a stock model."""
    return {key: value for context in _contexts(model) for key, value in vars(context).items()}


def load_state(model: nn.Module, state: Mapping[str, int]) -> None:
    """Put the model's method where `state` found it. Raises ValueError if one has a state and the other has none."""
    contexts = _contexts(model)
    if bool(contexts) != bool(state):
        raise ValueError(f"method state {dict(state)} does not fit a model {'with' if contexts else 'without'} codecs")
    for context in contexts:
        vars(context).update(state)
        set_epoch(model, context.epoch)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell the model's method which epoch begins, counted from 0. A training loop calls it; only methods that start late care:
    their layers keep inputs dense until then. A compiled model is compiled again once, when they start."""
    for context in _contexts(model):
        context.epoch = epoch
    for module in model.modules():
        if hasattr(module, "late_codec"):
            first, codec = module.late_codec
            module.codec = codec if epoch >= first else Dense()


def _contexts(model: nn.Module) -> list[Context]:
    """The context of the applied method: none for a stock model, else one, shared by all layers."""
    return list(
        {id(m.context): m.context for m in model.modules() if isinstance(getattr(m, "context", None), Context)}.values()
    )


def type_name(cls: type) -> str:
    """A type with the library it is from: nn.Conv2d, actpress.Conv2d, timm.LayerNorm."""
    library = cls.__module__.split(".")[0]
    return f"{ {'torch': 'nn'}.get(library, library) }.{cls.__name__}".replace(" ", "")
