"""Triton kernels of inverted activations: the bits alone, the output with the bits, and the input gradient.

Each kernel reads its inputs once and writes its outputs once. A program handles GROUPS groups of eight elements, one byte of mask each.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import pack8, packed_bytes, unpack8
from actpress.kernels.common.launch import cdiv, tl, triton
from actpress.kernels.common.layout import dense, dense_as
from actpress.kernels.inverted.reference import FITS, MINIMA, THRESHOLDS


class Constants(NamedTuple):
    """Compile-time constants of the derivative's kernel: a Fit whose left polynomials are in sqrt(-log2(y / y*))."""

    scale: float
    y_min: float
    high: float  # y_min in two parts
    low: float
    half: float  # half the spacing of y's dtype near y_min
    floor: float
    saturation: float
    gauss: bool
    window_min: float  # 1 / window at the minimum
    series: bool  # whether y's dtype is fine enough to show the error of a fast logarithm near the minimum
    left_numerator: tuple[float, ...]
    left_denominator: tuple[float, ...]
    right_numerator: tuple[float, ...]
    right_denominator: tuple[float, ...]


@cache
def constants(function: str, dtype: torch.dtype) -> Constants:
    """Constants of `function` for outputs of `dtype`, fp32, fp16 or bf16."""
    fit, name, unit = FITS[function], str(dtype).removeprefix("torch."), math.sqrt(math.log(2))
    return Constants(
        fit.scale,
        fit.y_min,
        *MINIMA[function, torch.float32],
        fit.half_spacing[name],
        fit.floor[name],
        fit.saturation,
        fit.gauss,
        math.exp(fit.y_min**2 / 2 if fit.gauss else fit.y_min),
        dtype == torch.float32,
        tuple(c * unit ** (i + 1) for i, c in enumerate(fit.left_numerator)),
        tuple(c * unit**i for i, c in enumerate(fit.left_denominator)),
        fit.right_numerator,
        fit.right_denominator,
    )


CONFIGS: tuple[launch.Config, ...] = (
    {"GROUPS": 128, "num_warps": 4},
    {"GROUPS": 256, "num_warps": 4},
    {"GROUPS": 256, "num_warps": 8},
)
LOG2_E = tl.constexpr(1 / math.log(2))
ROOT_HALF_LOG2_E = tl.constexpr(math.sqrt(0.5 / math.log(2)))  # 2^-(this * x)^2 is exp(-x^2 / 2)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def activation(x, FUNCTION: tl.constexpr, FINE: tl.constexpr):
    """FUNCTION of x, fp32. FINE: to fp32's precision, otherwise gelu is within 1e-6 |x|.

    A squared reciprocal root is two instructions and errs by 2^-22; a division is eight.
    """
    if FUNCTION == "gelu" and FINE:
        y = 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    elif FUNCTION == "gelu":  # erfc of Abramowitz and Stegun 7.1.26, halved; tl.erf is twice the instructions
        r = tl.rsqrt(1.0 + 0.2316418882409473 * tl.abs(x))
        t = r * r
        tail = t * (0.127414796 + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))))
        root = x * ROOT_HALF_LOG2_E
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - tl.abs(x) * tail * tl.exp2(-root * root)
    else:  # x * sigmoid(z)
        z = x
        if FUNCTION == "gelu_tanh":
            z = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # (1 + tanh(z / 2)) / 2 is sigmoid(z)
        if FUNCTION == "quick_gelu":
            z = 1.702 * x
        r = tl.rsqrt(1.0 + tl.exp2(z * -LOG2_E))
        y = x * r * r
    return y


@triton.jit
def _minus_log2(x):
    """-log2(x) for 2^-24 <= x <= 1, on a device in one instruction that errs by 2^-22; tl.log2 is twenty."""
    if INTERPRETED:  # knows no libdevice
        y = tl.log2(x)
    else:
        y = tl.extra.cuda.libdevice.fast_log2f(x)
    return -y


@triton.jit
def _horner(u, COEFFICIENTS: tl.constexpr):
    DEGREE: tl.constexpr = len(COEFFICIENTS) - 1
    total = u * COEFFICIENTS[DEGREE] + COEFFICIENTS[DEGREE - 1]
    for i in tl.static_range(2, DEGREE + 1):
        total = total * u + COEFFICIENTS[DEGREE - i]
    return total


