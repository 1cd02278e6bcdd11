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

from actpress.codec import Codec, Noise


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
    if not isinstance(method, Method):
        raise TypeError(f"method must be an actpress.swap.Method such as actpress.methods.Division(), got {method!r}")
    modules = dict(model.named_modules())
    plan = {name: (module, method.replacement(name, module)) for name, module in modules.items()}
    report = Report()
    noise = Noise(torch.initial_seed())
    for name, (module, replacement) in plan.items():
        old = _type_name(type(module))
        if replacement is None:
            if next(module.children(), None) is None:
                report.untouched[name] = old
            continue
        module.__class__ = replacement.layer
        if replacement.codec is not None:
            module.codec, module.noise = replacement.codec, noise
        report.replaced[name] = (old, _type_name(replacement.layer))
    if method.changes_model and not report.replaced:
        found = ", ".join(sorted(set(report.untouched.values())))
        raise ValueError(f"{method} matches no module of {type(model).__name__}; its layers are: {found}")
    return report


def noise_state(model: nn.Module) -> dict[str, int]:
    """Position of the model's rounding-noise stream, to be stored with a checkpoint; empty for a stock model."""
    noise = _noise(model)
    return {} if noise is None else {"seed": noise.seed, "draws": noise.draws}


def load_noise_state(model: nn.Module, state: Mapping[str, int]) -> None:
    """Put the model's rounding-noise stream where `noise_state` found it."""
    noise = _noise(model)
    if (noise is None) != (not state):
        raise ValueError(
            f"noise state {dict(state)} does not fit a model {'without' if noise is None else 'with'} stochastic codecs"
        )
    if noise is not None:
        noise.seed, noise.draws = state["seed"], state["draws"]


def _noise(model: nn.Module) -> Noise | None:
    return next((module.noise for module in model.modules() if hasattr(module, "noise")), None)


def _type_name(cls: type) -> str:
    library = cls.__module__.split(".")[0]
    return f"{ {'torch': 'nn'}.get(library, library) }.{cls.__name__}".replace(" ", "")
