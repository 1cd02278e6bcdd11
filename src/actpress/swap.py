"""Applying a method to a model, in place.

A replaced module stays the object it was and only changes class (nn.Conv2d -> actpress.layers.Conv2d), so parameters,
buffers, hooks, state_dict keys and every reference to the module survive. Only exact types are replaced: a subclass may have
a forward of its own.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from actpress.codec import Codec, Context


class Replacement(NamedTuple):
    """The layer class that takes a module's place and, if it keeps an input, the codec for it."""

    layer: type[nn.Module]
    codec: Codec | None = None


class Method:
    """Base of all methods: says for each module what replaces it. Most only map types, in `rules`."""

    changes_model = True  # False: matching nothing is not an error

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        """Stock layer type -> its replacement."""
        raise NotImplementedError

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        """What replaces `module`, called `name` in the model; None leaves it as it is. Override to go by name."""
        return self.rules().get(type(module))


@dataclass(frozen=True)
class Composition(Method):
    """Several methods as one: for each module the first with a replacement wins."""

    methods: tuple[Method, ...]

    @property
    def changes_model(self) -> bool:
        return any(method.changes_model for method in self.methods)

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        found = (method.replacement(name, module) for method in self.methods)
        return next((replacement for replacement in found if replacement is not None), None)


def compose(*methods: Method) -> Composition:
    """Several methods as one: for each module the first that has a rule for it wins. Raises TypeError for what is no Method."""
    for method in methods:
        _check_method(method)
    return Composition(methods)


def _check_method(method: object) -> None:
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be an actpress.swap.Method, one of those in actpress.methods for instance, got {method!r}"
        )


@dataclass(frozen=True)
class Report:
    """What `apply` did. Names are those of model.named_modules()."""

    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (old type, new type)
    untouched: dict[str, str] = field(default_factory=dict)  # name of a leaf module -> its type

    def __str__(self) -> str:
        lines = [f"{count:4d}  {old} -> {new}" for (old, new), count in sorted(Counter(self.replaced.values()).items())]
        lines += [f"{count:4d}  {kind} untouched" for kind, count in sorted(Counter(self.untouched.values()).items())]
        return "\n".join(lines)


def apply(model: nn.Module, method: Method) -> Report:
    """Replace, in place, every module of `model` that `method` has a rule for.

    Parameters, buffers, state_dict keys and forward outputs stay the same. Raises TypeError if `method` is not a Method, ValueError if
    it matches no module of the model (applying a method twice matches nothing the second time).
    """
    _check_method(method)
    modules = dict(model.named_modules())
    plan = {name: (module, method.replacement(name, module)) for name, module in modules.items()}
    report = Report()
    context = Context(torch.initial_seed())
    for name, (module, replacement) in plan.items():
        old = _type_name(type(module))
        if replacement is None:
            if next(module.children(), None) is None:
                report.untouched[name] = old
            continue
        module.__class__ = replacement.layer
        if replacement.codec is not None:
            module.codec, module.context = replacement.codec, context
        report.replaced[name] = (old, _type_name(replacement.layer))
    if method.changes_model and not report.replaced:
        found = ", ".join(sorted(set(report.untouched.values())))
        raise ValueError(f"{method} matches no module of {type(model).__name__}; its layers are: {found}")
    return report


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


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell the model's method which epoch begins, counted from 0. A training loop calls it; only methods that start late care."""
    for context in _contexts(model):
        context.epoch = epoch


def _contexts(model: nn.Module) -> list[Context]:
    """The context of the applied method: none for a stock model, else one, shared by all layers."""
    return list(
        {id(m.context): m.context for m in model.modules() if isinstance(getattr(m, "context", None), Context)}.values()
    )


def _type_name(cls: type) -> str:
    library = cls.__module__.split(".")[0]
    return f"{ {'torch': 'nn'}.get(library, library) }.{cls.__name__}".replace(" ", "")
