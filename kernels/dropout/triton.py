"""Dropout with a mask of one bit per element: Triton kernels and their launchers."""

import math

import numpy as np
import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.layout import dense, dense_as
from actpress.kernels.masks.triton import CONFIGS, empty_packed, grid_of, load_mask, tile


def _scale(x: Tensor, p: float) -> float:
    """The factor by which the reference multiplies."""
    return 1 / (1 - p) if x.is_cuda else torch.ones((), dtype=x.dtype, device="cpu").div_(1 - p).item()


@triton.jit
def _keep8(seed, group, dropped):
    """noise.uniform8(seed, group) >= p, packed: int64 [G] -> int32 [G], 0 .. 255.

    Noise is compared as 16-bit integers, of which the first `dropped` are below p: a thread makes whole bytes and exchanges nothing.
    """
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    words = tl.philox(seed, low, high, low * 0, low * 0, n_rounds=7)
    keep = (low * 0).to(tl.int32)
    for i in tl.static_range(4):
        keep |= ((words[i] & 0xFFFF).to(tl.int32) >= dropped).to(tl.int32) << (2 * i)
        keep |= ((words[i] >> 16).to(tl.int32) >= dropped).to(tl.int32) << (2 * i + 1)
    return keep


@triton.jit
def _dropout_kernel(x_ptr, y_ptr, packed_ptr, seed_ptr, dropped, scale, count, GROUPS: tl.constexpr):
    first, element, exists, group, group_exists = tile(count, GROUPS)
    x = tl.load(x_ptr + first * 8 + element, mask=exists, other=0.0)
    packed = _keep8(tl.load(seed_ptr), first + group, dropped)
    # a gather: with a reshape in its place the compiler draws the noise again in the layout of x, for each half of a group in fp32
    keep = (tl.gather(packed, element // 8, axis=0) >> (element % 8)) & 1
    tl.store(y_ptr + first * 8 + element, x.to(tl.float32) * tl.where(keep != 0, scale, 0.0), mask=exists)
    if packed_ptr is not None:
        members = tl.minimum(tl.maximum(count - (first + group) * 8, 0), 8).to(tl.int32)
        tl.store(packed_ptr + first + group, (packed & ((1 << members) - 1)).to(tl.uint8), mask=group_exists)


@triton.jit
def _dropout_backward_kernel(dy_ptr, packed_ptr, dx_ptr, scale, count, GROUPS: tl.constexpr):
    first, element, exists, _, _ = tile(count, GROUPS)
    keep = load_mask(packed_ptr + first, element, exists)
    dy = tl.load(dy_ptr + first * 8 + element, mask=exists, other=0.0)
    tl.store(dx_ptr + first * 8 + element, dy.to(tl.float32) * tl.where(keep != 0, scale, 0.0), mask=exists)


def dropout_triton(x: Tensor, p: float, seed: Tensor, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`dropout_reference` in one pass, with the noise of noise.uniform8; equal bit for bit given the same noise."""
    x = dense(x)
    packed = empty_packed(x)
    return _draw_and_scale(x, packed, p, seed, config), packed


def dropout_backward_triton(
    dy: Tensor, packed: Tensor, p: float, channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`dropout_backward_reference` in one pass; equal bit for bit."""
    dy = dense_as(dy, channels_last)
    dx = torch.empty_like(dy)
    launch.run(_dropout_backward_kernel, grid_of(dy, config), dy, packed, dx, _scale(dy, p), dy.numel(), **config)
    return dx


def dropout_backward_regenerated_triton(
    dy: Tensor, p: float, seed: Tensor, channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`dropout_backward_regenerated_reference` in one pass, with the noise of noise.uniform8; equal bit for bit given the same noise."""
    return _draw_and_scale(dense_as(dy, channels_last), None, p, seed, config)


def _draw_and_scale(x: Tensor, packed: Tensor | None, p: float, seed: Tensor, config: launch.Config) -> Tensor:
    y = torch.empty_like(x)
    dropped = math.ceil(float(np.float32(p)) * 65536 - 0.5)  # the number of i in 0 .. 65535 with (i + 1/2) / 65536 < p
    launch.run(_dropout_kernel, grid_of(x, config), x, y, packed, seed, dropped, _scale(x, p), x.numel(), **config)
    return y
