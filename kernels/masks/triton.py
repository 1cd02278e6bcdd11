"""Masks of one bit per element, and ReLU: Triton kernels and their launchers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import pack8, packed_bytes
from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.layout import dense, dense_as, empty

CONFIGS: tuple[launch.Config, ...] = (
    {"GROUPS": 256, "num_warps": 4},
    {"GROUPS": 128, "num_warps": 4},
    {"GROUPS": 512, "num_warps": 8},
)


@triton.jit
def tile(count, GROUPS: tl.constexpr):
    """This program's share of `count` elements: (its first group of eight, int64; its elements [8 * GROUPS], counted from there; which of
    them exist; its groups [GROUPS]; which of them exist)."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    left = tl.minimum(count - first * 8, GROUPS * 8).to(tl.int32)
    element, group = tl.arange(0, GROUPS * 8), tl.arange(0, GROUPS)
    return first, element, element < left, group, group < (left + 7) // 8


@triton.jit
def load_mask(packed_ptr, element, exists):
    """The bits of these elements, int32 0 or 1. Each thread loads the bytes it needs; those of neighbours come from the same cache line."""
    packed = tl.load(packed_ptr + element // 8, mask=exists, other=0)
    return (packed.to(tl.int32) >> (element % 8)) & 1


@triton.jit
def _pack(bits, GROUPS: tl.constexpr):
    """0 or 1, [8 * GROUPS] -> uint8 [GROUPS]."""
    return tl.reshape(pack8(tl.reshape(bits.to(tl.int32), [GROUPS, 8]), 1), [GROUPS])


@triton.jit
def _pack_mask_kernel(mask_ptr, packed_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, group, group_exists = tile(count, GROUPS)
    mask = tl.load(mask_ptr + first * 8 + element, mask=exists, other=0)
    tl.store(packed_ptr + first + group, _pack(mask, GROUPS), mask=group_exists)


@triton.jit
def _unpack_mask_kernel(packed_ptr, mask_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, _, _ = tile(count, GROUPS)
    mask = load_mask(packed_ptr + first, element, exists)
    tl.store(mask_ptr + first * 8 + element, mask.to(tl.uint8), mask=exists)


@triton.jit
def _relu_kernel(x_ptr, y_ptr, packed_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, group, group_exists = tile(count, GROUPS)
    x = tl.load(x_ptr + first * 8 + element, mask=exists, other=0.0)
    tl.store(y_ptr + first * 8 + element, tl.where(x <= 0, 0.0, x), mask=exists)  # NaN stays
    tl.store(packed_ptr + first + group, _pack(x > 0, GROUPS), mask=group_exists)


@triton.jit
def _relu_backward_kernel(dy_ptr, packed_ptr, dx_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, _, _ = tile(count, GROUPS)
    keep = load_mask(packed_ptr + first, element, exists)
    dy = tl.load(dy_ptr + first * 8 + element, mask=exists, other=0.0)
    tl.store(dx_ptr + first * 8 + element, tl.where(keep != 0, dy, 0.0), mask=exists)


def grid_of(x: Tensor, config: launch.Config) -> tuple[int]:
    """The grid: one program for each `tile` of x."""
    return (-(-x.numel() // (8 * config["GROUPS"])),)


def empty_packed(x: Tensor) -> Tensor:
    """An uninitialised packed mask for x: uint8 [ceil(numel / 8)]."""
    return torch.empty(packed_bytes(x.numel(), 1), dtype=torch.uint8, device=x.device)


def pack_mask_triton(mask: Tensor, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`pack_mask_reference` in one pass; equal bit for bit."""
    mask = dense(mask)
    packed = empty_packed(mask)
    launch.run(_pack_mask_kernel, grid_of(mask, config), mask.view(torch.uint8), packed, mask.numel(), **config)
    return packed


def unpack_mask_triton(
    packed: Tensor, shape: Sequence[int], channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`unpack_mask_reference` in one pass; equal bit for bit."""
    mask = empty(shape, torch.bool, packed.device, channels_last)
    launch.run(_unpack_mask_kernel, grid_of(mask, config), packed, mask.view(torch.uint8), mask.numel(), **config)
    return mask


def relu_triton(x: Tensor, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`relu_reference` in one pass; equal bit for bit."""
    x = dense(x)
    y, packed = torch.empty_like(x), empty_packed(x)
    launch.run(_relu_kernel, grid_of(x, config), x, y, packed, x.numel(), **config)
    return y, packed


def relu_inplace_triton(x: Tensor, channels_last: bool, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`relu_inplace_reference` in one pass; equal bit for bit. A tensor in another order than `channels_last` is copied there and back."""
    y, packed = dense_as(x, channels_last), empty_packed(x)
    launch.run(_relu_kernel, grid_of(x, config), y, y, packed, x.numel(), **config)
    if y is not x:
        x.copy_(y)
    return packed


def relu_backward_triton(dy: Tensor, packed: Tensor, channels_last: bool, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`relu_backward_reference` in one pass; equal bit for bit."""
    dy = dense_as(dy, channels_last)
    dx = torch.empty_like(dy)
    launch.run(_relu_backward_kernel, grid_of(dy, config), dy, packed, dx, dy.numel(), **config)
    return dx
