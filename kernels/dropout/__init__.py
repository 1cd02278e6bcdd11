"""Dropout that keeps one bit per element, or nothing but the seed its mask is drawn from.

Stock PyTorch keeps a bool per element on CUDA and the mask in the input's dtype on the CPU. Packed to bits the mask stays exact. One that
the kernel draws itself (Philox, see noise.py) can also be drawn again in the backward pass, but is another draw than stock dropout's.

y = x * mask / (1 - p), rounded as stock dropout rounds on x's device.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.layout import dense, dense_as, is_channels_last
from actpress.kernels.common.noise import uniform_from, uniform_reference
from actpress.kernels.masks import (
    CONFIGS,
    empty_packed,
    grid_of,
    load_mask,
    pack_mask_reference,
    tile,
    unpack_mask_reference,
)


def dropout_reference(x: Tensor, noise: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x of any shape, noise fp32 of its shape -> (x / (1 - p) where noise >= p, else x * 0; packed mask of the former)."""
    mask = noise >= p
    return _survivors(x, mask, p), pack_mask_reference(mask)


def dropout_backward_reference(dy: Tensor, packed: Tensor, p: float, channels_last: bool) -> Tensor:
    """dx = dy / (1 - p) where the mask is set, else dy * 0."""
    return _survivors(dy, unpack_mask_reference(packed, dy.shape, channels_last), p)


def dropout_backward_regenerated_reference(dy: Tensor, noise: Tensor, p: float) -> Tensor:
    """dx from the noise of the forward pass."""
    return _survivors(dy, noise >= p, p)


def _survivors(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """x * mask / (1 - p). The CPU rounds 1 / (1 - p) to x's dtype, in which stock dropout keeps its mask there; CUDA has it in fp32."""
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - p))
    return x * mask.to(x.dtype).div_(1 - p)


def _scale(x: Tensor, p: float) -> float:
    """The factor by which `_survivors` multiplies."""
    return 1 / (1 - p) if x.is_cuda else torch.ones((), dtype=x.dtype, device="cpu").div_(1 - p).item()


@triton.jit
def _keep8(seed, group, dropped):
    """noise.uniform8(seed, group) >= p, packed: int64 [G] -> int32 [G], 0 .. 255. Compared as 16-bit integers, of which the first `dropped`
    are below p, so that neither noise nor mask leaves the thread before it is a byte."""
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
    dropped = math.ceil(float(np.float32(p)) * 65536 - 0.5)  # how many i in 0 .. 65535 have (i + 1/2) / 65536 < p
    launch.run(_dropout_kernel, grid_of(x, config), x, y, packed, seed, dropped, _scale(x, p), x.numel(), **config)
    return y


