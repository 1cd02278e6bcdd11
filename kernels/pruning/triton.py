"""Triton kernels of block-sparse pruning: block scores, copying of the kept blocks, and decoding.

    encode    reads x once for the scores, and the kept blocks once more for the values. PyTorch's stable sorts select the blocks on the
              device, so nothing waits for the host. x needs no copy: its rows may lie on two levels of strides, as those of any view of
              [B, T, F] or of its transpose do.
    decode    writes x~ once. Dropped blocks are written as zeros, not filled first and overwritten later.

Kernels that read blocks find them by a map [down, across] of slots in `values`, -1 for dropped blocks: 4 bytes per block.

Shapes as in reference.py. Rows and columns are below 2^31 each; the number of elements may be larger.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, next_power_of_2, tl, triton
from actpress.kernels.common.rounding import saturate
from actpress.kernels.pruning.reference import Grid, select_reference

# TILE: elements of a program.
SCORES_CONFIGS: tuple[launch.Config, ...] = ({"TILE": 4096, "num_warps": 4}, {"TILE": 8192, "num_warps": 8})
TAKE_CONFIGS: tuple[launch.Config, ...] = ({"TILE": 2048, "num_warps": 4}, {"TILE": 4096, "num_warps": 4})
DECODE_CONFIGS: tuple[launch.Config, ...] = ({"TILE": 4096, "num_warps": 4}, {"TILE": 2048, "num_warps": 4})


@triton.jit
def row_offset(row, size, outer, inner, TWO_LEVELS: tl.constexpr):
    """Offset of the first element of a row. Rows come in groups of `size`: groups are `outer` apart, rows of a group `inner` apart."""
    if TWO_LEVELS:
        return (row // size).to(tl.int64) * outer + (row % size).to(tl.int64) * inner
    return row.to(tl.int64) * inner


@triton.jit
def _scores_kernel(
    x_ptr,
    scores_ptr,
    rows,
    columns,
    size,
    outer,
    inner,
    column_stride,
    down,
    across,
    TWO_LEVELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TH: tl.constexpr,
    BH: tl.constexpr,
    TW: tl.constexpr,
    BW: tl.constexpr,
):
    """A program reads TH x TW blocks, in pieces of BH x BW of each."""
    tiles = tl.cdiv(across, TW)
    i = tl.program_id(0) // tiles * TH
    j = tl.program_id(0) % tiles * TW
    r = tl.arange(0, TH * BH)
    c = tl.arange(0, TW * BW)
    total = tl.zeros([TH * BH, TW * BW], dtype=tl.float32)
    for top in range(0, HEIGHT, BH):
        # Where a piece is as high, or wide, as the block, the compiler must see that neighbours are contiguous.
        row = i * HEIGHT + r if BH == HEIGHT else (i + r // BH) * HEIGHT + top + r % BH
        row_inside = (row < rows) & (top + r % BH < HEIGHT)
        x_row_ptr = x_ptr + row_offset(row, size, outer, inner, TWO_LEVELS)
        for left in range(0, WIDTH, BW):
            column = j * WIDTH + c if BW == WIDTH else (j + c // BW) * WIDTH + left + c % BW
            column_inside = (column < columns) & (left + c % BW < WIDTH)
            x = tl.load(
                x_row_ptr[:, None] + column.to(tl.int64)[None, :] * column_stride,
                mask=row_inside[:, None] & column_inside[None, :],
                other=0.0,
            )
            total += tl.abs(x.to(tl.float32))
    total = tl.sum(tl.sum(tl.reshape(total, [TH, BH, TW, BW]), axis=3), axis=1)
    block_row = i + tl.arange(0, TH)[:, None]
    block_column = j + tl.arange(0, TW)[None, :]
    mean = tl.div_rn(total, tl.full([TH, TW], HEIGHT * WIDTH, tl.float32))
    inside = (block_row < down) & (block_column < across)
    tl.store(scores_ptr + block_row * across + block_column, mean, mask=inside)


@triton.jit
def _take_kernel(
    x_ptr,
    index_ptr,
    weight_ptr,
    values_ptr,
    rows,
    columns,
    size,
    outer,
    inner,
    column_stride,
    across,
    kept,
    TWO_LEVELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
):
    """A program copies COUNT kept blocks, in pieces of BH x BW of each."""
    slot = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    position = tl.load(index_ptr + slot, mask=slot < kept, other=0)
    weight = tl.load(weight_ptr + slot, mask=slot < kept, other=0.0) if weight_ptr is not None else None
    values_ptr += slot.to(tl.int64)[:, None, None] * (HEIGHT * WIDTH)
    for top in range(0, HEIGHT, BH):
        h = top + tl.arange(0, BH)
        row = ((position // across).to(tl.int64)[:, None] * HEIGHT + h[None, :]).to(tl.int32)  # [COUNT, BH]
        x_row_ptr = x_ptr + row_offset(row, size, outer, inner, TWO_LEVELS)
        for left in range(0, WIDTH, BW):
            w = left + tl.arange(0, BW)
            column = (position % across).to(tl.int64)[:, None] * WIDTH + w[None, :]  # [COUNT, BW]
            in_block = (slot < kept)[:, None, None] & (h < HEIGHT)[None, :, None] & (w < WIDTH)[None, None, :]
            x = tl.load(
                x_row_ptr[:, :, None] + (column * column_stride)[:, None, :],
                mask=in_block & (row < rows)[:, :, None] & (column < columns)[:, None, :],
                other=0.0,
            )
            if weight_ptr is not None:
                weighted = x.to(tl.float32) * weight[:, None, None]
                x = tl.where(x - x == 0, saturate(weighted, x_ptr.dtype.element_ty), weighted)
            tl.store(values_ptr + h[None, :, None] * WIDTH + w[None, None, :], x, mask=in_block)


@triton.jit
def _map_kernel(index_ptr, map_ptr, kept, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = tl.load(index_ptr + slot, mask=slot < kept, other=0)
    tl.store(map_ptr + position, slot, mask=slot < kept)


@triton.jit
def _decode_kernel(
    values_ptr,
    map_ptr,
    x_ptr,
    rows,
    columns,
    down,
    across,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TH: tl.constexpr,
    BH: tl.constexpr,
    TW: tl.constexpr,
    BW: tl.constexpr,
):
    """A program writes TH x TW blocks, in pieces of BH x BW of each; tiles are [TH, BH, TW, BW]."""
    tiles = tl.cdiv(across, TW)
    i = tl.program_id(0) // tiles * TH + tl.arange(0, TH)
    j = tl.program_id(0) % tiles * TW + tl.arange(0, TW)
    known = (i < down)[:, None] & (j < across)[None, :]
    slot = tl.load(map_ptr + i[:, None] * across + j[None, :], mask=known, other=-1)[:, None, :, None]
    values_ptr += slot.to(tl.int64) * (HEIGHT * WIDTH)
    for top in range(0, HEIGHT, BH):
        h = top + tl.arange(0, BH)
        row = i[:, None] * HEIGHT + h[None, :]  # [TH, BH]
        row_inside = ((h < HEIGHT)[None, :] & (row < rows))[:, :, None, None]
        for left in range(0, WIDTH, BW):
            w = left + tl.arange(0, BW)
            column = j[:, None] * WIDTH + w[None, :]  # [TW, BW]
            inside = row_inside & ((w < WIDTH)[None, :] & (column < columns))[None, None, :, :]
            in_block = h[None, :, None, None] * WIDTH + w[None, None, None, :]
            x = tl.load(values_ptr + in_block, mask=inside & (slot >= 0), other=0.0)
            offset = (row.to(tl.int64) * columns)[:, :, None, None] + column[None, None, :, :]
            tl.store(x_ptr + offset, x, mask=inside)


class Rows(NamedTuple):
    """Strides of a matrix whose rows lie on at most two levels, see row_offset."""

    size: int
    outer: int
    inner: int
    two_levels: bool


def matrix(x: Tensor) -> tuple[Tensor, Rows]:
    """x [..., C] and the strides of its rows. A view that would need more than two levels is copied."""
    levels: list[tuple[int, int]] = []
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if levels and levels[-1][1] == size * stride:
            levels[-1] = (levels[-1][0] * size, stride)
        elif size != 1:
            levels.append((size, stride))
    if len(levels) > 2:
        return matrix(x.contiguous())
    (_, outer), (size, inner) = [(1, 0), (1, 0), *levels][-2:]
    return x, Rows(size, outer, inner, len(levels) == 2)


def _tiling(grid: Grid, tile: int, rows_contiguous: bool = False) -> dict[str, int]:
    """How a program covers blocks: TH x TW blocks, of each of which it reads pieces of BH x BW.

    A piece spans up to 128 elements along memory. A program holds `tile` elements at a time, or the matrix, if that is smaller.
    """
    along, other = (grid.height, grid.down), (grid.width, grid.across)
    along, other = (along, other) if rows_contiguous else (other, along)

    def fit(block: int, blocks: int, limit: int) -> tuple[int, int]:
        piece = min(next_power_of_2(block), limit)
        return piece, min(next_power_of_2(blocks), limit // piece)

    along = fit(*along, min(128, tile))
    other = fit(*other, tile // (along[0] * along[1]))
    (bh, th), (bw, tw) = (along, other) if rows_contiguous else (other, along)
    return {"TH": th, "BH": bh, "TW": tw, "BW": bw}


def block_scores_triton(x: Tensor, grid: Grid, config: launch.Config = SCORES_CONFIGS[0]) -> Tensor:
    """`block_scores_reference` of x [..., C] of any strides, in one read: fp32 [n].

    Differs in the order of sums: first over a piece of a block, then over pieces. Both are within bh * bw roundings of 2^-24 of the exact
    mean, and equal where sums are exact. Among scores that close, another block may be selected.
    """
    x, strides = matrix(x)
    scores = x.new_empty(grid.down * grid.across, dtype=torch.float32)
    tiles = _tiling(grid, config["TILE"], rows_contiguous=strides.inner == 1 and x.stride(-1) != 1)
    launch.run(
        _scores_kernel,
        (cdiv(grid.down, tiles["TH"]) * cdiv(grid.across, tiles["TW"]),),
        *(x, scores, grid.rows, grid.columns, *strides[:3], x.stride(-1), grid.down, grid.across),
        TWO_LEVELS=strides.two_levels,
        HEIGHT=grid.height,
        WIDTH=grid.width,
        **tiles,
        **options_of(config),
    )
    return scores


def take_triton(
    x: Tensor, grid: Grid, index: Tensor, weight: Tensor | None = None, config: launch.Config = TAKE_CONFIGS[0]
) -> Tensor:
    """`take_reference` of x [..., C] of any strides, int32 index [K] and fp32 weight [K]. Reads only these blocks; equal bit for bit.

    If a row of a block is shorter than a memory sector, 32 bytes, the rest of the sector is read in vain.
    """
    index, (x, strides) = index.contiguous(), matrix(x)
    values = x.new_empty(index.numel(), grid.height, grid.width)
    bw = min(next_power_of_2(grid.width), 128)
    bh = min(next_power_of_2(grid.height), config["TILE"] // bw)
    count = config["TILE"] // (bh * bw)
    launch.run(
        _take_kernel,
        (cdiv(index.numel(), count),),
        *(x, index, weight, values, grid.rows, grid.columns, *strides[:3], x.stride(-1), grid.across),
        index.numel(),
        TWO_LEVELS=strides.two_levels,
        HEIGHT=grid.height,
        WIDTH=grid.width,
        COUNT=count,
        BH=bh,
        BW=bw,
        **options_of(config),
    )
    return values


def encode_by_kernels(
    x: Tensor, height: int, width: int, kept: int, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`encode_reference` of x [..., C] of any strides. Differs as `block_scores_triton` does: in the selection among nearly equal scores,
    and in the last bits of a sample's weights.

    PyTorch selects, by two sorts: of n fp32 scores and of K positions. They are radix sorts of about seven and eleven launches, which pass
    4 and 8 times over key and position: about 120 bytes per block and 260 per kept block, or 170 per block at 80%. An 8x8 block of fp32
    has 256 bytes. A sample sorts n fp64 numbers and runs about 45 operations, most of them on all n: about 800 bytes per block.
    """
    if x.numel() == 0:
        return empty_blocks(x, height, width, 0)
    grid = Grid(x.shape[:-1].numel(), x.shape[-1], height, width)
    index, weight = select_reference(block_scores_triton(x, grid), kept, noise)
    index = index.to(torch.int32)
    return take_triton(x, grid, index, weight), index


