"""What a model's methods have to remember beside the weights: positions in noise streams, and the epoch."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from actpress.codec import DENSE, Context
from actpress.layers import applied
from actpress.swap.edits import Swap


def state(model: nn.Module) -> dict[str, Any]:
    """What the model's methods have to remember beside the weights, to be stored with a checkpoint: for each call of `apply`, in the
    order of its first layer, the position of its noise stream and the epoch. Plain numbers, lists and dicts; empty for a stock model.
    Waits for the device where CUDA graphs draw noise."""
    contexts = _contexts(model)
    return {"contexts": [context.state() for context in contexts]} if contexts else {}


def load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put the model's methods where `state` found them. Raises ValueError if the model has more or fewer contexts than the state.

    A state of an older version, {seed, draws, epoch}, is that of a single context; where the model has several, all get it, and a
    UserWarning says that resuming is not bit for bit.
    """
    contexts = _contexts(model)
    old = "draws" in state
    states = [state] * max(len(contexts), 1) if old else state.get("contexts", [])
    if len(contexts) != len(states):
        raise ValueError(
            f"method state {dict(state)} does not fit a model with {len(contexts)} applied methods that keep codes; "
            "allowed: the state of a model on which apply was called in the same way"
        )
    if old and len(contexts) > 1:
        warnings.warn(
            f"the method state holds 1 of {len(contexts)} positions in noise streams: resuming is not bit for bit",
            stacklevel=2,
        )
    for context, values in zip(contexts, states, strict=True):
        context.load_state(values)
    _set_late_codecs(model)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell the model's method which epoch begins, counted from 0. A training loop calls it; only methods that start late care:
    their layers keep inputs dense until then. A compiled model is compiled again once, when they start."""
    for context in _contexts(model):
        context.epoch = epoch
    _set_late_codecs(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether a method has compiled the model, or a part of it, in place. A copy of such a model is not compiled."""
    noted = ((module, applied.of(module)) for module in model.modules())
    return any(note and note.compiled and module._compiled_call_impl is not None for module, note in noted)


def start_epoch(model: nn.Module) -> int:
    """The first epoch in which every layer of the model uses its codec."""
    return max((edit.start_epoch for _, edit in _late(model)), default=0)


def has_started(model: nn.Module) -> bool:
    """Whether every layer of the model uses its codec."""
    return all(module.context.epoch >= edit.start_epoch for module, edit in _late(model))


def _late(model: nn.Module) -> list[tuple[nn.Module, Swap]]:
    """The modules whose codec starts late."""
    noted = [(module, note.swap) for module in model.modules() if (note := applied.of(module)) is not None]
    return [(module, edit) for module, edit in noted if edit is not None and edit.start_epoch]


def _set_late_codecs(model: nn.Module) -> None:
    for module, edit in _late(model):
        module.codec = edit.codec if module.context.epoch >= edit.start_epoch else DENSE


def _contexts(model: nn.Module) -> list[Context]:
    """The context of each call of `apply`, in the order of the first layer that has it: none for a stock model."""
    return list(
        {id(m.context): m.context for m in model.modules() if isinstance(getattr(m, "context", None), Context)}.values()
    )