@torch.library.custom_op("actpress::dropout", mutates_args=())
def _dropout(x: Tensor, p: float, seed: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    x = dense_as(x, channels_last)
    return dropout_reference(x, uniform_from(seed, x), p)


@_dropout.register_fake
def _(x: Tensor, p: float, seed: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_as(x, channels_last)), empty_packed(x)


launch.on_cuda(_dropout, lambda x, p, seed, channels_last: dropout_triton(dense_as(x, channels_last), p, seed))


@torch.library.custom_op("actpress::dropout_backward", mutates_args=())
def _dropout_backward(dy: Tensor, packed: Tensor, p: float, channels_last: bool) -> Tensor:
    return dropout_backward_reference(dense_as(dy, channels_last), packed, p, channels_last)


@_dropout_backward.register_fake
def _(dy: Tensor, packed: Tensor, p: float, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_dropout_backward, dropout_backward_triton)


@torch.library.custom_op("actpress::dropout_backward_regenerated", mutates_args=())
def _dropout_backward_regenerated(dy: Tensor, p: float, seed: Tensor, channels_last: bool) -> Tensor:
    dy = dense_as(dy, channels_last)
    return dropout_backward_regenerated_reference(dy, uniform_from(seed, dy), p)


@_dropout_backward_regenerated.register_fake
def _(dy: Tensor, p: float, seed: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_dropout_backward_regenerated, dropout_backward_regenerated_triton)


def dropout(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Dropout with a mask drawn from `seed`, for those who do not need the very mask that stock dropout would draw.

    x of any shape, strides and floating dtype; p, the probability of zero, met to 2^-17; seed int64 [1] on x's device, not negative.
    Returns (x * mask / (1 - p), the mask, uint8 [ceil(numel / 8)], in y's memory order): for dropout_backward, or drop the mask, keep the
    seed and take dropout_backward_regenerated. A seed gives one mask on all GPUs, another on the CPU. Raises ValueError unless 0 <= p < 1.
    """
    _check(p)
    return _dropout(x, p, seed, is_channels_last(x))  # on the CPU too: compiled code cannot read what the seed holds


def dropout_backward(dy: Tensor, packed: Tensor, p: float, channels_last: bool) -> Tensor:
    """dy of any strides, the packed mask and whether it lies in channels_last order -> dx = dy * mask / (1 - p)."""
    run = launch.way(_dropout_backward, dy) if launch.on_gpu(dy) else dropout_backward_reference
    return run(dy, packed, p, channels_last)


def dropout_backward_regenerated(dy: Tensor, p: float, seed: Tensor, channels_last: bool) -> Tensor:
    """dx of `dropout(x, p, seed)` from nothing but the seed. dy of any strides; channels_last: whether y was. ValueError as there."""
    _check(p)
    return _dropout_backward_regenerated(dy, p, seed, channels_last)


def _check(p: float) -> None:
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p={p!r}, allowed: 0 <= p < 1")


def cases() -> list[launch.Case]:
    """The hidden layer of ViT-B at batch 64: 64 x 197 x 3072."""
    p = 0.1

    def inputs(*shape: int) -> Callable[[torch.dtype, str], tuple]:
        return lambda dtype, device: (torch.randn(shape, dtype=dtype, device=device), p, seed(device))

    def inputs_regenerated(*shape: int) -> Callable[[torch.dtype, str], tuple]:
        return lambda dtype, device: (*inputs(*shape)(dtype, device), False)

    def inputs_backward(*shape: int) -> Callable[[torch.dtype, str], tuple]:
        def make(dtype: torch.dtype, device: str) -> tuple:
            packed = torch.randint(256, (packed_bytes(math.prod(shape), 1),), dtype=torch.uint8, device=device)
            return torch.randn(shape, dtype=dtype, device=device), packed, p, False

        return make

    def seed(device: str) -> Tensor:
        return torch.full((1,), 2**62 + 1, dtype=torch.int64, device=device)

    def noise(x: Tensor, seed: Tensor) -> Tensor:
        return uniform_reference(int(seed), x.numel()).view(x.shape).to(x.device)

    def dropout_of(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        return dropout_reference(x, noise(x, seed), p)

    def regenerated_of(dy: Tensor, p: float, seed: Tensor, channels_last: bool) -> Tensor:
        return dropout_backward_regenerated_reference(dy, noise(dy, seed), p)

    def stock(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        return torch.native_dropout(x, p, True)

    def floor(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + packed_bytes(x.numel(), 1)

    def floor_regenerated(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + 8

    def seeds(x: Tensor) -> int:  # each program reads it
        return 8 * grid_of(x, CONFIGS[0])[0]

    def case(name: str, make: Callable, *rest: object, **more: object) -> launch.Case:
        return launch.Case(name, make(64, 197, 3072), *rest, CONFIGS, tiny=make(3, 5, 67), **more)

    backward = (dropout_backward_triton, dropout_backward_reference, floor, floor)
    drawn = (dropout_triton, dropout_of, lambda x, *_: floor(x) + seeds(x), floor)
    regenerated = (
        dropout_backward_regenerated_triton,
        regenerated_of,
        lambda x, *_: floor_regenerated(x) - 8 + seeds(x),
        floor_regenerated,
    )
    return [
        case("dropout", inputs, *drawn, stock=stock),
        case("dropout_backward", inputs_backward, *backward),
        case("dropout_backward_regenerated", inputs_regenerated, *regenerated),
    ]
