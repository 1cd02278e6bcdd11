"""The derivative of GELU or SiLU from its own output and one bit.

y = f(x) falls from 0 to a minimum (x*, y*) and rises again, so y and the bit "x < x*" determine x. The next layer keeps y anyway;
beside it the bit is all that is kept: 1/32 of an fp32 tensor, 1/16 of a bf16 one. Backward, dx = dy * d(y, bit), where d
approximates f'(f^-1(y)) by one rational function on each side of the minimum (scripts/fit_inverse.py fits them and has the
formulas). Source of the idea: arXiv 2407.15545; the coefficients are our own.

Rounding y costs more than the fit: near the minimum d goes like sqrt(y - y*). y - y* is therefore taken exactly, against y* in
two parts, and d answers the middle of what the rounded y stands for (half_spacing, floor).

Computed in fp32, in fp64 for fp64. Largest error of d over all inputs: tests/test_inverted.py. Finite for every finite y.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .compare import DTYPES, least_not_below
from .inverted_coefficients import COEFFICIENTS

FUNCTIONS = tuple(COEFFICIENTS)  # gelu (erf), gelu_tanh, silu, quick_gelu


class Fit(NamedTuple):
    """f(x) = g(scale * x) / scale; x_min is f's, all else is g's, polynomials in ascending powers."""

    scale: float
    x_min: float
    y_min: float
    gauss: bool
    saturation: float
    left_numerator: tuple[float, ...]
    left_denominator: tuple[float, ...]
    right_numerator: tuple[float, ...]
    right_denominator: tuple[float, ...]
    half_spacing: dict[str, float]  # dtype of y -> half the distance of neighbouring outputs near y*
    floor: dict[str, float]  # dtype of y -> least y - y* to assume


FITS = {function: Fit(**coefficients) for function, coefficients in COEFFICIENTS.items()}


def left_reference(x: Tensor, function: str) -> Tensor:
    """bool of x's shape and memory order: is x left of the minimum of `function`?"""
    return x < _THRESHOLDS[function, x.dtype]


def derivative_reference(y: Tensor, left: Tensor, function: str) -> Tensor:
    """d(y, left), fp32 (fp64 for fp64 y), of y's shape. y: outputs of `function` in fp64, fp32, fp16 or bf16; left: bool."""
    fit = FITS[function]
    compute = torch.float64 if y.dtype == torch.float64 else torch.float32
    high, low = _TWO_PARTS[function, compute]
    name = str(y.dtype).removeprefix("torch.")
    half, floor = fit.half_spacing[name], fit.floor[name]
    y = y.to(compute) * fit.scale
    gap = y.sub(high).sub_(low).clamp_(max=fit.saturation - fit.y_min)  # y - y*
    gap = gap.add(half).clamp_(min=0).sqrt_().add_(gap.sub(half).clamp_(min=0).sqrt_()).div_(2).square_()
    gap.clamp_(min=floor)

    t = gap.div(fit.y_min).clamp_(min=torch.finfo(compute).eps / 2 - 1).log1p_().neg_().sqrt_()
    left_d = _ratio(t, fit.left_numerator, fit.left_denominator).mul_(t).mul_(y)

    v = gap.sqrt()
    right_d = _ratio(v, fit.right_numerator, fit.right_denominator).mul_(v)
    y = gap.add_(fit.y_min)
    exponent = y.square().div_(-2) if fit.gauss else y.neg()
    exponent_min = fit.y_min**2 / 2 if fit.gauss else fit.y_min
    right_d = right_d.sub_(math.exp(exponent_min)).mul_(exponent.exp_()).add_(1)
    return torch.where(left, left_d, right_d)


def input_grad_reference(dy: Tensor, y: Tensor, left: Tensor, function: str) -> Tensor:
    """dx = dy * d(y, left), in dy's dtype."""
    return derivative_reference(y, left, function).mul_(dy).to(dy.dtype)


def _ratio(u: Tensor, numerator: tuple[float, ...], denominator: tuple[float, ...]) -> Tensor:
    return _polynomial(u, numerator).div_(_polynomial(u, denominator))


def _polynomial(u: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    total = u * coefficients[-1]
    for c in coefficients[-2:0:-1]:
        total.add_(c).mul_(u)
    return total.add_(coefficients[0])


def _two_parts(y_min: float, dtype: torch.dtype) -> tuple[float, float]:
    """y_min as the nearest number of `dtype` and the rest."""
    high = torch.tensor(y_min, dtype=dtype).item()
    return high, y_min - high


_THRESHOLDS = {(name, dtype): least_not_below(fit.x_min, dtype) for name, fit in FITS.items() for dtype in DTYPES}
_TWO_PARTS = {
    (name, dtype): _two_parts(fit.y_min, dtype)
    for name, fit in FITS.items()
    for dtype in (torch.float32, torch.float64)
}
