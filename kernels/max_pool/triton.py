"""Triton kernels of max-pooling and their launchers.

There are no atomics: each output is written once, and each input is read once, but for what two tiles share.

Kernels see a contiguous map [N, C, H, W] as [N * C, H, W, 1] and a channels_last one as [N, H, W, C]: maps of pixels of channels. A program
handles a tile of rows x columns x channels. Its rows are counted through all maps, so that a tile may hold several small maps.

Forward: an element is a window, which runs through its taps. Backward: an element is a pixel. It looks at the windows that may cover it and
adds dy of those whose offset points at it. A program does so for `stride` rows of pixels, one after the other.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, next_power_of_2, tl, triton
from actpress.kernels.common.layout import dense, dense_as, empty, is_channels_last
from actpress.kernels.max_pool.reference import Window, outputs_of_shape, shape_of

CONFIGS: tuple[launch.Config, ...] = (
    {"BLOCK": 2048, "num_warps": 8},
    {"BLOCK": 1024, "num_warps": 4},
    {"BLOCK": 4096, "num_warps": 8},
)


@triton.jit
def _tile(rows, height, width, channels, TILE: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile of maps [rows // height, height, width, channels]. TILE = (rows, cells, phases, channels); a cell is `phases`
    columns.

    Returns the first map that the tile touches (int64) and, for each of its elements [BLOCK]: row, counted from the top of that map through
    all later maps; column; the column as (cell, phase); channel; whether the element exists.
    """
    ROWS: tl.constexpr = TILE[0]
    CELLS: tl.constexpr = TILE[1]
    PHASES: tl.constexpr = TILE[2]
    CHANNELS: tl.constexpr = TILE[3]
    channel_tiles: tl.constexpr = (channels + CHANNELS - 1) // CHANNELS  # tl.cdiv makes no constants in Triton 3.6
    column_tiles: tl.constexpr = (width + CELLS * PHASES - 1) // (CELLS * PHASES)
    program, element = tl.program_id(0), tl.arange(0, BLOCK)
    channel = program % channel_tiles * CHANNELS + element % CHANNELS
    first_cell = program // channel_tiles % column_tiles * CELLS
    # the same number twice: the first shows the compiler that columns are contiguous, the second which of them are of one cell
    column = first_cell * PHASES + element // CHANNELS % (CELLS * PHASES)
    cell, phase = first_cell + element // (CHANNELS * PHASES) % CELLS, element // CHANNELS % PHASES
    first = (program // (channel_tiles * column_tiles)).to(tl.int64) * ROWS
    row = element // (CELLS * PHASES * CHANNELS)
    exists = (row < tl.minimum(rows - first, ROWS).to(tl.int32)) & (column < width) & (channel < channels)
    row += (first % height).to(tl.int32)
    return first // height, row.to(INDEX), column, cell, phase, channel, exists


@triton.jit
def _float(x):
    """x in fp32. bf16 is converted by its bits; otherwise the compiler compares in bf16, which takes more instructions."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def _max_pool2d_kernel(
    x_ptr,
    y_ptr,
    offset_ptr,
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    first_map, row, column, _, _, channel, exists = _tile(rows, h, w, C, TILE, INDEX, BLOCK)
    top, left = row % h * STRIDE[0] - PADDING[0], column * STRIDE[1] - PADDING[1]
    corner = x_ptr + first_map * (H * W * C) + (((row // h * H + top) * W + left) * C + channel)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    # in windows of nothing but -inf, the first pixel that is no padding
    offset = tl.cdiv(tl.maximum(-top, 0), DILATION[0]) * KERNEL[1] + tl.cdiv(tl.maximum(-left, 0), DILATION[1])
    for tap in tl.range(0, TAPS, loop_unroll_factor=TAPS if UNROLL else 1):
        down, right = tap // KERNEL[1] * DILATION[0], tap % KERNEL[1] * DILATION[1]
        inside = exists & (top + down >= 0) & (top + down < H) & (left + right >= 0) & (left + right < W)
        x = _float(tl.load(corner + (down * W + right) * C, mask=inside, other=float("-inf")))
        better = (x > best) | (x != x)
        best, offset = tl.where(better, x, best), tl.where(better, tap, offset)
    out = first_map * (h * w * C) + ((row * w + column) * C + channel)
    tl.store(y_ptr + out, best, mask=exists)
    tl.store(offset_ptr + out, offset.to(offset_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _max_pool2d_backward_kernel(
    dy_bits_ptr,  # as integers: only a load that fills masked lanes with an integer constant is done once for a whole cell
    offset_ptr,
    dx_ptr,
    rows,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    h: tl.constexpr,
    w: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    TILE: tl.constexpr,
    INDEX: tl.constexpr,
    UNROLL: tl.constexpr,
    FIRST: tl.constexpr,
    VISITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pixel (row * stride + a, column) can only be covered by windows (row, column // stride) + FIRST .. FIRST + VISITS - 1."""
    height: tl.constexpr = (H + STRIDE[0] - 1) // STRIDE[0]
    first_map, row, column, cell, phase, channel, exists = _tile(rows, height, W, C, TILE, INDEX, BLOCK)
    if TILE[2] != STRIDE[1]:
        cell, phase = column // STRIDE[1], column % STRIDE[1]
    map_, row = row // height, row % height
    dx_ptr += first_map * (H * W * C)
    dy_bits_ptr += first_map * (h * w * C)
    offset_ptr += first_map * (h * w * C)
    pixel = ((map_ * H + row * STRIDE[0]) * W + column) * C + channel
    window = ((map_ * h + row) * w + cell) * C + channel
    for a in tl.range(0, STRIDE[0], loop_unroll_factor=STRIDE[0] if UNROLL else 1):
        dx = tl.zeros([BLOCK], tl.float32)
        for visit in tl.range(0, VISITS[0] * VISITS[1], loop_unroll_factor=VISITS[0] * VISITS[1] if UNROLL else 1):
            down, right = FIRST[0] + visit // VISITS[1], FIRST[1] + visit % VISITS[1]
            # pixels from the window's corner, which must be those of a tap
            below, behind = a + PADDING[0] - down * STRIDE[0], phase + PADDING[1] - right * STRIDE[1]
            covers = (below >= 0) & (below < KERNEL[0] * DILATION[0]) & (below % DILATION[0] == 0)
            tap = below // DILATION[0] * KERNEL[1] + behind // DILATION[1]
            tap = tl.where((behind >= 0) & (behind < KERNEL[1] * DILATION[1]) & (behind % DILATION[1] == 0), tap, -1)
            inside = exists & covers & (row + down >= 0) & (row + down < h) & (cell + right >= 0) & (cell + right < w)
            element = window + (down * w + right) * C
            offset = tl.load(offset_ptr + element, mask=inside, other=0).to(tl.int32)
            dy = tl.load(dy_bits_ptr + element, mask=inside, other=0).to(dx_ptr.dtype.element_ty, bitcast=True)
            dx += tl.where(offset == tap, _float(dy), 0.0)
        tl.store(dx_ptr + (pixel + a * W * C), dx, mask=exists & (row * STRIDE[0] + a < H))


class Tiling(NamedTuple):
    """Maps of height x width cells x channels, split into tiles, see _tile."""

    maps: int
    height: int
    width: int
    channels: int
    tile: tuple[int, int, int, int]

    @property
    def programs(self) -> int:
        rows, cells, _, channels = self.tile
        sizes = (self.maps * self.height, rows), (self.width, cells), (self.channels, channels)
        return math.prod(cdiv(length, piece) for length, piece in sizes)


def forward_tiling(x: Tensor, height: int, width: int, config: launch.Config) -> Tiling:
    """The tiling of the maxima, height x width a map."""
    return _cut(x.shape, height, width, 1, is_channels_last(x), x.itemsize, config["BLOCK"])


def backward_tiling(
    shape: Sequence[int], window: Window, channels_last: bool, itemsize: int, config: launch.Config
) -> Tiling:
    """The tiling of the pixels: a row of cells is `stride` rows of pixels; a cell is `stride` columns if those are at most 8, or one."""
    phases = window.stride[1] if window.stride[1] <= 8 else 1
    height, width = cdiv(shape[-2], window.stride[0]), cdiv(shape[-1], phases)
    return _cut(shape, height, width, phases, channels_last, itemsize, config["BLOCK"])


def _cut(
    shape: Sequence[int], height: int, width: int, phases: int, channels_last: bool, itemsize: int, block: int
) -> Tiling:
    """Tiles hold whole rows; in channels_last order nearly square pieces of 64 bytes of channels. Neighbours then read little twice."""
    channels = shape[1] if channels_last else 1
    piece = min(channels, 64 // itemsize)
    room = block // (phases * piece)
    most = next_power_of_2(math.isqrt(room)) if channels_last else room
    cells = cdiv(width, cdiv(width, most))  # pieces of about the same size
    return Tiling(math.prod(shape[:-2]) // channels, height, width, channels, (room // cells, cells, phases, piece))


def _launch(
    kernel: object,
    tensors: tuple[Tensor, Tensor, Tensor],
    tiling: Tiling,
    pixels: Sequence[int],
    windows: Sequence[int],
    window: Window,
    steps: int,
    **options: object,
) -> None:
    """pixels, windows: (rows, columns) of a map. steps: iterations of the kernel's loops, which are unrolled if they are few."""
    touched = tiling.tile[0] // tiling.height + 2  # maps that a tile lies in, at most
    launch.run(
        kernel,
        (tiling.programs,),
        *tensors,
        tiling.maps * tiling.height,
        **dict(zip("HWChw", (*pixels, tiling.channels, *windows), strict=True)),
        **{name.upper(): pair for name, pair in window._asdict().items()},
        TILE=tiling.tile,
        INDEX=tl.int32 if touched * math.prod(pixels) * tiling.channels < 2**31 else tl.int64,
        UNROLL=steps <= 32,
        **options,
    )


_shape = functools.cache(shape_of)  # not of symbolic sizes


def max_pool2d_triton(
    x: Tensor, window: Window, ceil_mode: bool, config: launch.Config = CONFIGS[0]
) -> tuple[Tensor, Tensor]:
    """`max_pool2d_reference` in one pass; equal bit for bit."""
    x = dense(x)
    y, offset = outputs_of_shape(x, _shape(tuple(x.shape), window, ceil_mode), window)
    tiling, steps = forward_tiling(x, *y.shape[-2:], config), math.prod(window.kernel)
    _launch(_max_pool2d_kernel, (x, y, offset), tiling, x.shape[-2:], y.shape[-2:], window, steps, **config)
    return y, offset


def max_pool2d_backward_triton(
    dy: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    window: Window,
    channels_last: bool,
    config: launch.Config = CONFIGS[0],
) -> Tensor:
    """`max_pool2d_backward_reference` without atomics; each output is written once.

    The windows that overlap in a pixel are summed in fp32, in row-major order, and rounded once. In fp32 this equals the reference on the
    CPU bit for bit. In half types the reference rounds after each addition: by 2^-9 of the sum in bf16, 2^-12 in fp16, for each window but
    the first.
    """
    dy, offset = dense_as(dy, channels_last), dense_as(offset, channels_last)
    dx = empty(shape, dy.dtype, dy.device, channels_last)
    tensors = dy.view(torch.int32 if dy.itemsize == 4 else torch.int16), offset, dx
    tiling, (first, visits) = backward_tiling(shape, window, channels_last, dy.itemsize, config), visits_of(window)
    steps = window.stride[0] * math.prod(visits)
    sizes = shape[-2:], dy.shape[-2:]
    _launch(_max_pool2d_backward_kernel, tensors, tiling, *sizes, window, steps, FIRST=first, VISITS=visits, **config)
    return dx


def visits_of(window: Window) -> tuple[tuple[int, int], tuple[int, int]]:
    """(first, count) on each axis: cell c can only be covered by windows c + first .. c + first + count - 1."""
    first = tuple(-(((k - 1) * d - p) // s) for k, s, p, d in zip(*window, strict=True))
    last = tuple((s - 1 + p) // s for s, p in zip(window.stride, window.padding, strict=True))
    return first, tuple(b - a + 1 for a, b in zip(first, last, strict=True))
