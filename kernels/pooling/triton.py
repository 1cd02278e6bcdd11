"""Triton kernels of pooled maps: block means, and the weight gradient of a convolution against them.

The weight gradient is one kernel (triton_taps.py) and one matrix product (plan.py).
"""

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, next_power_of_2, tl, triton
from actpress.kernels.common.layout import dense, is_channels_last
from actpress.kernels.pooling.plan import plan_of
from actpress.kernels.pooling.reference import PooledConv, empty_pooled
from actpress.kernels.pooling.triton_taps import CONFIGS as TAPS_CONFIGS
from actpress.kernels.pooling.triton_taps import met_triton

CONFIGS: tuple[launch.Config, ...] = (
    {"ELEMENTS": 1024, "num_warps": 4},
    {"ELEMENTS": 2048, "num_warps": 4},
    {"ELEMENTS": 4096, "num_warps": 8},
)


@triton.jit
def _pool_kernel(
    x_ptr,
    y_ptr,
    outputs,
    H: tl.constexpr,
    W: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    INNER: tl.constexpr,  # channels that lie next to each other: all of channels_last maps, 1 of NCHW maps
    ROWS: tl.constexpr,  # of a block
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,  # lanes per output: the columns of a block next to each other in memory, filled up to a power of 2
    CELLS: tl.constexpr,  # of a row of a block, those that a lane adds up
    UNROLL: tl.constexpr,  # cells; divides their number
    WIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    lane = pid * ELEMENTS + tl.arange(0, ELEMENTS)
    row = lane // (OUT_W * INNER * SIDE)  # of all output rows of all maps
    inside = lane < outputs * SIDE
    if SIDE == COLUMNS and INNER == 1:  # a row of blocks is a row of the map
        column = lane % (OUT_W * SIDE)
    else:
        column = lane // (INNER * SIDE) % OUT_W * COLUMNS + lane % SIDE
        inside &= lane % SIDE < COLUMNS
    top = row % OUT_H * ROWS
    start = (row // OUT_H * H + top) * W
    total = tl.zeros([ELEMENTS], tl.float32)
    for cells in range(0, ROWS * CELLS, UNROLL):
        for cell in tl.static_range(UNROLL):
            a, b = (cells + cell) // CELLS, (cells + cell) % CELLS
            within = inside
            if OUT_H * ROWS > H:
                within &= top + a < H
            if OUT_W * COLUMNS > W:
                within &= column + b < W
            x = tl.load(x_ptr + (start + a * W + column + b) * INNER + lane % INNER, mask=within, other=0.0)
            total += x.to(tl.float32)
    if SIDE > 1:
        total = tl.sum(tl.reshape(total, [ELEMENTS // SIDE, SIDE]), 1)
    out = pid * (ELEMENTS // SIDE) + tl.arange(0, ELEMENTS // SIDE)
    if OUT_H * ROWS > H or OUT_W * COLUMNS > W:  # the last blocks are smaller
        rows = tl.minimum(H - out // (OUT_W * INNER) % OUT_H * ROWS, ROWS)
        columns = tl.minimum(W - out // INNER % OUT_W * COLUMNS, COLUMNS)
        mean = tl.div_rn(total, (rows * columns).to(tl.float32))
    elif ROWS * COLUMNS & (ROWS * COLUMNS - 1) == 0:
        mean = total * (1 / (ROWS * COLUMNS))  # as exact as the quotient
    else:
        mean = tl.div_rn(total, tl.full(total.shape, ROWS * COLUMNS, tl.float32))
    tl.store(y_ptr + out, mean, mask=out < outputs)


def pool_triton(x_NCHW: Tensor, block: int, align: str, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`pool_reference` in one pass. Differs in the order of the fp32 sums (NCHW: first over the rows of a block).

    Both divide the sum and round the quotient once to x's dtype. So half types differ by at most that rounding, and rarely.
    """
    x = dense(x_NCHW)
    y = empty_pooled(x, block, align)
    if x.numel() == 0:
        return y
    rows, columns = (min(block, size) for size in x.shape[2:])
    inner = x.shape[1] if is_channels_last(x) else 1
    side = next_power_of_2(columns) if inner == 1 else 1
    cells = columns if side == 1 else 1
    elements = max(config["ELEMENTS"], side)
    launch.run(
        _pool_kernel,
        (cdiv(y.numel() * side, elements),),
        x,
        y,
        y.numel(),
        H=x.shape[2],
        W=x.shape[3],
        OUT_H=y.shape[2],
        OUT_W=y.shape[3],
        INNER=inner,
        ROWS=rows,
        COLUMNS=columns,
        SIDE=side,
        CELLS=cells,
        UNROLL=rows * cells if rows * cells <= 16 else 1,
        WIDE=max(x.numel(), y.numel() * side) + elements >= 2**31,
        **{**config, "ELEMENTS": elements},
    )
    return y


def conv2d_weight_grad_triton(
    pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv, config: launch.Config = TAPS_CONFIGS[0]
) -> tuple[Tensor, Tensor]:
    """`conv2d_weight_grad_reference`, and S or X [groups, taps, C / groups, N, rows, columns].

    Differs in the rounding of S to dY's dtype: by at most 2^-9 of an element in bf16 and 2^-12 in fp16, where sums above 65504 overflow. X
    is exact. Half types are multiplied with fp32 sums and rounded once. In fp32 only the order of sums differs, unless
    torch.backends.cuda.matmul.allow_tf32 is set. cudnn.allow_tf32, which applies to convolutions, has no effect.
    """
    weight_shape, groups = geometry.conv.weight_shape, geometry.conv.groups
    if 0 in (pooled_NIhw.numel(), dy_NOPQ.numel()):
        return dy_NOPQ.new_zeros(weight_shape), dy_NOPQ.new_empty(0)
    pooled_NIhw = pooled_NIhw.to(dy_NOPQ.dtype)
    plan = plan_of(pooled_NIhw, dy_NOPQ, geometry)
    read, other = (pooled_NIhw, dy_NOPQ) if plan.spread else (dy_NOPQ, pooled_NIhw)
    if plan.kept:
        met = read.unflatten(1, (groups, 1, -1)).permute(1, 2, 3, 0, 4, 5)
    else:
        met = met_triton(read, plan.rows, plan.columns, groups, plan.order, config)
    other = other.unflatten(1, (groups, -1))
    n, positions = met.shape[3], met.shape[4] * met.shape[5]
    if plan.by_sample:
        left = met.permute(3, 0, 1, 2, 4, 5).reshape(n * groups, -1, positions)
        right = other.reshape(n * groups, -1, positions)
        dw = _product(left, right).unflatten(0, (n, groups)).sum(0)
    else:
        left = met.reshape(groups, -1, n * positions)
        right = other.permute(1, 2, 0, 3, 4).reshape(groups, -1, n * positions)
        dw = _product(left, right)
    dw = dw.unflatten(1, (len(plan.rows.offsets), len(plan.columns.offsets), -1))  # [groups, taps, taps, C, other C]
    for dim, taps in ((1, plan.row_taps), (2, plan.column_taps)):
        if len(taps) > dw.shape[dim]:
            dw = torch.stack([dw.select(dim, tap) for tap in taps], dim)
    dw = dw.permute(0, 4, 3, 1, 2) if plan.spread else dw.permute(0, 3, 4, 1, 2)
    return dw.reshape(weight_shape).to(dy_NOPQ.dtype).contiguous(), met


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [batch, M, K], b [batch, K of N, K] -> a b^T in fp32."""
    b = b.transpose(1, 2)
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, out_dtype=torch.float32)
