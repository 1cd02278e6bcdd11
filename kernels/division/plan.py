"""Which kernels encode and decode a tensor, and the share of each of their programs.

Both follow from shapes alone, so that results never depend on a measurement.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from actpress.kernels.common import check, launch
from actpress.kernels.common.launch import triton
from actpress.kernels.division.reference import Format, sampled_every

ENCODE_CONFIGS: tuple[launch.Config, ...] = (  # LANES: elements that a program takes at a time
    {"LANES": 4096, "num_warps": 2},
    {"LANES": 4096, "num_warps": 4},
    {"LANES": 8192, "num_warps": 4},
)
DECODE_CONFIGS: tuple[launch.Config, ...] = (  # THREADS: of a program; each writes 16 bytes
    {"THREADS": 512, "num_warps": 4},
    {"THREADS": 256, "num_warps": 4},
    {"THREADS": 1024, "num_warps": 8},
)
TALLEST = 16  # rows of a block that a thread may hold
LARGEST = 16384  # elements of a tile
# Programs whose maps take more bytes get twice the threads, so that fewer programs share a cache.
CROWDED = 48 * 1024
FEW = 256  # so many programs, or fewer, leave most of a GPU idle
PARTS = 256  # of a map, at most


@dataclass(frozen=True)
class Plan:
    """What a kernel is compiled for: the shape of maps and blocks, and the share of a program."""

    height: int
    width: int
    channels: int  # next to each other in memory; 1: maps one after the other
    kh: int  # rows and columns of a block
    kw: int
    hb: int  # rows and columns of blocks
    wb: int
    nearest: bool  # blocks are spread over the map as nearest-neighbour resizing does
    bits: int
    whole: bool  # the number of elements is a multiple of `lanes`
    auto: bool = False
    # A program's share. Of maps:
    maps: int = 1
    tile: int = 1  # blocks at a time, or pixels where the means are known
    known: bool = False  # means are in memory already
    codes: bool = True  # makes the codes too
    # Of memory in order: `units` outers are split into `chunks`.
    units: int = 1
    chunks: int = 1
    threads: int = 1  # of a program; each owns neighbours

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def means(self) -> int:
        return self.hb * self.wb

    @property
    def tiles(self) -> int:
        """Tiles of a map."""
        return -(-(self.pixels if self.known else self.means) // self.tile)

    @property
    def rows(self) -> int:
        """Rows of a block in a tile."""
        return 1 if self.known else self.kh

    @property
    def columns(self) -> int:
        """Columns of a block in a tile, a power of two."""
        return 1 if self.known else 1 << (self.kw - 1).bit_length()

    @property
    def every(self) -> int:
        """Expected errors are computed for one row of so many of a map: rows 0, every, 2 * every, ..."""
        return sampled_every(self.height)

    @property
    def stride(self) -> int:
        """Of the rows of a block in a tile, rows 0, stride, 2 * stride, ... may be sampled."""
        return self.every if self.kh % self.every == 0 and not self.known else 1

    @property
    def sampled(self) -> int:
        """Number of rows of a block in a tile that may be sampled."""
        return -(-self.rows // self.stride)

    @property
    def partial(self) -> bool:
        """Whether the last program has fewer channels than P.maps."""
        return self.channels > 1 and self.channels % self.maps != 0

    @property
    def lanes(self) -> int:
        """Neighbours that a thread encodes: as many as share a draw of noise, or eight where a pixel's channels are split into eights."""
        if self.bits <= 2 and (self.channels == 1 or self.channels % 8):
            return 16
        return 16 if self.bits <= 2 and math.gcd(self.channels, self.maps) % 16 == 0 else 8

    @property
    def ragged(self) -> bool:
        """Whether some lanes of a tile are no pixels."""
        odd = self.kh & self.kh - 1 or self.columns != self.kw or self.height % self.kh or self.width % self.kw
        return bool(odd) and not self.known

    @property
    def in_row(self) -> bool:
        """Whether the means of eight neighbours lie next to each other."""
        if self.channels > 1:
            return self.channels % 8 == 0
        return self.kw == 1 and self.width % 8 == 0 and not self.nearest

    @property
    def alike(self) -> int:
        """How many of eight neighbours, from the first on, surely lie in one block."""
        if self.channels > 1 or self.nearest:
            return 1
        return math.gcd(8, self.pixels) if self.means == 1 else math.gcd(8, self.width, self.kw)


