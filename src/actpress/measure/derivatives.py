"""Error of the derivative f'(x) of an activation whose codec does not save x, over every input of a dtype.

The error |d - f'(x)| is measured end to end: the layer's forward pass in the dtype, its code, then d in fp32 (fp64 for fp64); f'(x) is
computed in fp64. It is summarized as the maximum, and as the root mean square over inputs drawn from N(0, 1) and rounded to the dtype.
The floor is the least error that any function of the rounded output and of the side of the minimum can reach: inputs that have both in
common cannot be distinguished.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from actpress.codec import Codec, Like
from actpress.layers.formulas import FORMULAS

REACH = 30.0  # inputs |x| <= REACH
GRID = 2**20  # intervals of the uniform grid over [-REACH, REACH] that is used for fp32 and fp64
NEAR = 2**-9  # the grid also has every fp32 number this close to the minimum, where errors are largest
VARIANTS = [
    name for name, formula in FORMULAS.items() if formula.function in ("gelu", "gelu_tanh", "quick_gelu", "silu")
]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class DerivativeError(NamedTuple):
    max: float
    rms: float
    floor_max: float
    floor_rms: float
    worst_x: float  # the input at which the error is largest


def derivative_error(codec: Codec, variant: str, dtype: str) -> DerivativeError:
    """Error of a codec of activations for one of layers.formulas.FORMULAS that it can encode. dtype: "fp64", "fp32", "fp16" or "bf16".

    fp16 and bf16 use every input up to REACH; fp32 and fp64 use a grid, and the floor is that of the grid. Raises ValueError for other
    names.
    """
    for what, value, allowed in (("variant", variant, VARIANTS), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ValueError(f"derivative_error: {what}={value!r}, allowed: {', '.join(allowed)}")
    compute, function = FORMULAS[variant].compute, FORMULAS[variant].function
    x = inputs(function, dtype)
    y = compute(x)
    kept = codec.encode_activation(x, function)
    # An upstream gradient that does not round d.
    ones = torch.ones_like(x, dtype=torch.promote_types(x.dtype, torch.float32))
    output = y if codec.keeps_output else None
    d = codec.activation_grad(kept, Like.of(x), ones, output, function).double()
    exact, probability = slope(x.double(), function), normal_probability(x.double())
    error = (d - exact).abs()
    nearest, mean = _best_for_outputs(y.double(), x.double() < minimum(function), exact, probability)
    return DerivativeError(
        error.max().item(),
        (probability * error.square()).sum().sqrt().item(),
        nearest.item(),
        (probability * (mean - exact).square()).sum().sqrt().item(),
        x[error.argmax()].item(),
    )


def inputs(function: str, dtype: str) -> Tensor:
    """Every fp16 or bf16 number up to REACH, or the grid for fp32 and fp64; ascending, without duplicates."""
    if DTYPES[dtype].itemsize == 2:
        numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype])
        return numbers[numbers.abs() <= REACH].float().unique().to(DTYPES[dtype])
    centre = minimum(function)
    uniform = torch.linspace(-REACH, REACH, GRID + 1, dtype=torch.float64)
    near = torch.linspace(centre - NEAR, centre + NEAR, 2**17 + 1, dtype=torch.float64)  # finer than fp32
    return torch.cat([uniform, near]).to(torch.float32).unique().to(DTYPES[dtype])


def minimum(function: str) -> float:
    """The x at which f' is 0, by bisection."""
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
    """For each of the ascending x: the probability that a draw from N(0, 1) is nearest to it."""
    below = torch.special.ndtr((x[1:] + x[:-1]) / 2)
    return torch.cat([below[:1] * 0, below, below[:1] * 0 + 1]).diff()


def _best_for_outputs(y: Tensor, left: Tensor, exact: Tensor, probability: Tensor) -> tuple[Tensor, Tensor]:
    """What a decoder of (output, side of the minimum) can reach at best.

    Returns its least possible maximum error, and for each input the mean of f' over the inputs with the same output and side: the
    decoder with the least root mean square error.
    """
    _, group = torch.stack([y, left.double()]).unique(dim=1, return_inverse=True)
    empty = torch.zeros(int(group.max()) + 1, dtype=torch.float64)
    highest = empty.scatter_reduce(0, group, exact, "amax", include_self=False)
    lowest = empty.scatter_reduce(0, group, exact, "amin", include_self=False)
    weight = probability.clamp(min=1e-300)
    mean = empty.scatter_add(0, group, weight * exact) / empty.scatter_add(0, group, weight)
    return (highest - lowest).max() / 2, mean[group]
