"""Triton kernels of Few-Bit activations: the code alone, the output with the code, and the input gradient.

Each kernel reads its inputs once and writes its outputs once. A program handles GROUPS groups of eight elements, a byte of each bit plane.
"""

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, tl, triton
from actpress.kernels.common.layout import dense, dense_as
from actpress.kernels.few_bit.reference import BORDERS, code_bytes
from actpress.kernels.few_bit.tables import TABLES
from actpress.kernels.inverted.triton import activation

CONFIGS: tuple[launch.Config, ...] = (
    {"GROUPS": 128, "num_warps": 4},
    {"GROUPS": 256, "num_warps": 4},
    {"GROUPS": 256, "num_warps": 8},
)


@triton.jit
def _one_of_2(b0, T: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    """T[FIRST + STEP * n], where b0, b1, ... are the bits of n, lowest first: one select. _one_of_4 takes three, _one_of_8 seven."""
    return tl.where(b0, T[FIRST + STEP], T[FIRST])


@triton.jit
def _one_of_4(b0, b1, T: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    return tl.where(b1, _one_of_2(b0, T, FIRST + 2 * STEP, STEP), _one_of_2(b0, T, FIRST, STEP))


@triton.jit
def _one_of_8(b0, b1, b2, T: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr):
    return tl.where(b2, _one_of_4(b0, b1, T, FIRST + 4 * STEP, STEP), _one_of_4(b0, b1, T, FIRST, STEP))


@triton.jit
def _byte(planes_ptr, i, group, count):
    """Pointer to the byte of a group in plane i. Plane BITS holds the NaN flags, one byte per chunk."""
    return planes_ptr + i * ((tl.full([], 7, tl.int64) + count) // 8) + group


@triton.jit
def _store_code(planes_ptr, x, group, count, BORDERS: tl.constexpr, BITS: tl.constexpr):
    """Store the code of x [G, 8], G a multiple of 128: the NaN flag of each chunk, and the interval of each element."""
    CHUNKS: tl.constexpr = x.numel // 1024
    nan = tl.max(tl.reshape((x != x).to(tl.int32), [CHUNKS, 1024]), axis=1)
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    tl.store(_byte(planes_ptr, BITS, chunk, count), nan.to(tl.uint8), mask=chunk * 1024 < count)
    _store_planes(planes_ptr, x, group, count, BORDERS, BITS)


@triton.jit
def _store_planes(planes_ptr, x, group, count, BORDERS: tl.constexpr, BITS: tl.constexpr):
    """Compute the code of x [G, 8], fp32, by binary search from its highest bit down, and store its bit planes.

    Each bit says on which side of a border x lies; the higher bits select the border. Bit i of a code goes to bit 8 * i of a word. The sum
    of the eight words of a group, each shifted by its element's position, then holds the group's byte of every plane.
    """
    HALF: tl.constexpr = 2 ** (BITS - 1)  # borders are counted from 0
    top = x >= BORDERS[HALF - 1]
    word = top.to(tl.uint32) << (8 * (BITS - 1))
    if BITS > 1:
        second = x >= _one_of_2(top, BORDERS, HALF // 2 - 1, HALF)
        word |= second.to(tl.uint32) << (8 * (BITS - 2))
    if BITS > 2:
        third = x >= _one_of_4(second, top, BORDERS, HALF // 4 - 1, HALF // 2)
        word |= third.to(tl.uint32) << (8 * (BITS - 3))
    if BITS > 3:
        last = x >= _one_of_8(third, second, top, BORDERS, HALF // 8 - 1, HALF // 4)
        word |= last.to(tl.uint32)
    planes = tl.sum(word << tl.arange(0, 8)[None, :].to(tl.uint32), axis=1)  # [G]
    for i in tl.static_range(BITS):
        tl.store(_byte(planes_ptr, i, group, count), (planes >> (8 * i)).to(tl.uint8), mask=group * 8 < count)


@triton.jit
def _plane(planes_ptr, i, group, count):
    """Bit i of the codes of a group, bool [G, 8]."""
    bits = tl.load(_byte(planes_ptr, i, group, count), mask=group * 8 < count, other=0).to(tl.int32)
    return ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0


@triton.jit
def _encode_kernel(x_ptr, planes_ptr, count, BORDERS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]  # [GROUPS, 8]
    x = tl.load(x_ptr + element, mask=element < count, other=-float("inf")).to(tl.float32)  # past the end: code 0
    _store_code(planes_ptr, x, group, count, BORDERS, BITS)


@triton.jit
def _forward_kernel(
    x_ptr,
    y_ptr,
    planes_ptr,
    count,
    FUNCTION: tl.constexpr,
    BORDERS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + element, mask=element < count, other=-float("inf")).to(tl.float32)
    tl.store(y_ptr + element, activation(x, FUNCTION, x_ptr.dtype.element_ty == tl.float32), mask=element < count)
    _store_code(planes_ptr, x, group, count, BORDERS, BITS)


@triton.jit
def _input_grad_kernel(
    dy_ptr, planes_ptr, dx_ptr, count, LEVELS: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr
):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    b0 = _plane(planes_ptr, 0, group, count)
    if BITS == 1:
        level = _one_of_2(b0, LEVELS, 0, 1)
    else:
        b1 = _plane(planes_ptr, 1, group, count)
        if BITS == 2:
            level = _one_of_4(b0, b1, LEVELS, 0, 1)
        else:
            b2 = _plane(planes_ptr, 2, group, count)
            level = _one_of_8(b0, b1, b2, LEVELS, 0, 1)
            if BITS == 4:
                b3 = _plane(planes_ptr, 3, group, count)
                level = tl.where(b3, _one_of_8(b0, b1, b2, LEVELS, 8, 1), level)
    dy = tl.load(dy_ptr + element, mask=element < count, other=0.0).to(tl.float32)
    nan = tl.load(_byte(planes_ptr, BITS, group // 128, count), mask=group * 8 < count, other=0)
    dx = tl.where(nan[:, None] != 0, float("nan"), level * dy)
    tl.store(dx_ptr + element, dx, mask=element < count)


def _grid(x: Tensor, config: launch.Config) -> tuple[int]:
    return (cdiv(x.numel(), 8 * config["GROUPS"]),)


def empty_code(x: Tensor, bits: int) -> Tensor:
    """An uninitialised code for x: uint8 [code_bytes]."""
    return x.new_empty(code_bytes(x.numel(), bits), dtype=torch.uint8)


def encode_triton(x: Tensor, function: str, bits: int, config: launch.Config = CONFIGS[0]) -> Tensor:
    """The code of `encode_reference` in one pass; equal bit for bit."""
    x = dense(x)
    code = empty_code(x, bits)
    borders = BORDERS[function, bits, x.dtype]
    launch.run(_encode_kernel, _grid(x, config), x, code, x.numel(), BORDERS=borders, BITS=bits, **config)
    return code


def forward_triton(x: Tensor, function: str, bits: int, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`forward_reference` in one pass. The code is equal bit for bit; y differs as that of inverted.triton.forward_triton does."""
    x = dense(x)
    y, code = torch.empty_like(x), empty_code(x, bits)
    constexprs = {"FUNCTION": function, "BORDERS": BORDERS[function, bits, x.dtype], "BITS": bits}
    launch.run(_forward_kernel, _grid(x, config), x, y, code, x.numel(), **constexprs, **config)
    return y, code


def input_grad_triton(
    dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`input_grad_reference` in one pass; equal bit for bit."""
    dy = dense_as(dy, channels_last)
    dx = torch.empty_like(dy)
    levels = TABLES[function][bits]["levels"]
    launch.run(_input_grad_kernel, _grid(dy, config), dy, code, dx, dy.numel(), LEVELS=levels, BITS=bits, **config)
    return dx
