"""The derivative of GELU or SiLU from its own output and one bit.

y = f(x) falls from 0 to a minimum (x*, y*) and rises again, so y and the bit "x < x*" determine x. The next layer keeps y anyway;
beside it the bit is all that is kept: 1/32 of an fp32 tensor, 1/16 of a bf16 one. Backward, dx = dy * d(y, bit), where d
approximates f'(f^-1(y)) by one rational function on each side of the minimum (scripts/dev/fit_inverse.py fits them and has the
formulas). Source of the idea: arXiv 2407.15545; the coefficients are our own.

Rounding y costs more than the fit: near the minimum d goes like sqrt(y - y*). y - y* is therefore taken exactly, against y* in
two parts, and d answers the middle of what the rounded y stands for (half_spacing, floor). What is left of that error in bf16 hides the
fits of lower degree too, which take fewer instructions: decoders "medium" and "coarse" beside "fine".

Computed in fp32, in fp64 for fp64. Largest error of d over all inputs: tests/methods/test_inverted.py. Finite for every finite y.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.bits import pack8, packed_bytes, unpack8
from actpress.kernels.common.compare import DTYPES, least_not_below
from actpress.kernels.common.launch import cdiv, tl, triton
from actpress.kernels.common.layout import dense, dense_as, is_channels_last
from actpress.kernels.inverted.coefficients import COEFFICIENTS
from actpress.kernels.masks import pack_mask_reference, unpack_mask_reference

FUNCTIONS = tuple(key for key in COEFFICIENTS if ":" not in key)  # gelu (erf), gelu_tanh, silu, quick_gelu
DECODERS = ("fine", "medium", "coarse")


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


# Keys: a function, decoded finely, or "function:decoder". All that computes d takes either.
FITS = {function: Fit(**coefficients) for function, coefficients in COEFFICIENTS.items()}


def decoded_by(function: str, decoder: str) -> str:
    """The key in FITS of a function and one of DECODERS."""
    return function if decoder == "fine" else f"{function}:{decoder}"


def left_reference(x: Tensor, function: str) -> Tensor:
    """bool of x's shape and memory order: is x left of the minimum of `function`?"""
    return x < _THRESHOLDS[function, x.dtype]


def left_bits_reference(x: Tensor, function: str) -> Tensor:
    """x of any shape and strides -> `left_reference` packed, uint8 [ceil(numel / 8)], in the order of dense(x)."""
    return pack_mask_reference(left_reference(dense(x), function))