def empty_blocks(x: Tensor, height: int, width: int, kept: int) -> tuple[Tensor, Tensor]:
    """Uninitialised values and index of `kept` blocks of x."""
    return x.new_empty(kept, height, width), x.new_empty(kept, dtype=torch.int32)


def slot_map(index: Tensor, grid: Grid) -> Tensor:
    """Positions [K] -> for each block of the grid its slot in `values`, int32 [n]; -1 for dropped blocks."""
    slots = index.new_full((grid.down * grid.across,), -1)
    programs = (cdiv(index.numel(), 1024),)
    launch.run(_map_kernel, programs, index.contiguous(), slots, index.numel(), BLOCK=1024, num_warps=4)
    return slots


def decode_triton(
    values: Tensor, index: Tensor, rows: int, columns: int, config: launch.Config = DECODE_CONFIGS[0]
) -> Tensor:
    """`decode_reference` [rows, columns]: one write of x~, one read of the kept blocks; equal bit for bit.

    The slot map moves 8 bytes per block and 8 per kept block in addition, 4% of an 8x8 block in fp32.
    """
    grid = Grid(rows, columns, *values.shape[1:])
    x = values.new_empty(rows, columns)
    if x.numel() == 0:
        return x
    tiles = _tiling(grid, config["TILE"])
    launch.run(
        _decode_kernel,
        (cdiv(grid.down, tiles["TH"]) * cdiv(grid.across, tiles["TW"]),),
        *(values.contiguous(), slot_map(index, grid), x, rows, columns, grid.down, grid.across),
        HEIGHT=grid.height,
        WIDTH=grid.width,
        **tiles,
        **options_of(config),
    )
    return x


def options_of(config: launch.Config) -> dict[str, int]:
    """The launch options of a configuration."""
    return {name: config[name] for name in ("num_warps", "num_stages") if name in config}
