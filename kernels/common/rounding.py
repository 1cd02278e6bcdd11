"""Rounding: fp32 to bf16 by bits, down, up or to the nearest; and decoded values to the dtype of the encoded tensor, within its range.

bf16 is the upper half of fp32, so rounding is integer arithmetic on the lower half. Kernels take bf16 as int16, `tensor.view(torch.int16)`,
since Triton's interpreter truncates where hardware rounds. NaN stays NaN, always with the same bits.
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
    """fp32 of x's shape: 0, or NaN where x is not finite in fp32. Adding it turns -0 into 0."""
    x = x.float()
    return x - x


def finite(x: Tensor) -> Tensor:
    """bf16 x with each infinity replaced by the largest number of its sign. NaN stays NaN."""
    limit = torch.finfo(x.dtype).max
    return x.masked_fill(x == torch.inf, limit).masked_fill_(x == -torch.inf, -limit)


def saturated(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, clamped to the finite range of both dtypes; infinities too. NaN stays NaN. Changes x in place."""
    limit = min(torch.finfo(dtype).max, torch.finfo(x.dtype).max)
    return x.clamp_(-limit, limit).to(dtype)


def _bf16(bits: Tensor, x: Tensor) -> Tensor:
    """The upper half of fp32 bits; NaN where x is NaN, since the arithmetic may have destroyed its payload."""
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
    """`finite` for int16 bits of a bf16."""
    return tl.where((bits & 0x7FFF) == 0x7F80, bits - 1, bits).to(tl.int16)


@triton.jit
def saturate(x, dtype: tl.constexpr):
    """`saturated`, but in fp32; the store casts it to `dtype`."""
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
