"""Functions that a network calls by themselves (F.relu in a forward method) instead of as modules.

A method can replace them too: the module whose forward calls one runs it under a mode that hands the call to the method's function. Which
functions a module calls is read from its source (actpress.swap.calls); what no rule covers ends up in the report.

One name has several functions in PyTorch, some with other arguments: F.batch_norm and torch.batch_norm, F.dropout and torch.dropout. A
method's function has the arguments of torch.nn.functional's, or of torch's where there is none there; calls of the others are translated.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from actpress.layers import applied
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


class Intercepted:
    """Mixed in front of a module's class: its forward runs under Replacing."""

    function_rules: Mapping[str, Callable]
    stock_type: type[nn.Module]

    def __reduce_ex__(self, protocol: int) -> tuple:  # the class is made at run time, pickle could not find it
        made, args, *state = super().__reduce_ex__(protocol)  # as the stock class says
        args = tuple(self.stock_type if arg is type(self) else arg for arg in args)
        return _rebuild, (made, args, applied.attributes(self)), *state


def intercept(module: nn.Module, rules: Mapping[str, Callable]) -> None:
    """From now on the functions named in `rules`, called in the module's forward or below it, are what the rules say.

    A second call adds rules; of two for one name the first stays.
    """
    stock = stock_class(module)

    @functools.wraps(stock.forward)  # libraries read its signature
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # nothing is kept
            return stock.forward(self, *args, **kwargs)
        with Replacing(table_of(self.function_rules)):
            return stock.forward(self, *args, **kwargs)

    names = {
        "__module__": stock.__module__,
        "__qualname__": stock.__qualname__,
        "stock_type": stock,
        "forward": forward,
    }
    rules = {**rules, **vars(module).get("function_rules", {})}
    module.__class__ = type(stock.__name__, (Intercepted, stock), names)
    vars(module)["function_rules"] = rules


def release(module: nn.Module) -> dict[str, Callable]:
    """Undo `intercept`; returns the rules that the module had."""
    module.__class__ = stock_class(module)
    return module.__dict__.pop("function_rules", {})


def stock_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without what `intercept` mixed in."""
    return module.stock_type if isinstance(module, Intercepted) else type(module)


def _rebuild(made: Callable[..., nn.Module], args: tuple, attributes: dict[str, Any]) -> nn.Module:
    module = made(*args)
    vars(module).update(attributes)
    intercept(module, attributes["function_rules"])
    return module