def forward_reference(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """(function(x) as stock PyTorch computes it, left_bits_reference(x)), both in the order of dense(x)."""
    x = dense(x)
    return STOCK[function](x), left_bits_reference(x, function)


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
    exponent_min = fit.y_min * fit.y_min / 2 if fit.gauss else fit.y_min
    right_d = right_d.sub_(math.exp(exponent_min)).mul_(exponent.exp_()).add_(1)
    return torch.where(left, left_d, right_d)


def input_grad_reference(dy: Tensor, y: Tensor, left: Tensor, function: str) -> Tensor:
    """dx = dy * d(y, left), in dy's dtype."""
    return (derivative_reference(y, left, function) * dy).to(dy.dtype)  # torch.vmap of dy alone forbids mul_


def input_grad_from_bits_reference(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    """`input_grad_reference` of a packed mask and whether it lies in channels_last order."""
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
_THRESHOLDS = {(name, dtype): least_not_below(fit.x_min, dtype) for name, fit in FITS.items() for dtype in DTYPES}
_TWO_PARTS = {
    (name, dtype): _two_parts(fit.y_min, dtype)
    for name, fit in FITS.items()
    for dtype in (torch.float32, torch.float64)
}


class Constants(NamedTuple):
    """What the kernel of the derivative is compiled for: a Fit whose left polynomials are in sqrt(-log2(y / y*))."""

    scale: float
    y_min: float
    high: float  # y_min in two parts
    low: float
    half: float  # of the spacing of y's dtype, near y_min
    floor: float
    saturation: float
    gauss: bool
    window_min: float  # 1 / window at the minimum
    series: bool  # is the dtype fine enough to show the error of a fast logarithm near the minimum?
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
        *_TWO_PARTS[function, torch.float32],
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
    if (
        K.scale != 1.0
    ):  # no output is below -1; without the bound the product would not be rounded before y* is taken off
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
        log = tl.maximum(log, 0.0, propagate_nan=NAN)  # 1 may come back as not quite 0
    u = tl.sqrt(tl.where(left, log, gap))
    LEFT_N: tl.constexpr = K.left_numerator  # Triton 3.6 passes on no attribute
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
    threshold = _THRESHOLDS[function, x.dtype]
    launch.run(_left_bits_kernel, _grid(x, config), x, packed, x.numel(), THRESHOLD=threshold, **config)
    return packed


def forward_triton(x: Tensor, function: str, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`forward_reference` in one pass. The bit is equal; y is computed in fp32 and rounded once, with other instructions than stock's.

    Before it is rounded y is within 1e-6 |x| of function(x). Most 16-bit outputs are then stock's; the others differ in the last bit, by
    more only in the far left tail, where 1 + erf and 1 + tanh cancel, and for quick_gelu, which stock rounds three times. For an infinite
    x gelu may be NaN. d from an fp32 y is off by up to 3.2e-4, from stock's y by up to 1.6e-4.
    """
    x = dense(x)
    y, packed = torch.empty_like(x), x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)
    constexprs = {"FUNCTION": function, "THRESHOLD": _THRESHOLDS[function, x.dtype]}
    launch.run(_forward_kernel, _grid(x, config), x, y, packed, x.numel(), **constexprs, **config)
    return y, packed


def input_grad_triton(
    dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`input_grad_from_bits_reference` in one pass, with the device's approximate roots, exponential and logarithm.

    If each of these is off by as much as the PTX manual allows, d differs from the reference by up to 2e-6 for fp32 outputs, and for 16-bit
    ones by 2e-4 where y is y* exactly, 1e-5 elsewhere; against the exact derivative it is no worse than the reference in two digits.
    """
    dy, y = dense_as(dy, channels_last), dense_as(y, channels_last)
    dx = torch.empty_like(dy)
    k = constants(function, y.dtype)
    launch.run(_input_grad_kernel, _grid(dy, config), dy, y, packed, dx, dy.numel(), K=k, **config)
    return dx


@torch.library.custom_op("actpress::inverted_left_bits", mutates_args=())
def _left_bits(x: Tensor, function: str, channels_last: bool) -> Tensor:
    return left_bits_reference(dense_as(x, channels_last), function)


@_left_bits.register_fake
def _(x: Tensor, function: str, channels_last: bool) -> Tensor:
    return x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)


launch.on_cuda(_left_bits, lambda x, function, channels_last: left_bits_triton(dense_as(x, channels_last), function))


@torch.library.custom_op("actpress::inverted_forward", mutates_args=())
def _forward(x: Tensor, function: str, channels_last: bool) -> tuple[Tensor, Tensor]:
    return forward_reference(dense_as(x, channels_last), function)


@_forward.register_fake
def _(x: Tensor, function: str, channels_last: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_as(x, channels_last)), x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)


launch.on_cuda(_forward, lambda x, function, channels_last: forward_triton(dense_as(x, channels_last), function))


@torch.library.custom_op("actpress::inverted_input_grad", mutates_args=())
def _input_grad(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    dy, y = dense_as(dy, channels_last), dense_as(y, channels_last)
    return input_grad_from_bits_reference(dy, y, packed, function, channels_last)


@_input_grad.register_fake
def _(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_input_grad, input_grad_triton)


def left_bits(x: Tensor, function: str) -> Tensor:
    """x of any shape, strides and floating dtype -> is it left of the minimum of `function`? One bit per element, uint8 [ceil(numel / 8)],
    in the order of dense(x): channels_last where x is."""
    if launch.on_gpu(x):
        return launch.way(_left_bits, x)(x, function, is_channels_last(x))
    return left_bits_reference(x, function)


def forward(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """(function(x), left_bits(x)) from one read of x. On a GPU y may differ from stock's, see `forward_triton`."""
    if launch.on_gpu(x):
        return launch.way(_forward, x)(x, function, is_channels_last(x))
    return forward_reference(x, function)


def input_grad(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    """dx = dy * d(y, bit), in dy's dtype. dy, y: any strides and floating dtypes, of which both or neither fp64; packed: what `left_bits`
    found, and whether it lies in channels_last order."""
    run = launch.way(_input_grad, dy) if launch.on_gpu(dy) else input_grad_from_bits_reference
    return run(dy, y, packed, function, channels_last)


def cases() -> list[launch.Case]:
    """The hidden layer of ViT-B's MLP at batch 64: 64 x 197 x 3072."""
    vit, tiny = (64, 197, 3072), (3, 7, 197)

    def make(
        function: str, shape: tuple[int, ...], backward: bool, dtype: torch.dtype, device: str
    ) -> tuple[Tensor | str | bool, ...]:
        x = torch.randn(shape, dtype=dtype, device=device)
        if not backward:
            return x, function
        return torch.randn_like(x), *forward_reference(x, function.partition(":")[0]), function, False

    def bits_bytes(x: Tensor, *rest: object) -> int:
        return launch.nbytes(x) + packed_bytes(x.numel(), 1)

    def forward_bytes(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + packed_bytes(x.numel(), 1)

    def backward_bytes(dy: Tensor, y: Tensor, packed: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(dy) + launch.nbytes(y, packed)

    def case(name, function, kernel, reference, moved, stock=None, tolerance=0.0) -> launch.Case:
        backward = moved is backward_bytes
        return launch.Case(
            f"inverted_{name}_{function.replace(':', '_')}",
            partial(make, function, vit, backward),
            kernel,
            reference,
            moved,
            moved,
            CONFIGS,
            stock,
            tolerance=tolerance,
            tiny=partial(make, function, tiny, backward),
        )

    backward = input_grad_triton, input_grad_from_bits_reference, backward_bytes
    # Tolerance: an output in fifty may differ in the last of bf16's bits, sqrt(1 / 50) 2^-8 = 6e-4. Stock's backward pass is given y for x,
    # which takes it as long.
    return [
        case("left_bits", "gelu", left_bits_triton, left_bits_reference, bits_bytes),
        case("forward", "gelu", forward_triton, forward_reference, forward_bytes, lambda x, _: F.gelu(x), 1e-3),
        case("input_grad", "gelu", *backward, lambda dy, y, *_: torch.ops.aten.gelu_backward(dy, y), 1e-3),
        case("input_grad", "gelu:coarse", *backward, lambda dy, y, *_: torch.ops.aten.gelu_backward(dy, y), 1e-3),
        case("input_grad", "silu", *backward, lambda dy, y, *_: torch.ops.aten.silu_backward(dy, y), 1e-3),
    ]
