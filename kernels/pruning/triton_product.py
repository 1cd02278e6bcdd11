"""Triton kernel of block-sparse pruning's weight gradient: dW = dY^T x~ [O, C] on tensor cores, from the kept blocks alone.

A program computes OUTPUTS outputs of a GROUP of neighbouring block columns of dW. It visits, in ascending order, the block rows in which
at least one of these columns keeps a block. It gathers their rows of dY, DEPTH bytes at a time, contiguous along O, and multiplies them
with the kept blocks; zeros take the place of dropped blocks. Programs that run at the same time share rows of dY through the L2 cache.

With GROUP = 1 only kept blocks are multiplied. But then each element of dY that is read meets only bw columns, 2 * bw operations, where a
tensor core needs hundreds. The L2 cache is the limit:

    dY through L2        visited * bh * O * itemsize. `visited` is the number of block rows visited, summed over groups: K for GROUP = 1;
                         about down * across / GROUP * (1 - sparsity^GROUP) if blocks are dropped at random
    values through L2    K * bh * bw * itemsize * ceil(O / OUTPUTS)
    dense product        dY: R * O * itemsize * ceil(C / tile), tiles of 128 to 256 columns

For 8x8 at 80% and C = 384, GROUP = 1 moves dY 9.6 times, a dense product 1.5 to 3 times. So tensor cores get groups as wide as a dense
tile: 2.9 times here. If blocks are dropped at random, groups of 128 columns visit .97 of the block rows for 8x8, .83 for 16x16, .59 for
32x32 and .2 for blocks that wide; fewer if whole rows or columns are dropped. Small blocks therefore cost nearly the arithmetic of the
dense product, without its reads of x. CUDA cores (fp32 without tf32) are limited by arithmetic and get GROUP = 1.

Block rows are split into segments with one program each. So there are enough programs, and a full block column does not delay the rest.
Partial sums are added in the order of segments. Their number follows from shapes and configuration alone: dW is deterministic.

Shapes as in reference.py. Rows and columns are below 2^31 each; the number of elements may be larger.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, next_power_of_2, tl, triton
from actpress.kernels.pruning.reference import Grid
from actpress.kernels.pruning.triton import matrix, options_of, row_offset, slot_map

# A program computes at most OUTPUTS x COLUMNS of dW, with block columns in groups of up to GROUPED columns, from DEPTH bytes of gathered
# rows at a time. There are about PROGRAMS programs. SPLIT: an fp32 product is computed as three tf32 products.
TENSOR_CONFIGS: tuple[launch.Config, ...] = (
    {"OUTPUTS": 128, "COLUMNS": 128, "GROUPED": 128, "DEPTH": 128, "PROGRAMS": 264, "num_warps": 8, "num_stages": 3},
    {"OUTPUTS": 128, "COLUMNS": 64, "GROUPED": 64, "DEPTH": 128, "PROGRAMS": 528, "num_warps": 4, "num_stages": 3},
    {"OUTPUTS": 128, "COLUMNS": 128, "GROUPED": 8, "DEPTH": 128, "PROGRAMS": 528, "num_warps": 4, "num_stages": 3},
)
EXACT_CONFIGS: tuple[launch.Config, ...] = (
    {"OUTPUTS": 128, "COLUMNS": 128, "GROUPED": 8, "DEPTH": 128, "PROGRAMS": 1152, "num_warps": 8, "num_stages": 3},
    {"OUTPUTS": 128, "COLUMNS": 64, "GROUPED": 8, "DEPTH": 64, "PROGRAMS": 1152, "num_warps": 4, "num_stages": 4},
    {**TENSOR_CONFIGS[0], "SPLIT": 1},
)


@triton.jit
def _lists_kernel(
    map_ptr,
    rows_ptr,
    slots_ptr,
    counts_ptr,
    down,
    across,
    groups,
    segment,
    HEIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """List the block rows of one segment in which one group of block columns keeps a block: their first rows, and the slots kept there."""
    group = tl.program_id(0)
    piece = tl.program_id(1).to(tl.int64) * groups + group
    g = tl.arange(0, GROUP)
    j = group * GROUP + g
    count = tl.zeros([], dtype=tl.int64)
    for start in range(0, segment, CHUNK):
        i = start + tl.arange(0, CHUNK)
        row = tl.program_id(1) * segment + i
        inside = ((i < segment) & (row < down))[:, None] & (j < across)[None, :]
        slot = tl.load(map_ptr + row.to(tl.int64)[:, None] * across + j[None, :], mask=inside, other=-1)
        visited = (tl.max(slot, axis=1) >= 0).to(tl.int32)
        place = piece * segment + count + tl.cumsum(visited, axis=0) - 1
        tl.store(rows_ptr + place, row * HEIGHT, mask=visited != 0)
        tl.store(slots_ptr + place[:, None] * GROUP + g[None, :], slot, mask=(visited != 0)[:, None])
        count += tl.sum(visited, axis=0)
    tl.store(counts_ptr + piece, count)


@triton.jit
def _weight_grad_kernel(
    values_ptr,
    rows_ptr,
    slots_ptr,
    counts_ptr,
    dy_ptr,
    dw_ptr,
    rows,
    columns,
    outputs,
    size,
    outer,
    inner,
    groups,
    segment,
    TWO_LEVELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    BO: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute [BO, GROUP * W] of the part of dW that one segment of block rows contributes. TILES: tiles of W columns in a block."""
    group = tl.program_id(0) // TILES
    left = tl.program_id(0) % TILES * W
    w = left + tl.arange(0, W)
    o = tl.program_id(1) * BO + tl.arange(0, BO)
    piece = tl.program_id(2).to(tl.int64) * groups + group
    count = (tl.load(counts_ptr + piece).to(tl.int64) * HEIGHT).to(tl.int32)  # rows to gather
    rows_ptr += piece * segment
    slots_ptr += piece * segment * GROUP
    dw = tl.zeros([GROUP * W, BO], dtype=tl.float32)
    for start in range(0, count, BK):
        # Past the end, and past the edge of the matrix, the last row is read instead: it meets zeros.
        inside = start + tl.arange(0, BK) < count
        k = tl.minimum(start + tl.arange(0, BK), count - 1)
        entry, h = k // HEIGHT, k % HEIGHT
        first = tl.minimum(tl.load(rows_ptr + entry), rows - 1)  # changes nothing: bounds the loaded value
        dy_row_ptr = dy_ptr + row_offset(tl.minimum(first + h, rows - 1), size, outer, inner, TWO_LEVELS)
        if EVEN:
            dy = tl.load(dy_row_ptr[:, None] + o[None, :])
        else:
            dy = tl.load(dy_row_ptr[:, None] + o[None, :], mask=(o < outputs)[None, :], other=0.0)
        if GROUP == 1:  # two dimensions: a reshape costs CUDA cores their registers
            slot = tl.load(slots_ptr + entry, mask=inside, other=-1)
            x_row_ptr = values_ptr + (slot.to(tl.int64) * HEIGHT + h) * WIDTH
            x = tl.load(x_row_ptr[:, None] + w[None, :], mask=(slot >= 0)[:, None] & (w < WIDTH)[None, :], other=0.0)
        else:
            slot_ptr = slots_ptr + entry.to(tl.int64)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BK, GROUP]
            slot = tl.load(slot_ptr, mask=inside[:, None], other=-1)
            x_row_ptr = values_ptr + (slot.to(tl.int64) * HEIGHT + h[:, None]) * WIDTH
            mask = (slot >= 0)[:, :, None] & (w < WIDTH)[None, None, :]
            x = tl.reshape(tl.load(x_row_ptr[:, :, None] + w[None, None, :], mask=mask, other=0.0), [BK, GROUP * W])
        dw = tl.dot(tl.trans(x), dy, dw, input_precision=PRECISION)
    n = tl.arange(0, GROUP * W)
    column = (group * GROUP + n // W) * WIDTH + left + n % W
    inside = (o < outputs)[:, None] & ((left + n % W < WIDTH) & (column < columns))[None, :]
    row = tl.program_id(2).to(tl.int64) * outputs + o
    tl.store(dw_ptr + row[:, None] * columns + column[None, :], tl.trans(dw), mask=inside)


class Plan(NamedTuple):
    """How dW is divided among programs."""

    w: int  # columns of a program's tile within a block
    group: int  # block columns of a program
    groups: int
    tiles: int  # tiles of w columns in a block
    segment: int  # block rows of a program
    segments: int


def plan_of(grid: Grid, outputs: int, config: launch.Config) -> Plan:
    w = min(max(8, next_power_of_2(grid.width)), config["COLUMNS"])  # narrower operands do not compile for sm_90
    group = min(max(1, config["GROUPED"] // w), next_power_of_2(grid.across))
    groups, tiles = cdiv(grid.across, group), cdiv(grid.width, w)
    programs = max(1, groups * tiles * cdiv(outputs, config["OUTPUTS"]))
    segment = cdiv(grid.down, max(1, config["PROGRAMS"] // programs))
    return Plan(w, group, groups, tiles, segment, cdiv(grid.down, segment))


def is_exact(dtype: torch.dtype) -> bool:
    """Whether products have fp32's precision: torch.backends.cuda.matmul decides, as it does for stock PyTorch."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def weight_grad_triton(
    values: Tensor, index: Tensor, dy: Tensor, columns: int, config: launch.Config | None = None
) -> Tensor:
    """`weight_grad_reference` of values [K, bh, bw], index [K] and dy [..., O] -> dW [O, columns] fp32, with sums in fp32.

    Differs in the order of sums, and in their rounding on tensor cores: towards zero. Products of fp16 and bf16 are exact, as in the
    reference. Products of fp32 have fp32's precision and run on CUDA cores. Where torch.backends.cuda.matmul allows tf32, their factors are
    rounded to 11 bits: an error of up to 2^-10 each. SPLIT (three tf32 products) leaves about 2^-21. The default configuration depends on
    this precision alone.

    Reads no value on the host. A dy whose last dimension is not contiguous is copied; mixed dtypes are cast to fp32.
    """
    if 0 in (values.numel(), dy.numel()):
        return dy.new_zeros(dy.shape[-1], columns, dtype=torch.float32)
    if values.dtype != dy.dtype:
        values, dy = values.float(), dy.float()
    exact = is_exact(dy.dtype)
    config = config or (EXACT_CONFIGS if exact else TENSOR_CONFIGS)[0]
    precision = ("tf32x3" if config.get("SPLIT") else "ieee") if exact else "tf32"
    dy, strides = matrix(dy if dy.stride(-1) == 1 else dy.contiguous())
    grid, outputs = Grid(dy.shape[:-1].numel(), columns, *values.shape[1:]), dy.shape[-1]

    plan = plan_of(grid, outputs, config)
    dw = dy.new_empty(plan.segments, outputs, columns, dtype=torch.float32)
    launch.run(
        _weight_grad_kernel,
        (plan.groups * plan.tiles, cdiv(outputs, config["OUTPUTS"]), plan.segments),
        *(values.contiguous(), *_visited(index, grid, plan), dy, dw),
        *(grid.rows, columns, outputs, *strides[:3], plan.groups, plan.segment),
        TWO_LEVELS=strides.two_levels,
        HEIGHT=grid.height,
        WIDTH=grid.width,
        GROUP=plan.group,
        W=plan.w,
        TILES=plan.tiles,
        BO=config["OUTPUTS"],
        BK=config["DEPTH"] // dy.itemsize,
        EVEN=outputs % config["OUTPUTS"] == 0,
        PRECISION=precision,
        **options_of(config),
    )
    return dw.sum(0) if plan.segments > 1 else dw[0]


def _visited(index: Tensor, grid: Grid, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """For each segment and group: the first rows of the block rows to visit, their slots, and their number."""
    rows = index.new_empty(plan.segments, plan.groups, plan.segment)
    slots = index.new_empty(plan.segments, plan.groups, plan.segment, plan.group)
    counts = index.new_empty(plan.segments, plan.groups)
    launch.run(
        _lists_kernel,
        (plan.groups, plan.segments),
        *(slot_map(index, grid), rows, slots, counts, grid.down, grid.across, plan.groups, plan.segment),
        HEIGHT=grid.height,
        GROUP=plan.group,
        CHUNK=max(16, min(2048 // plan.group, next_power_of_2(plan.segment))),
        num_warps=8,
    )
    return rows, slots, counts
