"""The weight gradient of block-sparse pruning on a GPU: dW = dY^T x~ [O, C] on tensor cores, from the kept blocks alone.

One program owns OUTPUTS outputs and a GROUP of neighbouring block columns of dW. It walks the block rows in which at least one of these
keeps something, ascending; gathers their rows of dY, DEPTH bytes of them at a time, contiguous along O; and multiplies them with the kept
blocks, zeros standing in for dropped ones. Programs that run together share rows of dY through the L2 cache.

GROUP = 1 multiplies kept blocks only. But each element of dY that is read then meets only bw columns, 2 * bw operations, where a tensor
core wants hundreds: L2 is the limit.

    dY through L2        visited * bh * O * itemsize, where `visited` sums, over groups, the block rows each visits:
                         K at GROUP = 1; about down * across / GROUP * (1 - sparsity^GROUP) where blocks are dropped at random
    values through L2    K * bh * bw * itemsize * ceil(O / OUTPUTS)
    dense product        dY: R * O * itemsize * ceil(C / tile), tiles of 128 to 256 columns

For 8x8 at 80% and C = 384, GROUP = 1 moves dY 9.6 times, a dense product 1.5 to 3 times. Tensor cores therefore get groups as wide as a
dense tile, 2.9 times here. Groups of 128 columns visit .97 of the block rows for 8x8, .83 for 16x16, .59 for 32x32, .2 for blocks that
wide, if blocks are dropped at random; less where whole rows or columns are. Small blocks thus cost nearly the arithmetic of the dense
product, without its reads of x. CUDA cores (fp32 without tf32) are limited by arithmetic and get GROUP = 1.

Block rows are cut into segments, one program each, so that there are enough programs and a full block column does not hold up the
rest; partial sums are added in the order of segments. How many there are follows from shapes and configuration: dW is deterministic.

Shapes as in pruning.py. Rows and columns are below 2^31 each, elements need not be.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, next_power_of_2, tl, triton
from actpress.kernels.pruning import Blocks, Grid, block_grid, compute_dtype, weight_grad_reference
from actpress.kernels.pruning.encode_decode import matrix, options_of, random_blocks, row_offset, slot_map

# A program computes OUTPUTS x COLUMNS of dW at most, block columns grouped up to GROUPED columns, from DEPTH bytes of gathered rows at a
# time; there are about PROGRAMS of them. SPLIT: fp32 products as three of tf32.
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
    """Where, in one segment of block rows, one group of block columns keeps something: the first row, and the slots kept there."""
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
    """[BO, GROUP * W] of the part of dW that one segment of block rows contributes. TILES: of W columns in a block."""
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
        # Past the end, and past the matrix's edge, the last row stands in: it meets zeros.
        inside = start + tl.arange(0, BK) < count
        k = tl.minimum(start + tl.arange(0, BK), count - 1)
        entry, h = k // HEIGHT, k % HEIGHT
        first = tl.minimum(tl.load(rows_ptr + entry), rows - 1)  # no change, but a bound on what was loaded
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


class _Plan(NamedTuple):
    """How dW is divided among programs: groups of `group` block columns of w columns (`tiles` times, if a block is wider), and segments."""

    w: int
    group: int
    groups: int
    tiles: int
    segment: int  # block rows
    segments: int


def _plan(grid: Grid, outputs: int, config: launch.Config) -> _Plan:
    w = min(max(8, next_power_of_2(grid.width)), config["COLUMNS"])  # narrower operands do not compile for sm_90
    group = min(max(1, config["GROUPED"] // w), next_power_of_2(grid.across))
    groups, tiles = cdiv(grid.across, group), cdiv(grid.width, w)
    programs = max(1, groups * tiles * cdiv(outputs, config["OUTPUTS"]))
    segment = cdiv(grid.down, max(1, config["PROGRAMS"] // programs))
    return _Plan(w, group, groups, tiles, segment, cdiv(grid.down, segment))


def _exact(dtype: torch.dtype) -> bool:
    """Whether products are to be those of fp32: what torch.backends.cuda.matmul says of stock PyTorch's."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32"


