"""Running something around a module's forward: what an `Around` edit does."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from actpress.layers import Mixed, extend

Call = Callable[..., Any]  # call(forward, *args, **kwargs) -> output


class Wrapped(Mixed):
    """Mixed in front of a module's class: its forward runs inside the calls of `_around`. Without gradients the forward runs alone."""

    _around: tuple[Call, ...]  # the innermost first

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward
        if torch.is_grad_enabled():
            for call in self._around:
                forward = partial(call, forward)
        return forward(*args, **kwargs)


def wrap(module: nn.Module, calls: tuple[Call, ...]) -> None:
    """From now on the module's forward runs inside `calls`, the innermost first; they take the place of earlier ones."""
    if not isinstance(module, Wrapped):
        extend(module, Wrapped)
    module._around = calls


def class_below(module: nn.Module) -> type[nn.Module]:
    """The module's class without what was mixed in to wrap it."""
    return type(module).mixed[1] if isinstance(module, Wrapped) else type(module)


def module_of(forward: Callable[..., Any]) -> nn.Module:
    """The module whose forward a Call was given."""
    while isinstance(forward, partial):
        forward = forward.args[0]
    return forward.__self__
