"""Functions that a network calls by themselves (F.relu in a forward method) instead of as modules.

A method can replace them too: the module whose forward calls one runs it under a mode that hands the call to the method's function. Calls
are found in the source of forward methods; what no rule covers ends up in the report instead of being dense in silence.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

# Functions that keep a dense tensor for backward, by name, however they are reached (F.x, torch.x, tensor.x).
KEEPERS = {
    *(
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "elu",
        "gelu",
        "silu",
        "hardswish",
        "mish",
        "softplus",
        "tanh",
        "sigmoid",
    ),
    *("softmax", "log_softmax", "dropout", "dropout2d", "max_pool2d", "avg_pool2d"),
    *(
        "batch_norm",
        "layer_norm",
        "group_norm",
        "linear",
        "conv2d",
        "matmul",
        "bmm",
        "einsum",
        "scaled_dot_product_attention",
    ),
}


def calls(module: nn.Module) -> set[str]:
    """Names of KEEPERS that the module's own forward calls as functions; empty for PyTorch's own modules."""
    forward = type(module).forward
    if type(module).__module__.startswith("torch.nn"):
        return set()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # built in a shell, in C, or by a decorator
        return set()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in KEEPERS:
            owner = node.func.value
            if not (isinstance(owner, ast.Name) and owner.id == "self"):  # self.relu(x) calls a module
                found.add(node.func.attr)
    return found


def variants(name: str) -> tuple[Callable, ...]:
    """The functions called `name`: in torch.nn.functional, torch, and as a method of tensors."""
    places = (nn.functional, torch, torch.Tensor)
    return tuple(getattr(place, name) for place in places if hasattr(place, name))


class Replacing(TorchFunctionMode):
    """Hands calls of the functions in `table` to what the table says."""

    def __init__(self, table: Mapping[Callable, Callable]):
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))


class _Intercepted:
    """Mixed in front of a module's class: its forward runs under Replacing."""

    function_rules: Mapping[str, Callable]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        table = {function: ours for name, ours in self.function_rules.items() for function in variants(name)}
        with Replacing(table):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:  # the class is made at run time, pickle could not find it
        return _rebuild, (type(self).__bases__[1], self.__dict__)


def intercept(module: nn.Module, rules: Mapping[str, Callable]) -> None:
    """From now on the functions named in `rules`, called in the module's forward or below it, are what the rules say."""
    stock = type(module)
    module.__class__ = type(stock.__name__, (_Intercepted, stock), {"__module__": stock.__module__})
    module.function_rules = dict(rules)


def _rebuild(stock: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    module = stock.__new__(stock)
    module.__dict__.update(attributes)
    intercept(module, attributes["function_rules"])
    return module