def weight_grad_triton(
    values: Tensor, index: Tensor, dy: Tensor, columns: int, config: launch.Config | None = None
) -> Tensor:
    """`weight_grad_reference` of values [K, bh, bw], index [K] and dy [..., O] -> dW [O, columns] fp32, with sums in fp32.

    Differs in the order of sums, and on tensor cores in how they round: towards zero. Products of fp16 and bf16 are exact, as in the
    reference. Those of fp32 are fp32's, on CUDA cores, or, where torch.backends.cuda.matmul allows tf32, of factors cut to 11 bits: up to
    2^-10 of each. SPLIT, three tf32 products, leaves about 2^-21. The default configuration depends on this precision alone.

    Reads nothing on the host. A dy whose last dimension is not contiguous is copied; mixed dtypes are cast to fp32.
    """
    if 0 in (values.numel(), dy.numel()):
        return dy.new_zeros(dy.shape[-1], columns, dtype=torch.float32)
    if values.dtype != dy.dtype:
        values, dy = values.float(), dy.float()
    exact = _exact(dy.dtype)
    config = config or (EXACT_CONFIGS if exact else TENSOR_CONFIGS)[0]
    precision = ("tf32x3" if config.get("SPLIT") else "ieee") if exact else "tf32"
    dy, (size, outer, inner, two_levels) = matrix(dy if dy.stride(-1) == 1 else dy.contiguous())
    grid, outputs = Grid(dy.shape[:-1].numel(), columns, *values.shape[1:]), dy.shape[-1]

    w, group, groups, tiles, segment, segments = _plan(grid, outputs, config)
    visited = index.new_empty(segments, groups, segment)
    slots = index.new_empty(segments, groups, segment, group)
    counts = index.new_empty(segments, groups)
    chunk = max(16, min(2048 // group, next_power_of_2(segment)))
    launch.run(
        _lists_kernel,
        (groups, segments),
        *(slot_map(index, grid), visited, slots, counts, grid.down, grid.across, groups, segment),
        HEIGHT=grid.height,
        GROUP=group,
        CHUNK=chunk,
        num_warps=8,
    )
    dw = dy.new_empty(segments, outputs, columns, dtype=torch.float32)
    launch.run(
        _weight_grad_kernel,
        (groups * tiles, cdiv(outputs, config["OUTPUTS"]), segments),
        *(
            values.contiguous(),
            visited,
            slots,
            counts,
            dy,
            dw,
            grid.rows,
            columns,
            outputs,
            size,
            outer,
            inner,
            groups,
            segment,
        ),
        TWO_LEVELS=two_levels,
        HEIGHT=grid.height,
        WIDTH=grid.width,
        GROUP=group,
        W=w,
        TILES=tiles,
        BO=config["OUTPUTS"],
        BK=config["DEPTH"] // dy.itemsize,
        EVEN=outputs % config["OUTPUTS"] == 0,
        PRECISION=precision,
        **options_of(config),
    )
    return dw.sum(0) if segments > 1 else dw[0]


@torch.library.custom_op("actpress::prune_weight_grad", mutates_args=())
def _weight_grad(values: Tensor, index: Tensor, dy: Tensor, columns: int) -> Tensor:
    return weight_grad_reference(Blocks(values, index), *_as_matrix(values, dy, columns))


@_weight_grad.register_fake
def _(values: Tensor, index: Tensor, dy: Tensor, columns: int) -> Tensor:
    return dy.new_empty(dy.shape[-1], columns, dtype=compute_dtype(dy.dtype))


launch.on_cuda(_weight_grad, weight_grad_triton)


def weight_grad(blocks: Blocks, dy: Tensor, grid: Grid) -> Tensor:
    """dW = dY^T x~ [O, C] from the kept blocks and dy [..., O] of any strides. fp32 sums and result, fp64 for fp64."""
    if launch.on_gpu(blocks.values):
        return launch.way(_weight_grad, blocks.values)(*blocks, dy, grid.columns)
    return weight_grad_reference(blocks, dy.reshape(dy.shape[:-1].numel(), dy.shape[-1]), grid)


def _as_matrix(values: Tensor, dy: Tensor, columns: int) -> tuple[Tensor, Grid]:
    return dy.reshape(dy.shape[:-1].numel(), dy.shape[-1]), Grid(dy.shape[:-1].numel(), columns, *values.shape[1:])


def cases() -> list[launch.Case]:
    """Weight gradients of ResMLP-S12 at batch 128: fc1 (384 -> 1536) and fc2 (1536 -> 384) over 25088 tokens, blocks dropped at random.

    stock is the dense product, for which x comes along as the last input. "ieee" and "tf32" are two ways to multiply fp32.
    """

    def inputs(tokens: int, features: int, outputs: int, block: tuple[int, int], sparsity: float):
        def make(dtype: torch.dtype, device: str) -> tuple:
            x = torch.randn(tokens, features, dtype=dtype, device=device)
            dy = torch.randn(tokens, outputs, dtype=dtype, device=device)
            return *random_blocks(block_grid(x.shape, block), sparsity, dtype, device), dy, features, x

        return make

    def kernel(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor, config: launch.Config) -> Tensor:
        return weight_grad_triton(values, index, dy, columns, config)

    def reference(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> Tensor:
        return weight_grad_reference(Blocks(values, index), *_as_matrix(values, dy, columns))

    def stock(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> Tensor:
        return dy.T @ x

    def floor(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> int:
        return launch.nbytes(values, index, dy) + 4 * dy.shape[-1] * columns

    def flops(values: Tensor, index: Tensor, dy: Tensor, columns: int, x: Tensor) -> int:
        return 2 * values.numel() * dy.shape[-1]

    def with_tf32(function: Callable) -> Callable:
        def wrapped(*arguments, **options):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")
            try:
                return function(*arguments, **options)
            finally:
                torch.set_float32_matmul_precision(before)

        return wrapped

    found = []
    for layer, features, outputs in (("fc1", 384, 1536), ("fc2", 1536, 384)):
        for side, percent in itertools.product((8, 16, 32), (80, 90)):
            name = f"prune_weight_grad_{layer}_{side}x{side}_{percent}"
            # The code is that of 80%; at 90% other groups may be faster.
            tensor, exact = (
                (TENSOR_CONFIGS, EXACT_CONFIGS) if percent == 80 else (TENSOR_CONFIGS[::2], EXACT_CONFIGS[:1])
            )
            common = {
                "make": inputs(25088, features, outputs, (side, side), percent / 100),
                "reference": reference,
                "floor": floor,
                "flops": flops,
                "tiny": inputs(100, 72, 40, (side, side), percent / 100),
            }
            plain = {**common, "kernel": kernel, "stock": stock, "moved": weight_grad_bytes}
            halves = (torch.float16, torch.bfloat16)
            # Tolerances: 2500 to 5000 fp32 terms an element in another order, and rounded towards zero on tensor cores.
            found.append(launch.Case(name, configs=tensor, dtypes=halves, tolerance=2e-5, **plain))
            found.append(launch.Case(f"{name}_ieee", configs=exact, dtypes=(torch.float32,), tolerance=5e-6, **plain))
            if percent == 80:
                found.append(
                    launch.Case(
                        f"{name}_tf32",
                        kernel=with_tf32(kernel),
                        stock=with_tf32(stock),
                        moved=with_tf32(weight_grad_bytes),
                        configs=tensor,
                        dtypes=(torch.float32,),
                        tolerance=2e-3,  # factors cut to 11 bits: up to 2^-10 of each
                        **common,
                    )
                )
    return found


def weight_grad_bytes(values: Tensor, index: Tensor, dy: Tensor, columns: int, *_: object) -> int:
    """Device memory moved in the default configuration, at most: with all block rows on the lists of those visited.

    Rows of dY and values are counted once, although programs of several columns or outputs read them: those run together, and L2 serves
    them.
    """
    grid, outputs = _as_matrix(values, dy, columns)[1], dy.shape[-1]
    plan = _plan(grid, outputs, (EXACT_CONFIGS if _exact(dy.dtype) else TENSOR_CONFIGS)[0])
    slot_map_bytes = 4 * (2 * grid.down * grid.across + 2 * index.numel())  # filled, read; index read, slots set
    lists = 2 * 4 * plan.groups * (grid.down * (1 + plan.group) + plan.segments)  # written, read
    sums = 4 * outputs * columns * (2 * plan.segments + 1 if plan.segments > 1 else 1)
    return launch.nbytes(values, dy) + slot_map_bytes + lists + sums
