"""Activation functions: how each is computed, and its derivative.

Beside PyTorch's own there are formulas of timm and transformers that compute the same functions. Each keeps the formula of its library,
since the order of operations shows in the last bit.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Formula(NamedTuple):
    """One way to compute an activation function y = f(x)."""

    compute: Callable[..., Tensor]
    function: str  # its name for codecs; a formula of this very name is the function's plain one
    slope: Callable[..., Tensor]  # f'(x) from x, or from y if `of_output`
    inplace: Callable[[Tensor], Tensor] | None = None  # writes y into x; None: y is computed and then copied into x
    of_output: bool = False


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _fast_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _swish(x: Tensor) -> Tensor:
    return x.mul(x.sigmoid())


def _swish_inplace(x: Tensor) -> Tensor:
    return x.mul_(x.sigmoid())


def _gelu_slope(x: Tensor, approximate: str) -> Tensor:
    return torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)


def _silu_slope(x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(torch.ones_like(x), x)


def _quick_gelu_slope(x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return s + 1.702 * x * s * (1 - s)


def _hardswish_slope(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0)).to(x.dtype)


def _mish_slope(x: Tensor) -> Tensor:
    t = F.softplus(x).tanh()
    return t + x * x.sigmoid() * (1 - t * t)


def _elu_slope(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, 1.0, alpha * x.exp()).to(x.dtype)


def _softplus_slope(x: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x)).to(x.dtype)


_ERF, _TANH = partial(_gelu_slope, approximate="none"), partial(_gelu_slope, approximate="tanh")

FORMULAS = {
    "gelu": Formula(F.gelu, "gelu", _ERF),
    "gelu_tanh": Formula(partial(F.gelu, approximate="tanh"), "gelu_tanh", _TANH),
    "new_gelu": Formula(_new_gelu, "gelu_tanh", _TANH),
    "fast_gelu": Formula(_fast_gelu, "gelu_tanh", _TANH),
    "quick_gelu": Formula(_quick_gelu, "quick_gelu", _quick_gelu_slope),
    "silu": Formula(F.silu, "silu", _silu_slope, partial(F.silu, inplace=True)),
    "swish": Formula(_swish, "silu", _silu_slope, _swish_inplace),
    "hardswish": Formula(F.hardswish, "hardswish", _hardswish_slope),
    "mish": Formula(F.mish, "mish", _mish_slope),
    "elu": Formula(F.elu, "elu", _elu_slope),
    "softplus": Formula(F.softplus, "softplus", _softplus_slope),
    "sigmoid": Formula(torch.sigmoid, "sigmoid", lambda y: y * (1 - y), of_output=True),
    "tanh": Formula(torch.tanh, "tanh", lambda y: 1 - y * y, of_output=True),
}
