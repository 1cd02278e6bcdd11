"""How the weight gradient of a convolution against a pooled map is computed on a GPU: one kernel and one matrix product.

With the taps side by side the sum over blocks is one matrix product, which cuBLAS computes. The kernel (triton_taps.py) writes one of its
operands:

    sums      S [taps, O, N, h, w]: dY summed over the positions whose tap falls into each block; multiplied by p(x)
    spread    X [taps, I, N, P, Q]: the block that each tap meets at each position of dY; multiplied by dY

`plan_of` chooses the one that moves fewer bytes. Spread writes less where there are few input channels, as in a 7x7 stem: 16 taps of 3
channels instead of 16 of 64. Taps that meet the same blocks everywhere count once: for blocks of 2, 16 of the stem's 49 taps remain. Where
every position stays what it is (1x1, stride and block 2), nothing is written: the product is that of dY and p(x).

Large kernels of many taps (31x31) would write a hundred times the elements of x and dY. Above MOST times, x~ is decoded instead. A CPU uses
composed.py.

The kernel writes in the memory order of dY. The other operand is a view of dY or p(x); only for the sums of NCHW maps it is a copy of p(x).

Rows and columns are independent of each other. Sums and spread are the same problem: for each tap, an axis says which input positions v
belong to an output position u.

Shapes: dY [N, O, P, Q], p(x) [N, I, h, w].
"""

from enum import IntEnum
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.launch import cdiv
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.pooling.reference import ConvAxis, PooledConv

MOST = 8  # elements that the kernel may write per element of x and dY


class Belongs(IntEnum):
    """Whether the input position at one place of the window belongs to the output position, for one tap."""

    NEVER = 0
    ALWAYS = 1
    SOMETIMES = 2  # for some output positions: the kernel checks at run time
    FIRST = 3  # always, and no earlier place of the window ever does for this tap: the sum starts here


class Axis(NamedTuple):
    """Rows or columns of the kernel.

    For output position u, a tap adds up the input positions v that belong to u. With sums, u is a block, and v a position of dY at which
    the tap meets that block. With spread, u is a position of dY, and v the block that the tap meets there.
    """

    offsets: tuple[int, ...]  # of the distinct taps: at position p of dY a tap meets pixel stride * p + offset
    reach: tuple[int, ...]  # the window: every v of u is (up * u + start) // down - bias + one of these
    span: int  # the most input positions that one tap adds up
    meets: tuple[int, ...]  # a Belongs for each place of the window and tap, [reach, taps]
    up: int
    down: int
    start: int
    bias: int
    stride: int
    block: int
    shift: int  # pixels before the first block
    length: int  # pixels
    read: int  # input positions
    written: int  # output positions
    spread: bool
    kept: bool  # the output is the input: u is made of v = u alone


