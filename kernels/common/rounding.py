"""fp32 to bf16 by the bits: in a chosen direction for the bounds of a code, and to nearest where a cast is not to be had. And what is
decoded, to the dtype of what was encoded, which ends where a code need not: fp16 at 65504.

bf16 is the upper half of fp32, so rounding is integer arithmetic on the lower half. In kernels a bf16 travels as int16: Triton's
interpreter truncates where hardware rounds, so tensors are passed to kernels as `tensor.view(torch.int16)`. NaN stays NaN, always the
same one.
"""

import torch
from torch import Tensor

from actpress.kernels.common.launch import tl, triton


def bf16_floor(x: Tensor) -> Tensor:
    """The largest bf16 not above x. fp64 is rounded to fp32 first."""
    bits = x.float().view(torch.int32)
    return _bf16(torch.where(bits < 0, bits + 0xFFFF, bits), x)  # negative: away from zero


def bf16_ceil(x: Tensor) -> Tensor:
    """The smallest bf16 not below x. fp64 is rounded to fp32 first."""
    bits = x.float().view(torch.int32)
    return _bf16(torch.where(bits < 0, bits, bits + 0xFFFF), x)


def poison(x: Tensor) -> Tensor:
    """fp32 of x's shape: 0, or NaN where fp32 does not hold x as a finite number. Added to -0 it makes 0."""
    x = x.float()
    return x - x


def finite(x: Tensor) -> Tensor:
    """bf16; an infinity as the largest number of its sign. NaN stays the same."""
    limit = torch.finfo(x.dtype).max
    return x.masked_fill(x == torch.inf, limit).masked_fill_(x == -torch.inf, -limit)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; what lies beyond the finite range of both, infinities too, becomes its largest number. NaN stays NaN. Changes x."""
    limit = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
    return x.clamp_(-limit, limit).to(dtype)


def _bf16(bits: Tensor, x: Tensor) -> Tensor:
    """The upper half of fp32 bits; NaN where x is NaN, whose payload the arithmetic may have carried away."""
    return (bits >> 16).masked_fill(x.isnan(), 0x7FC0).to(torch.int16).view(torch.bfloat16)


@triton.jit
def bf16_floor_bits(x):
    """fp32 -> int16: the largest bf16 not above x."""
    bits = x.to(tl.int32, bitcast=True)
    return _upper_half(tl.where(bits < 0, bits + 0xFFFF, bits), x)


@triton.jit
def bf16_ceil_bits(x):
    """fp32 -> int16: the smallest bf16 not below x."""
    bits = x.to(tl.int32, bitcast=True)
    return _upper_half(tl.where(bits < 0, bits, bits + 0xFFFF), x)


@triton.jit
def bf16_nearest_bits(x):
    """fp32 -> int16: the nearest bf16, ties to even, as x.to(bf16) on hardware and in PyTorch."""
    bits = x.to(tl.int32, bitcast=True)
    return _upper_half(bits + 0x7FFF + ((bits >> 16) & 1), x)


@triton.jit
def finite_bits(bits):
    """`finite`, of int16 bits of a bf16."""
    return tl.where((bits & 0x7FFF) == 0x7F80, bits - 1, bits).to(tl.int16)


@triton.jit
def saturate(x, dtype: tl.constexpr):
    """`saturated`, left in fp32 for a store to cast to `dtype`."""
    if dtype == tl.float16:
        LIMIT: tl.constexpr = 65504.0
    elif dtype == tl.bfloat16:
        LIMIT: tl.constexpr = (2 - 2**-7) * 2.0**127
    else:
        LIMIT: tl.constexpr = (2 - 2**-23) * 2.0**127
    x = tl.minimum(x, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(x, -LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _upper_half(bits, x):
    return tl.where(x == x, bits >> 16, 0x7FC0).to(tl.int16)


@triton.jit
def bf16_value(bits):
    """int16 bits of a bf16 -> fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
