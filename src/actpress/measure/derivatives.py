"""How exact is a derivative that was not computed from the input? Every input of a dtype, against fp64.

Error here is |d - f'(x)|, end to end: the layer's own forward pass in the dtype, its code, d in fp32 (fp64 for fp64). Two summaries:
the largest, and the root mean square for inputs drawn from N(0, 1) and rounded to the dtype. Beside them stands the floor: no function of
the rounded output and the side of the minimum can do better, since inputs that share both cannot be told apart.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from actpress.layers.activation import VARIANTS, Derivative

REACH = 30.0  # inputs |x| <= REACH
GRID = 2**20  # points of the grid that stands for fp32 and fp64 inputs, uniform in [-REACH, REACH]
NEAR = 2**-9  # and every fp32 number this close to the minimum, where errors are largest
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Error(NamedTuple):
    max: float
    rms: float
    floor_max: float
    floor_rms: float
    worst_x: float  # where max is


def derivative_error(derivative: Derivative, variant: str, dtype: str) -> Error:
    """Error of `derivative` for one of activations.VARIANTS. dtype: fp32, fp64, fp16 or bf16.

    fp16 and bf16: every input up to REACH; fp32 and fp64: a grid, whose floor is the one given. Raises ValueError for other names.
    """
    for what, value, allowed in (("variant", variant, VARIANTS), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"derivative_error: {what}={value!r}, allowed: {', '.join(allowed)}")
    compute, function, _ = VARIANTS[variant]
    x = inputs(function, dtype)
    y = compute(x)
    code, channels_last = derivative.encode(x, function)
    ones = torch.ones_like(x, dtype=torch.promote_types(x.dtype, torch.float32))  # an upstream that does not round d
    d = derivative.input_grad(ones, code, y if derivative.keeps_output else None, function, channels_last).double()
    exact, probability = slope(x.double(), function), normal_probability(x.double())
    error = (d - exact).abs()
    nearest, mean = _best_for_outputs(y.double(), x.double() < minimum(function), exact, probability)
    return Error(
        error.max().item(),
        (probability * error.square()).sum().sqrt().item(),
        nearest.item(),
        (probability * (mean - exact).square()).sum().sqrt().item(),
        x[error.argmax()].item(),
    )


def inputs(function: str, dtype: str) -> Tensor:
    """Every finite fp16 or bf16 number up to REACH, or the grid for fp32 and fp64; ascending, no number twice."""
    if DTYPES[dtype].itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype])
        return numbers[numbers.abs() <= REACH].float().unique().to(DTYPES[dtype])
    centre = minimum(function)
    uniform = torch.linspace(-REACH, REACH, GRID + 1, dtype=torch.float64)
    near = torch.linspace(centre - NEAR, centre + NEAR, 2**17 + 1, dtype=torch.float64)  # finer than fp32
    return torch.cat([uniform, near]).to(torch.float32).unique().to(DTYPES[dtype])


def minimum(function: str) -> float:
    """x* where f' is 0, by bisection."""
    low, high = torch.tensor(-2.0, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle, function) < 0 else (low, middle)
    return high.item()


def slope(x: Tensor, function: str) -> Tensor:
    """f'(x) in fp64, from its formula."""
    if function == "gelu":
        return torch.erfc(-x / math.sqrt(2)) / 2 + x * (-x * x / 2).exp() / math.sqrt(2 * math.pi)
    if function == "gelu_tanh":
        inner = math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)
        return torch.sigmoid(inner) * (1 + x * math.sqrt(8 / math.pi) * (1 + 0.134145 * x**2) * torch.sigmoid(-inner))
    x = 1.702 * x if function == "quick_gelu" else x
    return torch.sigmoid(x) * (1 + x * torch.sigmoid(-x))


def normal_probability(x: Tensor) -> Tensor:
    """Chance that a draw from N(0, 1) lies nearest to each of the ascending x."""
    below = torch.special.ndtr((x[1:] + x[:-1]) / 2)
    return torch.cat([below[:1] * 0, below, below[:1] * 0 + 1]).diff()


def _best_for_outputs(y: Tensor, left: Tensor, exact: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """Over inputs with the same output and side: the least possible largest error, and for each input the mean of f'."""
    _, group = torch.stack([y, left.double()]).unique(dim=1, return_inverse=True)
    empty = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    highest = empty.scatter_reduce(0, group, exact, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group, exact, "amin", include_self=False)
    weight = probability.clamp(min=1e-300)
    mean = empty.scatter_add(0, group, weight * exact) / empty.scatter_add(0, group, weight)
    return (highest - lowest).max() / 2, mean[group]