@lru_cache(maxsize=1024)
def axis_of(conv: ConvAxis, spread: bool) -> tuple[Axis, tuple[int, ...]]:
    """The kernel's axis, and for each tap of the convolution the distinct tap that stands for it."""
    met = [tuple(conv.blocks_met(tap, torch.device("cpu")).tolist()) for tap in range(conv.taps)]
    distinct = list(dict.fromkeys(met))
    offsets = tuple(conv.dilation * met.index(blocks) - conv.padding for blocks in distinct)
    if spread:  # from the block of the first tap
        read, written, up, down, span = conv.blocks, conv.outputs, conv.stride, conv.block, 1
        least = min(offsets) - conv.shift
    else:  # from the first position that the last tap takes into the block
        read, written, up, down = conv.outputs, conv.blocks, conv.block, conv.stride
        span, least = cdiv(conv.block, conv.stride), conv.shift - max(offsets) + conv.stride - 1
    bias = max(0, -(least // down))  # the dividend must not become negative: kernels round quotients to zero
    start = least + bias * down

    first = [(up * u + start) // down - bias for u in range(written)]
    pairs = [{(p, i) if spread else (i, p) for p, i in enumerate(blocks) if i >= 0} for blocks in distinct]
    table = _window(first, pairs, read)
    meets = tuple(int(entry) for row in table.values() for entry in row)
    kept = read == written and pairs == [{(u, u) for u in range(written)}]
    pixels = conv.stride, conv.block, conv.shift, conv.length
    axis = Axis(offsets, tuple(table), span, meets, up, down, start, bias, *pixels, read, written, spread, kept)
    return axis, tuple(distinct.index(blocks) for blocks in met)


def _window(first: list[int], pairs: list[set[tuple[int, int]]], read: int) -> dict[int, list[Belongs]]:
    """{place of the window: a Belongs for each tap}, without places that belong to no tap.

    first: for each output position, the input position at place 0 of its window. pairs: for each tap, all (u, v) where v belongs to u.
    read: the number of input positions.
    """
    width = 1 + max((v - first[u] for tap in pairs for u, v in tap), default=-1)
    table: dict[int, list[Belongs]] = {}
    for m in range(width):
        inside = {(u, v + m) for u, v in enumerate(first) if 0 <= v + m < read}
        row = []
        for t, tap in enumerate(pairs):
            begun = any(above[t] != Belongs.NEVER for above in table.values())
            if not inside & tap:
                row.append(Belongs.NEVER)
            elif not inside <= tap:
                row.append(Belongs.SOMETIMES)
            else:
                row.append(Belongs.ALWAYS if begun else Belongs.FIRST)
        if any(row):
            table[m] = row
    return table


def belongs_reference(axis: Axis) -> Tensor:
    """bool [taps, written, read]: whether v belongs to u."""
    u, v = torch.arange(axis.written)[:, None], torch.arange(axis.read)[None, :]
    position, block = (u, v) if axis.spread else (v, u)
    pixel = axis.stride * position + torch.tensor(axis.offsets)[:, None, None]
    within = pixel - axis.shift - axis.block * block
    return (within >= 0) & (within < axis.block) & (pixel < axis.length)


def met_reference(x_NCrq: Tensor, rows: Axis, columns: Axis, groups: int) -> Tensor:
    """Finite x -> [groups, taps, C / groups, N, rows, columns] in its dtype, summed in fp32 (fp64 stays): axes as matrices of 0 and 1."""
    compute = compute_dtype(x_NCrq.dtype)
    by_row, by_column = (belongs_reference(axis).to(x_NCrq.device, compute) for axis in (rows, columns))
    met = torch.einsum("bwq,ncrq->bncrw", by_column, x_NCrq.to(compute))
    met = torch.einsum("aur,bncrw->abcnuw", by_row, met).flatten(0, 1)  # [taps, C, N, rows, columns]
    return met.unflatten(1, (groups, -1)).transpose(0, 1).to(x_NCrq.dtype)


class Plan(NamedTuple):
    """How one weight gradient is computed."""

    rows: Axis
    columns: Axis
    row_taps: tuple[
        int, ...
    ]  # for each tap of the convolution, the index in rows.offsets of the tap that stands for it
    column_taps: tuple[int, ...]
    spread: bool
    order: str  # of what the kernel writes, one of triton_taps.ORDERS

    @property
    def taps(self) -> int:
        return len(self.rows.offsets) * len(self.columns.offsets)

    @property
    def kept(self) -> bool:
        """Whether the kernel would write exactly what it reads."""
        return self.rows.kept and self.columns.kept

    def elements(self, pooled: Tensor, dy: Tensor) -> int:
        """Elements that the kernel writes."""
        channels = (pooled if self.spread else dy).shape[1]
        return 0 if self.kept else self.taps * dy.shape[0] * channels * self.rows.written * self.columns.written

    @property
    def by_sample(self) -> bool:
        """One product per sample, so that dY [N, O, P Q], the larger operand, is taken as it lies."""
        return self.order == "samples"


def plan_of(pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv) -> Plan:
    """Sums or spread, by the elements that pass through memory on the way to the product."""
    (n, i, h, w), (_, o, p, q) = pooled_NIhw.shape, dy_NOPQ.shape
    channels_last, axes, plans = is_channels_last(dy_NOPQ), geometry.axes(dy_NOPQ), []
    for spread in (False, True):
        (rows, row_taps), (columns, column_taps) = (axis_of(axis, spread) for axis in axes)
        order = "channels" if channels_last else "samples" if spread else "taps"
        plans.append(Plan(rows, columns, row_taps, column_taps, spread, order))
    taps, kept = plans[0].taps, plans[0].kept
    by_sums, by_spread = (0, 0) if kept else (taps * n * o * h * w, taps * n * i * p * q)
    if not channels_last:  # p(x), or dY, in the order of S; a product per sample, in fp32
        by_sums += pooled_NIhw.numel() + (dy_NOPQ.numel() if kept else 0)
        by_spread += 2 * taps * n * o * i // geometry.conv.groups
    return plans[by_spread * p * q < by_sums * h * w]  # a product that is larger must save as many times the bytes


def has_too_many_taps(pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv) -> bool:
    """Whether the kernel would write more than MOST times the elements of x and dY."""
    dense = pooled_NIhw.shape[0] * pooled_NIhw.shape[1] * prod(geometry.size) + dy_NOPQ.numel()
    return plan_of(pooled_NIhw, dy_NOPQ, geometry).elements(pooled_NIhw, dy_NOPQ) > MOST * dense