@triton.jit
def _derivative(y, left, K: tl.constexpr):
    """`derivative_reference` of y, fp32, and left, bool. Both branches share a root and a quotient."""
    NAN: tl.constexpr = tl.PropagateNan.ALL
    if K.scale != 1.0:
        # No output is below -1. Without the bound the compiler would not round the product before y* is subtracted.
        y = tl.maximum(y * K.scale, -1.0, propagate_nan=NAN)
    y = tl.minimum(y, K.saturation, propagate_nan=NAN)
    near = y - K.high
    above = tl.maximum(0.25 * near + (K.half - K.low) / 4, 0.0, propagate_nan=NAN)
    below = tl.maximum(0.25 * near - (K.half + K.low) / 4, 0.0, propagate_nan=NAN)
    gap = (above + below) + 2.0 * tl.sqrt(above * below)  # (sqrt(above) + sqrt(below))^2
    gap = tl.maximum(gap, K.floor, propagate_nan=NAN)

    part = gap * (-1 / K.y_min)  # y / y* is 1 - part
    log = _minus_log2(tl.maximum(1.0 - part, 2**-24, propagate_nan=NAN))
    if K.series:
        series = part * (1.0 + part * (1 / 2 + part * (1 / 3 + part * (1 / 4 + part * (1 / 5)))))
        log = tl.where(part < 0.0625, series * LOG2_E, log)
    else:
        log = tl.maximum(log, 0.0, propagate_nan=NAN)  # the logarithm of 1 may be slightly negative
    u = tl.sqrt(tl.where(left, log, gap))
    LEFT_N: tl.constexpr = K.left_numerator  # Triton 3.6 cannot pass an attribute to a function
    LEFT_D: tl.constexpr = K.left_denominator
    RIGHT_N: tl.constexpr = K.right_numerator
    RIGHT_D: tl.constexpr = K.right_denominator
    r = tl.rsqrt(tl.where(left, _horner(u, LEFT_D), _horner(u, RIGHT_D)))  # denominators are positive
    ratio = u * tl.where(left, _horner(u, LEFT_N), _horner(u, RIGHT_N)) * r * r

    if K.gauss:
        root = gap * ROOT_HALF_LOG2_E + K.y_min * ROOT_HALF_LOG2_E
        window = tl.exp2(-root * root)
    else:
        window = tl.exp2(gap * -LOG2_E - K.y_min * LOG2_E)
    return tl.where(left, y * ratio, 1.0 + window * (ratio - K.window_min))


@triton.jit
def _elements(GROUPS: tl.constexpr):
    """This program's groups of eight elements [GROUPS] and their elements [GROUPS, 8], as offsets."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    return group, group[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _left_bits_kernel(x_ptr, packed_ptr, count, THRESHOLD: tl.constexpr, GROUPS: tl.constexpr):
    group, element = _elements(GROUPS)
    x = tl.load(x_ptr + element, mask=element < count, other=0.0).to(tl.float32)
    packed = tl.reshape(pack8((x < THRESHOLD).to(tl.int32), 1), [GROUPS])
    tl.store(packed_ptr + group, packed, mask=group * 8 < count)


@triton.jit
def _forward_kernel(
    x_ptr, y_ptr, packed_ptr, count, FUNCTION: tl.constexpr, THRESHOLD: tl.constexpr, GROUPS: tl.constexpr
):
    group, element = _elements(GROUPS)
    x = tl.load(x_ptr + element, mask=element < count, other=0.0).to(tl.float32)
    tl.store(y_ptr + element, activation(x, FUNCTION, x_ptr.dtype.element_ty == tl.float32), mask=element < count)
    packed = tl.reshape(pack8((x < THRESHOLD).to(tl.int32), 1), [GROUPS])
    tl.store(packed_ptr + group, packed, mask=group * 8 < count)


@triton.jit
def _input_grad_kernel(dy_ptr, y_ptr, packed_ptr, dx_ptr, count, K: tl.constexpr, GROUPS: tl.constexpr):
    group, element = _elements(GROUPS)
    packed = tl.load(packed_ptr + group, mask=group * 8 < count, other=0)
    y = tl.load(y_ptr + element, mask=element < count, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + element, mask=element < count, other=0.0).to(tl.float32)
    dx = dy * _derivative(y, unpack8(packed[:, None], 1) != 0, K)
    tl.store(dx_ptr + element, dx, mask=element < count)


def _grid(x: Tensor, config: launch.Config) -> tuple[int]:
    return (cdiv(x.numel(), 8 * config["GROUPS"]),)


def left_bits_triton(x: Tensor, function: str, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`left_bits_reference` in one pass; equal bit for bit."""
    x = dense(x)
    packed = x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)
    threshold = THRESHOLDS[function, x.dtype]
    launch.run(_left_bits_kernel, _grid(x, config), x, packed, x.numel(), THRESHOLD=threshold, **config)
    return packed


def forward_triton(x: Tensor, function: str, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`forward_reference` in one pass. The bits are equal. y is computed in fp32 and rounded once, with other instructions than stock's.

    Before rounding y is within 1e-6 |x| of function(x). So most 16-bit outputs equal stock's, and the others differ in the last bit. They
    differ by more only in the far left tail, where 1 + erf and 1 + tanh cancel, and for quick_gelu, which stock rounds three times. For an
    infinite x gelu may be NaN. The error of d is up to 3.2e-4 for an fp32 y of this kernel, up to 1.6e-4 for stock's.
    """
    x = dense(x)
    y, packed = torch.empty_like(x), x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)
    constexprs = {"FUNCTION": function, "THRESHOLD": THRESHOLDS[function, x.dtype]}
    launch.run(_forward_kernel, _grid(x, config), x, y, packed, x.numel(), **constexprs, **config)
    return y, packed


def input_grad_triton(
    dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`input_grad_from_bits_reference` in one pass, with the device's approximate roots, exponential and logarithm.

    If each of these errs by as much as the PTX manual allows, d differs from the reference by up to 2e-6 for fp32 outputs. For 16-bit
    outputs it differs by up to 2e-4 where y equals y*, by up to 1e-5 elsewhere. Its error against the exact derivative equals the
    reference's in two digits.
    """
    dy, y = dense_as(dy, channels_last), dense_as(y, channels_last)
    dx = torch.empty_like(dy)
    k = constants(function, y.dtype)
    launch.run(_input_grad_kernel, _grid(dy, config), dy, y, packed, dx, dy.numel(), K=k, **config)
    return dx
