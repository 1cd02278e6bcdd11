"""fp32 to bf16 by the bits: in a chosen direction for the bounds of a code, and to nearest where a cast is not to be had.

bf16 is the upper half of fp32, so rounding is integer arithmetic on the lower half. In kernels a bf16 travels as int16: Triton's
interpreter truncates where hardware rounds, so tensors are passed to kernels as `tensor.view(torch.int16)`. NaN stays NaN, always the
same one.
"""

import torch
from torch import Tensor

from .launch import tl, triton


def bf16_floor(x: Tensor) -> Tensor:
    """The largest bf16 not above x. fp64 is rounded to fp32 first."""
    bits = x.float().view(torch.int32)
    return _bf16(torch.where(bits < 0, bits + 0xFFFF, bits), x)  # negative: away from zero


def bf16_ceil(x: Tensor) -> Tensor:
    """The smallest bf16 not below x. fp64 is rounded to fp32 first."""
    bits = x.float().view(torch.int32)
    return _bf16(torch.where(bits < 0, bits, bits + 0xFFFF), x)


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
def _upper_half(bits, x):
    return tl.where(x == x, bits >> 16, 0x7FC0).to(tl.int16)


@triton.jit
def bf16_value(bits):
    """int16 bits of a bf16 -> fp32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
