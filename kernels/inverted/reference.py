"""The derivative of GELU or SiLU from the activation's output and one bit, in plain PyTorch.

y = f(x) falls from 0 to a minimum (x*, y*) and rises again. So y and the bit "x < x*" determine x. The next layer saves y anyway. The bit
is all that is saved in addition: 1/32 of an fp32 tensor, 1/16 of a bf16 tensor. The backward pass computes

    dx = dy * d(y, bit)

where d approximates f'(f^-1(y)) by one rational function on each side of the minimum. scripts/dev/fit_inverse.py fits the coefficients and
documents the formulas. The idea is from arXiv 2407.15545; the coefficients are our own.

Rounding y costs more accuracy than the fit, since d behaves like sqrt(y - y*) near the minimum. Two measures limit that error. y - y* is
computed exactly: y* is stored in two parts. And d is evaluated at the middle of the interval that rounds to y (`half_spacing`, `floor`).
In bf16 the remaining error also hides fits of lower degree, which take fewer instructions: the decoders "medium" and "coarse", beside
"fine".

Computed in fp32; in fp64 for fp64. tests/methods/test_inverted.py states the largest error of d over all inputs. d is finite for every
finite y.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.compare import DTYPES, least_not_below
from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.layout import dense
from actpress.kernels.inverted.coefficients import COEFFICIENTS
from actpress.kernels.masks import pack_mask_reference, unpack_mask_reference

FUNCTIONS = tuple(key for key in COEFFICIENTS if ":" not in key)  # gelu (erf), gelu_tanh, silu, quick_gelu
DECODERS = ("fine", "medium", "coarse")


class Fit(NamedTuple):
    """The rational functions that decode one activation. f(x) = g(scale * x) / scale; x_min is that of f, all other values are those of g.

    Polynomials are in ascending powers.
    """

    scale: float
    x_min: float
    y_min: float
    gauss: bool  # the window is exp(-y^2 / 2), otherwise exp(-y)
    saturation: float  # outputs above it have f' = 1
    left_numerator: tuple[float, ...]
    left_denominator: tuple[float, ...]
    right_numerator: tuple[float, ...]
    right_denominator: tuple[float, ...]
    half_spacing: dict[str, float]  # dtype of y -> half the distance of neighbouring outputs near y*
    floor: dict[str, float]  # dtype of y -> least y - y* to assume


# Keys: "function" for the decoder "fine", otherwise "function:decoder". Functions that compute d accept both.
FITS = {function: Fit(**coefficients) for function, coefficients in COEFFICIENTS.items()}


def decoded_by(function: str, decoder: str) -> str:
    """The key in FITS of a function and one of DECODERS."""
    return function if decoder == "fine" else f"{function}:{decoder}"


def left_reference(x: Tensor, function: str) -> Tensor:
    """Whether each x lies left of the minimum of `function`: bool, of x's shape and memory order."""
    return x < THRESHOLDS[function, x.dtype]


def left_bits_reference(x: Tensor, function: str) -> Tensor:
    """`left_reference` of x of any shape and strides, packed: uint8 [ceil(numel / 8)], in the order of dense(x)."""
    return pack_mask_reference(left_reference(dense(x), function))


def forward_reference(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """(function(x) as stock PyTorch computes it, left_bits_reference(x)), both in the order of dense(x)."""
    x = dense(x)
    return STOCK[function](x), left_bits_reference(x, function)


def derivative_reference(y: Tensor, left: Tensor, function: str) -> Tensor:
    """d(y, left): fp32 (fp64 for fp64 y), of y's shape. y: outputs of `function` in fp64, fp32, fp16 or bf16; left: bool."""
    fit = FITS[function]
    compute = compute_dtype(y.dtype)
    high, low = MINIMA[function, compute]
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
    exponent_min = fit.y_min * fit.y_min / 2 if fit.gauss else fit.y_min
    right_d = right_d.sub_(math.exp(exponent_min)).mul_(exponent.exp_()).add_(1)
    return torch.where(left, left_d, right_d)


def input_grad_reference(dy: Tensor, y: Tensor, left: Tensor, function: str) -> Tensor:
    """dx = dy * d(y, left), in dy's dtype."""
    return (derivative_reference(y, left, function) * dy).to(dy.dtype)  # not mul_, which torch.vmap of dy alone forbids


def input_grad_from_bits_reference(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    """`input_grad_reference` from a packed mask. channels_last: whether the mask was packed in channels_last order."""
    return input_grad_reference(dy, y, unpack_mask_reference(packed, y.shape, channels_last), function)


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


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


STOCK: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": _quick_gelu,
}
# x < threshold in x's dtype exactly where x < x_min
THRESHOLDS = {(name, dtype): least_not_below(fit.x_min, dtype) for name, fit in FITS.items() for dtype in DTYPES}
# y_min in two parts, of which the first is a number of that dtype
MINIMA = {
    (name, dtype): _two_parts(fit.y_min, dtype)
    for name, fit in FITS.items()
    for dtype in (torch.float32, torch.float64)
}
