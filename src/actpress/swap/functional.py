"""Functions that a network calls by themselves (F.relu in a forward method) instead of as modules.

A method can replace them too: the module whose forward calls one runs inside `Functions`, a mode that hands the call to the method's
function. Which functions a module calls is read from its source (swap/calls.py); what no rule covers ends up in the report.

One name has several functions in PyTorch, some with other arguments: F.batch_norm and torch.batch_norm, F.dropout and torch.dropout. A
method's function has the arguments of torch.nn.functional's, or of torch's where there is none there; calls of the others are translated.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from actpress.measure.saved import CHECKPOINT, active_hooks, hook_name
from actpress.swap.calls import variants


def _torch_batch_norm(
    ours, input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=True
):
    return ours(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _torch_layer_norm(ours, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    return ours(input, normalized_shape, weight, bias, eps)


def _torch_group_norm(ours, input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    return ours(input, num_groups, weight, bias, eps)


def _torch_dropout(ours, input, p, train):
    return ours(input, p, train)


def _torch_max_pool(ours, input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False):
    return ours(input, kernel_size, stride or None, padding, dilation, ceil_mode)


def _torch_softmax(ours, input, dim, dtype=None):
    return ours(input, dim, dtype=dtype)


TRANSLATED: dict[Callable, Callable] = {  # PyTorch's function with arguments of its own -> calls ours(F's arguments)
    torch.batch_norm: _torch_batch_norm,
    torch.layer_norm: _torch_layer_norm,
    torch.group_norm: _torch_group_norm,
    torch.max_pool1d: _torch_max_pool,
    torch.max_pool2d: _torch_max_pool,
    torch.max_pool3d: _torch_max_pool,
    **{getattr(torch, name): _torch_dropout for name in ("dropout", "alpha_dropout")},
    **{getattr(place, name): _torch_softmax for place in (torch, torch.Tensor) for name in ("softmax", "log_softmax")},
}
WITHOUT_EQUAL = (
    torch.instance_norm,
    torch.rrelu,
)  # their arguments say less than F's, or other things: they stay stock


class Replacing(TorchFunctionMode):
    """Hands calls of the functions in `table` to what the table says.

    Inside a non-reentrant checkpoint that begins under this mode the stock functions run. Such a checkpoint recomputes its part outside
    of the mode, and both times the functions must save the same tensors. A checkpoint around the mode enters it again.
    """

    def __init__(self, table: Mapping[Callable, Callable]):
        super().__init__()
        self.table = table
        self.hooks = None if torch.compiler.is_compiling() else active_hooks()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "out" in kwargs:  # autograd does not record such a call
            return func(*args, **kwargs)
        ours = self.table.get(func)
        if ours is None or self._in_checkpoint():
            return func(*args, **kwargs)
        return ours(*args, **kwargs)

    def _in_checkpoint(self) -> bool:
        hooks = None if torch.compiler.is_compiling() else active_hooks()
        return hooks is not None and hooks != self.hooks and hook_name(hooks[0]) == CHECKPOINT


def table_of(rules: Mapping[str, Callable]) -> dict[Callable, Callable]:
    """Name -> ours, as PyTorch's function -> what to call with its arguments."""
    return {
        function: functools.partial(TRANSLATED[function], ours) if function in TRANSLATED else ours
        for name, ours in rules.items()
        for function in variants(name)
        if function not in WITHOUT_EQUAL
    }


@dataclass(frozen=True, eq=False)
class Functions:
    """What an `Around` edit calls to replace functions: those named in `rules`, called in the module's forward or below it, are ours."""

    rules: Mapping[
        str, Callable
    ]  # name of a function, such as relu -> ours, with the arguments of torch.nn.functional's

    def __call__(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        with Replacing(table_of(self.rules)):
            return forward(*args, **kwargs)


def bound(function: Callable, **known: Any) -> Callable:
    """The function with those of the `known` arguments that it takes."""
    takes = inspect.signature(function).parameters
    given = {name: value for name, value in known.items() if name in takes}
    return functools.partial(function, **given) if given else function