class Strategy(NamedTuple):
    """How a tensor is encoded: the plan of its kernels and their launches."""

    plan: Plan
    outers: int
    programs: int  # shares of maps
    warps: int
    parts: int  # of a map; 0: one kernel does everything, except for the codes where plan.codes is False


@functools.cache
def shape_of(shape: tuple[int, ...], channels_last: bool, format: Format) -> tuple[Plan, int]:
    """(maps and blocks as kernels see them, without shares; number of outers). Raises ValueError where no block fits in a map."""
    n, c, h, w = shape
    (kh, kw), (hb, wb) = format.kernel, format.grid(h, w)
    if not hb * wb:
        allowed = f"up to the size of the map, {h} x {w}, with align={format.align!r}"
        check.refuse("division", "kernel", format.kernel, allowed)
    channels, outers = (c, n) if channels_last else (1, n * c)
    plan = Plan(h, w, channels, kh, kw, hb, wb, format.align == "authors", format.bits, whole=False)
    return replace(plan, whole=math.prod(shape) % plan.lanes == 0), outers


@functools.cache
def strategy_of(
    shape: tuple[int, ...],
    channels_last: bool,
    itemsize: int,
    format: Format,
    lanes: int,
    num_warps: int,
) -> Strategy:
    """How to encode x of this shape and itemsize; lanes and num_warps: of the configuration."""
    plan, outers = shape_of(shape, channels_last, format)
    known = format.align != "ceil" or plan.kh > TALLEST or plan.kh * plan.columns > LARGEST
    plan = replace(plan, auto=format.lfc == "auto" and plan.means > 1, known=known)
    block = 1 if known else plan.kh * plan.columns  # lanes
    count = triton.next_power_of_2(plan.pixels if known else plan.means)
    lanes = (
        lanes // 4 if known else lanes
    )  # a thread holds four numbers for each column of a block, here for each pixel
    many, warps = lanes, num_warps
    if plan.channels > 1:
        bytes_of = plan.pixels * itemsize
        maps = min(max(_power(2**16 // bytes_of), 32 // itemsize), 64, triton.next_power_of_2(plan.channels))
        if maps * bytes_of > CROWDED:
            many, warps = 2 * many, 2 * warps
        codes = plan.channels % 8 == 0
        programs = outers * triton.cdiv(plan.channels, maps)
    else:
        fill = plan.lanes // math.gcd(plan.lanes, plan.pixels)  # so many maps have whole draws of noise
        maps = min(max(_power(lanes // (block * count)), fill), triton.next_power_of_2(max(outers, 1)))
        codes = maps * block * count <= LARGEST or fill == 1
        maps = maps if maps * block * count <= LARGEST else 1
        more = min(max(maps * block * count, lanes), LARGEST) // lanes
        many, warps = many * more, warps * more
        programs = triton.cdiv(outers, maps)
    share = replace(plan, maps=maps, tile=min(count, max(_power(many // (maps * block)), 1)), threads=32 * warps)
    few = programs <= FEW and share.tiles * share.tile * maps * block > 2 * LARGEST
    if not (known or few or plan.pixels * plan.channels >= 2**31):
        return Strategy(replace(share, codes=codes), outers, programs, warps, 0)
    many = lanes if known or plan.channels == 1 else 2 * lanes
    share = replace(share, tile=min(count, max(_power(many // (maps * block)), 1)))
    parts = max(min(PARTS, share.tiles, triton.cdiv(4 * FEW, max(programs, 1))), 1)
    parts = triton.cdiv(share.tiles, triton.cdiv(share.tiles, parts))  # none of them empty
    return Strategy(share, outers, programs, 2 * num_warps, parts)


@functools.cache
def in_order(plan: Plan, outers: int, threads: int, lanes: int) -> tuple[Plan, tuple[int]]:
    """For kernels that go over memory in order, `lanes` elements a thread: the plan and the grid."""
    chunk, item = threads * lanes, plan.pixels * plan.channels
    fill = 16 // math.gcd(16, item)
    units = fill * min(triton.cdiv(16 * chunk, fill * item), max(triton.cdiv(outers, fill), 1))
    plan = replace(plan, units=units, chunks=triton.cdiv(units * item, chunk), threads=threads)
    return plan, (outers // units * plan.chunks + triton.cdiv(outers % units * item, chunk),)


def _power(n: int) -> int:
    """The largest power of two not above n, 0 for 0."""
    return 1 << n.bit_length() - 1 if n > 0 else 0
