"""Device code of DIVISION; what it computes is in division.py, which also chooses between the kernels.

Memory is seen as [outer, pixels, channels]: maps one after the other (NCHW) are `outer` with one channel, channels_last is what it says.
bf16 travels as int16 (rounding.py).

Means, extremes and expected errors are taken from tiles [maps, blocks, columns of a block], one for each row of a block, so that a thread
holds columns of blocks from top to bottom. Codes are made and decoded in memory order, by threads that own neighbours: an "eight",
whose elements share a draw of noise and whose codes fill whole bytes.
"""

import math
from dataclasses import dataclass

from .bits import pack8
from .launch import tl, triton
from .noise import uniform8
from .rounding import bf16_floor_bits, bf16_nearest_bits, bf16_value


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
    whole: bool  # the number of elements is a multiple of 8
    auto: bool = False
    # A program's share. Of maps:
    maps: int = 1
    tile: int = 1  # blocks, or pixels where the means are known
    known: bool = False  # means are in memory already
    codes: bool = True  # makes the codes too
    # Of memory in order: `units` outers are cut into `chunks`.
    units: int = 1
    chunks: int = 1
    threads: int = 1  # who own neighbours

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
        """Rows of a block in a tile, and its columns."""
        return 1 if self.known else self.kh

    @property
    def columns(self) -> int:
        return 1 << (self.kw - 1).bit_length()

    @property
    def ragged(self) -> bool:
        """Whether a tile has lanes that are no pixels."""
        odd = self.kh & self.kh - 1 or self.columns != self.kw or self.height % self.kh or self.width % self.kw
        return bool(odd) and not self.known

    @property
    def in_row(self) -> bool:
        """Whether the means of an eight lie next to each other."""
        if self.channels > 1:
            return self.channels % 8 == 0
        return self.kw == 1 and self.width % 8 == 0 and not self.nearest

    @property
    def alike(self) -> int:
        """How many of an eight, from its first on, lie in one block."""
        if self.channels > 1 or self.nearest:
            return 1
        return math.gcd(8, self.pixels) if self.means == 1 else math.gcd(8, self.width, self.kw)


@triton.jit
def _own_maps(program, outers, P: tl.constexpr):
    """The maps of a program: (outer of the first, its channel, how many there are)."""
    if P.channels == 1:
        outer = program.to(tl.int64) * P.maps
        return outer, program * 0, tl.minimum(outers - outer, P.maps).to(tl.int32)
    else:
        PER_OUTER: tl.constexpr = (P.channels + P.maps - 1) // P.maps
        channel = program % PER_OUTER * P.maps
        return (program // PER_OUTER).to(tl.int64), channel, tl.minimum(P.channels - channel, P.maps)


@triton.jit
def _block_of(pixel, P: tl.constexpr):
    """Block that a pixel belongs to."""
    row, column = pixel // P.width, pixel % P.width
    if P.nearest:  # as PyTorch resizes: floor(i * (blocks / size)) in fp32
        row = tl.minimum((row.to(tl.float32) * (P.hb / P.height)).to(tl.int32), P.hb - 1)
        column = tl.minimum((column.to(tl.float32) * (P.wb / P.width)).to(tl.int32), P.wb - 1)
        return row * P.wb + column
    else:
        return row // P.kh * P.wb + column // P.kw


@triton.jit
def _offsets(maps, each, P: tl.constexpr):
    """Offsets of a program's maps in memory that holds `each` per map. Maps that are not there repeat the last."""
    map = tl.minimum(tl.arange(0, P.maps), maps - 1)
    return map * each if P.channels == 1 else map


@triton.jit
def _tile(x_ptr, i, maps, P: tl.constexpr):
    """Tile i of some maps: (x and which lanes are pixels, two tuples of the rows of a block, [maps, blocks, columns]; bits of the means,
    [maps, blocks]). Blocks that are not there repeat the last; lanes that are no pixels hold NaN."""
    ROWS: tl.constexpr = P.kh
    block = tl.minimum(i * P.tile + tl.arange(0, P.tile), P.means - 1)
    top, left = block // P.wb * P.kh, block % P.wb * P.kw
    lane = tl.arange(0, P.columns)[None, :]
    column = left[:, None] + lane
    there = (lane < P.kw) & (column < P.width)
    if P.pixels * P.channels >= 2**31:
        column = column.to(tl.int64)
    at = _offsets(maps, P.pixels, P)[:, None, None] + ((top[:, None] * P.width + column) * P.channels)[None, :, :]
    x, inside = (), ()
    total = tl.full([P.maps, P.tile, P.columns], 0.0, tl.float32)
    for r in tl.static_range(ROWS):
        mask = ((top[:, None] + r < P.height) & there)[None, :, :]
        if P.ragged:
            row = tl.load(x_ptr + r * P.width * P.channels + at, mask=mask, other=float("nan")).to(tl.float32)
            total += tl.where(mask, row, 0.0)
        else:
            row = tl.load(x_ptr + r * P.width * P.channels + at).to(tl.float32)
            total += row
        x = x + (row,)  # noqa: RUF005 - Triton has no unpacking
        inside = inside + (mask,)  # noqa: RUF005
    mean = tl.sum(total, axis=2)
    if P.ragged:
        count = tl.minimum(P.height - top, P.kh) * tl.minimum(P.width - left, P.kw)
        mean = tl.div_rn(mean, count.to(tl.float32)[None, :])
    else:
        mean *= 1.0 / (P.kh * P.kw)  # a power of two: as exact as a division
    return x, inside, bf16_nearest_bits(mean)


@triton.jit
def _pixels(x_ptr, lfc_ptr, i, maps, P: tl.constexpr):
    """The same where means are known, of blocks of one pixel. Pixels that are not there repeat the last."""
    pixel = tl.minimum(i * P.tile + tl.arange(0, P.tile), P.pixels - 1)[None, :]
    at = _offsets(maps, P.means, P)[:, None] + _block_of(pixel, P) * P.channels
    mean = tl.load(lfc_ptr + at)
    if P.pixels * P.channels >= 2**31:
        pixel = pixel.to(tl.int64)
    x = tl.load(x_ptr + _offsets(maps, P.pixels, P)[:, None] + pixel * P.channels).to(tl.float32)[:, :, None]
    return (x,), (x == x,), mean


@triton.jit
def _store_means(lfc_ptr, mean, i, maps, P: tl.constexpr):
    map, block = tl.arange(0, P.maps)[:, None], (i * P.tile + tl.arange(0, P.tile))[None, :]
    at = map * P.means + block if P.channels == 1 else map + block * P.channels
    tl.store(lfc_ptr + at, mean, mask=(map < maps) & (block < P.means))


@triton.jit
def _all(x):
    """[maps, blocks, columns] -> [maps, all of a map]. What is then joined is reduced together, one reduction instead of several."""
    return tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]])


@triton.jit
def _extremes(x, mean, P: tl.constexpr):
    """(-least, greatest, -least, greatest) of the high frequencies and, auto, of x, each fp32 [maps]. NaN is left out; where the mean
    is not finite, the greatest is infinite."""
    ROWS: tl.constexpr = P.rows
    mean = bf16_value(mean)[:, :, None]
    least, greatest = x[0], x[0]
    for r in tl.static_range(1, ROWS):
        least, greatest = tl.minimum(least, x[r]), tl.maximum(greatest, x[r])
    # Subtracting is monotonous: the extremes of x - mean are those of x, less the mean.
    rest_least, rest_greatest = mean - least, tl.where(mean - mean == 0, greatest - mean, float("inf"))
    if P.known:  # whose x, unlike that of a whole block, may be NaN where the mean is not
        rest_greatest = tl.where(least == least, rest_greatest, float("inf"))
    rest = tl.join(_all(rest_least), _all(rest_greatest))
    if P.auto:
        plain = tl.join(_all(-least), _all(greatest))
        rest, plain = tl.split(tl.max(tl.join(rest, plain), axis=1))
        a, b = tl.split(rest)
        c, d = tl.split(plain)
        return a, b, c, d
    else:
        a, b = tl.split(tl.max(rest, axis=1))
        return a, b, a, b


@triton.jit
def _scan(x_ptr, lfc_ptr, first, last, maps, P: tl.constexpr):
    """Extremes of tiles first .. last - 1, whose means are stored."""
    a = tl.full([P.maps], float("-inf"), tl.float32)
    b, c, d = a, a, a
    for i in range(first, last):
        if P.known:
            x, _, mean = _pixels(x_ptr, lfc_ptr, i, maps, P)
        else:
            x, _, mean = _tile(x_ptr, i, maps, P)
            _store_means(lfc_ptr, mean, i, maps, P)
        e, f, g, h = _extremes(x, mean, P)
        a, b, c, d = tl.maximum(a, e), tl.maximum(b, f), tl.maximum(c, g), tl.maximum(d, h)
    return a, b, c, d


@triton.jit
def _scale(least, greatest, P: tl.constexpr):
    """From minus the least and the greatest: (bits of low, of step, what differences are multiplied with). NaN if these are infinite."""
    zero = (least - least) + (greatest - greatest)
    low = bf16_floor_bits(zero - least)
    step = bf16_floor_bits(tl.div_rn(bf16_value(low) - greatest, 2.0**P.bits - 1)) ^ -0x8000  # its negative
    return low, step, tl.where(bf16_value(step) > 0, tl.div_rn(1.0, bf16_value(step)), 0.0)


@triton.jit
def _error(x, inside, least, inverse, P: tl.constexpr):
    """Expected squared error of stochastic rounding, in steps from `least`: f (1 - f), f the fraction rounded away, summed over rows.

    With r the distance to the nearest code, f (1 - f) = r - r^2, and the nearest comes of two additions.
    """
    ROWS: tl.constexpr = P.rows
    offset = -least * inverse
    linear, square = tl.zeros_like(x[0]), tl.zeros_like(x[0])
    for r in tl.static_range(ROWS):
        steps = tl.fma(x[r], inverse, offset)
        distance = steps - ((steps + 1.5 * 2**23) - 1.5 * 2**23)
        if P.ragged:
            distance = tl.where(inside[r], distance, 0.0)
        linear += tl.abs(distance)
        square = tl.fma(distance, distance, square)
    return linear - square


@triton.jit
def _errors(x, inside, mean, i, rest, plain, P: tl.constexpr):
    """(of the high frequencies, of x), [maps], in steps squared, of tile i; rest, plain: their scales."""
    least = bf16_value(mean)[:, :, None] + bf16_value(rest[0])[:, None, None]
    with_means = _error(x, inside, least, rest[2][:, None, None], P)
    without = _error(x, inside, bf16_value(plain[0])[:, None, None], plain[2][:, None, None], P)
    exists = (i * P.tile + tl.arange(0, P.tile) < (P.pixels if P.known else P.means))[None, :, None]
    both = tl.join(_all(tl.where(exists, with_means, 0.0)), _all(tl.where(exists, without, 0.0)))
    return tl.split(tl.sum(both, axis=1))


@triton.jit
def _scan_errors(x_ptr, lfc_ptr, first, last, maps, rest, plain, P: tl.constexpr):
    """The same of tiles first .. last - 1."""
    with_means, without = tl.full([P.maps], 0.0, tl.float32), tl.full([P.maps], 0.0, tl.float32)
    for i in range(first, last):
        if P.known:
            x, inside, mean = _pixels(x_ptr, lfc_ptr, i, maps, P)
        else:
            x, inside, mean = _tile(x_ptr, i, maps, P)
        a, b = _errors(x, inside, mean, i, rest, plain, P)
        with_means, without = with_means + a, without + b
    return with_means, without


@triton.jit
def _better(with_means, without, rest, plain):
    """Of two scales that with the lesser error: (which maps are plain, their scales). Errors are in steps squared."""
    rest_step, plain_step = bf16_value(rest[1]), bf16_value(plain[1])
    is_plain = without * (plain_step * plain_step) < with_means * (rest_step * rest_step)
    low, step = tl.where(is_plain, plain[0], rest[0]), tl.where(is_plain, plain[1], rest[1])
    return is_plain, (low, step, tl.where(is_plain, plain[2], rest[2]))


@triton.jit
def _leave_out(lfc_ptr, is_plain, tiles, maps, P: tl.constexpr):
    """Zero the means, stored before, of the first `tiles` tiles of plain maps."""
    zero = tl.full([P.maps, P.tile], 0, tl.int16)
    for i in range(tiles):
        map, block = tl.arange(0, P.maps)[:, None], (i * P.tile + tl.arange(0, P.tile))[None, :]
        at = map * P.means + block if P.channels == 1 else map + block * P.channels
        tl.store(lfc_ptr + at, zero, mask=is_plain[:, None] & (map < maps) & (block < P.means))


@triton.jit
def _store_scale(low_ptr, step_ptr, inverse_ptr, scale, first, maps, P: tl.constexpr):
    map = tl.arange(0, P.maps)
    tl.store(low_ptr + first + map, scale[0], mask=map < maps)
    tl.store(step_ptr + first + map, scale[1], mask=map < maps)
    tl.store(inverse_ptr + first + map, scale[2], mask=map < maps)


@triton.jit
def _fp32(ptr, at):
    """fp32 there, or the bf16 whose bits are there."""
    if ptr.dtype.element_ty == tl.int16:
        return bf16_value(tl.load(ptr + at))
    else:
        return tl.load(ptr + at)


@triton.jit
def _parameters(pointers, first, limit, P: tl.constexpr, LANES: tl.constexpr):
    """(mean, low, scale) of LANES neighbours from each of `first` on, [T] -> [T, LANES], from pointers to these of the first map.
    first < limit, the number of elements."""
    lfc_ptr, low_ptr, scale_ptr = pointers
    if P.in_row:
        pixel, channel, lane = first // P.channels, first % P.channels, tl.arange(0, LANES)[None, :]
        outer, block = pixel // P.pixels, _block_of(pixel % P.pixels, P)
        mean = _fp32(lfc_ptr, ((outer * P.means + block) * P.channels + channel)[:, None] + lane)
        if P.channels == 1:
            return mean, _spread(_fp32(low_ptr, outer), LANES), _spread(_fp32(scale_ptr, outer), LANES)
        else:
            map = (outer * P.channels + channel)[:, None] + lane
            return mean, _fp32(low_ptr, map), _fp32(scale_ptr, map)
    else:
        ALIKE: tl.constexpr = P.alike if P.alike < LANES else LANES
        outer = first // (P.pixels * P.channels)
        here = outer, _fp32(lfc_ptr, outer * P.means), _fp32(low_ptr, outer), _fp32(scale_ptr, outer)
        after = here
        if P.channels == 1 and P.pixels % LANES:
            outer = tl.minimum(outer + 1, (limit - 1) // P.pixels)
            after = outer, _fp32(lfc_ptr, outer * P.means), _fp32(low_ptr, outer), _fp32(scale_ptr, outer)
        mean, low, scale = _tree(pointers, first, limit, here, after, P, LANES, 0, ALIKE)
        return _spread(mean, LANES), _spread(low, LANES), _spread(scale, LANES)


@triton.jit
def _tree(
    pointers,
    first,
    limit,
    here,
    after,
    P: tl.constexpr,
    LANES: tl.constexpr,
    OFFSET: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Parameters of elements first + OFFSET, + OFFSET + STRIDE, ... below LANES, each looked up by itself: [T] -> [T, 2, 2, ...].

    Joined from halves, they are with the thread that looked them up, which a load of [T, LANES] would not be.
    """
    if STRIDE + OFFSET >= LANES:
        return _look_up(pointers, first, limit, here, after, P, LANES, OFFSET)
    else:
        a, b, c = _tree(pointers, first, limit, here, after, P, LANES, OFFSET, 2 * STRIDE)
        d, e, f = _tree(pointers, first, limit, here, after, P, LANES, OFFSET + STRIDE, 2 * STRIDE)
        return tl.join(a, d), tl.join(b, e), tl.join(c, f)


@triton.jit
def _look_up(pointers, first, limit, here, after, P: tl.constexpr, LANES: tl.constexpr, OFFSET: tl.constexpr):
    """Of elements first + OFFSET. here, after: (number, mean of its first block, low, scale) of the map that holds `first`, of the next."""
    lfc_ptr, low_ptr, scale_ptr = pointers
    if P.channels == 1 and P.pixels >= LANES:
        outer, mean, low, scale = here
        pixel = (first % P.pixels + OFFSET).to(tl.uint32)  # divides faster
        if P.pixels % LANES:  # the map may end here, but only one can begin
            next = pixel >= P.pixels
            pixel = tl.where(next, pixel - P.pixels, pixel)
            outer, mean = tl.where(next, after[0], outer), tl.where(next, after[1], mean)
            low, scale = tl.where(next, after[2], low), tl.where(next, after[3], scale)
        if P.means > 1:
            mean = _fp32(lfc_ptr, outer * P.means + _block_of(pixel, P))
        return mean, low, scale
    else:
        element = tl.minimum(first + OFFSET, limit - 1)
        channel, pixel = element % P.channels, element // P.channels
        outer, block = pixel // P.pixels, _block_of(pixel % P.pixels, P)
        map = outer * P.channels + channel
        return (
            _fp32(lfc_ptr, (outer * P.means + block) * P.channels + channel),
            _fp32(low_ptr, map),
            _fp32(scale_ptr, map),
        )


@triton.jit
def _spread(x, LANES: tl.constexpr):
    """[T, 2, 2, ...] -> [T, LANES], neighbours alike."""
    COUNT: tl.constexpr = x.numel // x.shape[0]
    x = tl.reshape(x, [x.shape[0], COUNT, 1])
    return tl.reshape(tl.broadcast_to(x, [x.shape[0], COUNT, LANES // COUNT]), [x.shape[0], LANES])


@triton.jit
def _load(x_ptr, first, limit, LANES: tl.constexpr, WHOLE: tl.constexpr):
    element = first[:, None] + tl.arange(0, LANES)[None, :]
    if WHOLE:
        return tl.load(x_ptr + element)
    else:
        return tl.load(x_ptr + element, mask=element < limit, other=float("nan"))


@triton.jit
def _load_eights(x_ptr, first, limit, WHOLE: tl.constexpr):
    """[T] -> fp32 [T, 8], each eight with one thread: fp32 in halves, of 16 bytes as a thread loads them. NaN where there is no element."""
    if x_ptr.dtype.element_ty.primitive_bitwidth == 32:
        x = tl.join(_load(x_ptr, first, limit, 4, WHOLE), _load(x_ptr, first + 4, limit, 4, WHOLE))
        return tl.reshape(tl.permute(x, (0, 2, 1)), [first.shape[0], 8])
    else:
        return _load(x_ptr, first, limit, 8, WHOLE).to(tl.float32)


@triton.jit
def _encode_eights(x_ptr, pointers, codes_ptr, seed, eight, first, exists, limit, P: tl.constexpr):
    """Codes of the eights that begin at elements first [T]. Pointers are to the first of `limit` elements, of maps that all begin there;
    `eight` is its number in the whole tensor."""
    if P.whole:
        at = tl.minimum(first // 8, limit // 8 - 1) * 8  # written so that the compiler sees the alignment
    else:
        at = tl.minimum(first, limit - 1)
    mean, low, inverse = _parameters(pointers, at, limit, P, 8)
    x = _load_eights(x_ptr, at if P.whole else first, limit, P.whole)
    steps = (x - mean - low) * inverse + uniform8(seed, eight + first // 8)
    steps = tl.minimum(steps, 2.0**P.bits - 1, propagate_nan=tl.PropagateNan.ALL)
    codes = steps.to(tl.uint32)  # cuts off: floor, as there is no sign; NaN becomes 0
    if not P.whole:
        byte = (first // 8)[:, None] * P.bits + tl.arange(0, P.bits)[None, :]
        tl.store(codes_ptr + byte, pack8(codes, P.bits), mask=exists[:, None] & (byte * 8 < limit * P.bits))
    elif P.bits == 8:
        words = tl.sum(tl.reshape(codes, [first.shape[0], 2, 4]) << (8 * tl.arange(0, 4))[None, None, :], axis=2)
        word = first[:, None] // 4 + tl.arange(0, 2)[None, :]
        tl.store(codes_ptr.to(tl.pointer_type(tl.uint32)) + word, words, mask=exists[:, None])
    else:
        WORD: tl.constexpr = tl.uint8 if P.bits == 1 else tl.uint16 if P.bits == 2 else tl.uint32
        words = tl.sum(codes << (P.bits * tl.arange(0, 8))[None, :], axis=1).to(WORD)
        tl.store(codes_ptr.to(tl.pointer_type(WORD)) + first // 8, words, mask=exists)


@triton.jit
def encode_kernel(x_ptr, seed_ptr, lfc_ptr, codes_ptr, low_ptr, step_ptr, inverse_ptr, outers, P: tl.constexpr):
    """Some maps a program, from their means to their codes. The last tile stays in registers, the others are read once more for the
    expected errors; all is read once more, from a cache, for the codes."""
    LAST: tl.constexpr = P.tiles - 1
    outer, channel, maps = _own_maps(tl.program_id(0), outers, P)
    x_ptr += outer * (P.pixels * P.channels)
    lfc_ptr += outer * (P.means * P.channels)
    low_ptr += outer * P.channels
    inverse_ptr += outer * P.channels
    own_x_ptr, own_lfc_ptr = x_ptr + channel, lfc_ptr + channel
    a, b, c, d = _scan(own_x_ptr, own_lfc_ptr, 0, LAST, maps, P)
    x, inside, mean = _tile(own_x_ptr, LAST, maps, P)
    e, f, g, h = _extremes(x, mean, P)
    scale = _scale(tl.maximum(a, e), tl.maximum(b, f), P)
    if P.auto:
        plain = _scale(tl.maximum(c, g), tl.maximum(d, h), P)
        with_means, without = _errors(x, inside, mean, LAST, scale, plain, P)
        more_with, more_without = _scan_errors(own_x_ptr, own_lfc_ptr, 0, LAST, maps, scale, plain, P)
        is_plain, scale = _better(with_means + more_with, without + more_without, scale, plain)
        mean = tl.where(is_plain[:, None], 0, mean)
        if LAST > 0:
            tl.debug_barrier()  # other threads stored them
            _leave_out(own_lfc_ptr, is_plain, LAST, maps, P)
    _store_means(own_lfc_ptr, mean, LAST, maps, P)
    _store_scale(low_ptr, step_ptr + outer * P.channels, inverse_ptr, scale, channel, maps, P)

    if P.codes:
        tl.debug_barrier()  # what other threads stored is read from here on
        pointers = lfc_ptr, low_ptr, inverse_ptr
        seed = tl.load(seed_ptr)
        eight = outer * (P.pixels * P.channels) // 8
        codes_ptr += eight * P.bits
        index = tl.arange(0, P.threads)
        if P.channels == 1:
            limit = maps * P.pixels
            for i in range(0, (P.maps * P.pixels + 7) // 8, P.threads):
                first = (i + index) * 8
                _encode_eights(x_ptr, pointers, codes_ptr, seed, eight, first, first < limit, limit, P)
        else:
            PER_PIXEL: tl.constexpr = P.maps // 8
            limit = P.pixels * P.channels
            for i in range(0, P.pixels * PER_PIXEL, P.threads):
                pixel, own = (i + index) // PER_PIXEL, channel + (i + index) % PER_PIXEL * 8
                exists = (pixel < P.pixels) & (own < P.channels)
                first = tl.minimum(pixel, P.pixels - 1) * P.channels + tl.minimum(own, P.channels - 8)
                _encode_eights(x_ptr, pointers, codes_ptr, seed, eight, first, exists, limit, P)


@triton.jit
def means_kernel(x_ptr, lfc_ptr, outers, P: tl.constexpr, LANES: tl.constexpr):
    """Means of blocks of any size, LANES pixels at a time."""
    outer, channel, maps = _own_maps(tl.program_id(0) // P.tiles, outers, P)
    i = tl.program_id(0) % P.tiles
    x_ptr += outer * (P.pixels * P.channels) + channel
    block = tl.minimum(i * P.tile + tl.arange(0, P.tile), P.means - 1)
    top, left = (block // P.wb * P.kh)[:, None], (block % P.wb * P.kw)[:, None]
    total = tl.full([P.maps, P.tile, LANES], 0.0, tl.float32)
    for start in range(0, P.kh * P.kw, LANES):
        lane = start + tl.arange(0, LANES)[None, :]
        row, column = top + lane // P.kw, left + lane % P.kw
        mask = (lane < P.kh * P.kw) & (row < P.height) & (column < P.width)
        if P.pixels * P.channels >= 2**31:
            row = row.to(tl.int64)
        at = _offsets(maps, P.pixels, P)[:, None, None] + ((row * P.width + column) * P.channels)[None, :, :]
        total += tl.load(x_ptr + at, mask=mask[None, :, :], other=0.0).to(tl.float32)
    count = tl.minimum(P.height - top, P.kh) * tl.minimum(P.width - left, P.kw)
    mean = tl.div_rn(tl.sum(total, axis=2), tl.reshape(count.to(tl.float32), [1, P.tile]))
    _store_means(lfc_ptr + outer * (P.means * P.channels) + channel, bf16_nearest_bits(mean), i, maps, P)


@triton.jit
def partials_kernel(x_ptr, lfc_ptr, partials_ptr, outers, parts, tiles, P: tl.constexpr):
    """Extremes of part of a map, `tiles` tiles of it, to partials [4, maps, parts]."""
    part = tl.program_id(0) % parts
    outer, channel, maps = _own_maps(tl.program_id(0) // parts, outers, P)
    x_ptr += outer * (P.pixels * P.channels) + channel
    lfc_ptr += outer * (P.means * P.channels) + channel
    a, b, c, d = _scan(x_ptr, lfc_ptr, part * tiles, tl.minimum((part + 1) * tiles, P.tiles), maps, P)
    map = tl.arange(0, P.maps)
    size = outers.to(tl.int64) * P.channels * parts
    partials_ptr += (outer * P.channels + channel + map) * parts + part
    tl.store(partials_ptr, a, mask=map < maps)
    tl.store(partials_ptr + size, b, mask=map < maps)
    if P.auto:
        tl.store(partials_ptr + 2 * size, c, mask=map < maps)
        tl.store(partials_ptr + 3 * size, d, mask=map < maps)


@triton.jit
def _partials(ptr, parts, first, maps, filling, P: tl.constexpr, PARTS: tl.constexpr):
    """[P.maps, PARTS], from [maps, parts] at map `first` on."""
    map, part = tl.minimum(tl.arange(0, P.maps), maps - 1)[:, None], tl.arange(0, PARTS)[None, :]
    return tl.load(ptr + (first + map) * parts + part, mask=(part < parts) & (map >= 0), other=filling)


@triton.jit
def _scale_of_parts(ptr, parts, first, maps, size, P: tl.constexpr, PARTS: tl.constexpr):
    least = tl.max(_partials(ptr, parts, first, maps, float("-inf"), P, PARTS), axis=1)
    greatest = tl.max(_partials(ptr + size, parts, first, maps, float("-inf"), P, PARTS), axis=1)
    return _scale(least, greatest, P)


@triton.jit
def errors_kernel(x_ptr, lfc_ptr, partials_ptr, errors_ptr, outers, parts, tiles, P: tl.constexpr, PARTS: tl.constexpr):
    """Expected errors of the same parts, with and without means, to errors [2, maps, parts]."""
    part = tl.program_id(0) % parts
    outer, channel, maps = _own_maps(tl.program_id(0) // parts, outers, P)
    first, size = outer * P.channels + channel, outers.to(tl.int64) * P.channels * parts
    rest = _scale_of_parts(partials_ptr, parts, first, maps, size, P, PARTS)
    plain = _scale_of_parts(partials_ptr + 2 * size, parts, first, maps, size, P, PARTS)
    x_ptr += outer * (P.pixels * P.channels) + channel
    lfc_ptr += outer * (P.means * P.channels) + channel
    last = tl.minimum((part + 1) * tiles, P.tiles)
    with_means, without = _scan_errors(x_ptr, lfc_ptr, part * tiles, last, maps, rest, plain, P)
    map = tl.arange(0, P.maps)
    errors_ptr += (first + map) * parts + part
    tl.store(errors_ptr, with_means, mask=map < maps)
    tl.store(errors_ptr + size, without, mask=map < maps)


@triton.jit
def finish_kernel(
    lfc_ptr,
    low_ptr,
    step_ptr,
    inverse_ptr,
    partials_ptr,
    errors_ptr,
    outers,
    parts,
    P: tl.constexpr,
    PARTS: tl.constexpr,
):
    """low and step of maps from their parts; auto: of the better way, and zeros for means where that is the one without."""
    outer, channel, maps = _own_maps(tl.program_id(0), outers, P)
    first, size = outer * P.channels + channel, outers.to(tl.int64) * P.channels * parts
    scale = _scale_of_parts(partials_ptr, parts, first, maps, size, P, PARTS)
    if P.auto:
        plain = _scale_of_parts(partials_ptr + 2 * size, parts, first, maps, size, P, PARTS)
        with_means = tl.sum(_partials(errors_ptr, parts, first, maps, 0.0, P, PARTS), axis=1)
        without = tl.sum(_partials(errors_ptr + size, parts, first, maps, 0.0, P, PARTS), axis=1)
        is_plain, scale = _better(with_means, without, scale, plain)
        _leave_out(lfc_ptr + outer * (P.means * P.channels) + channel, is_plain, P.tiles, maps, P)
    _store_scale(low_ptr, step_ptr, inverse_ptr, scale, first, maps, P)


@triton.jit
def _unit(outers, chunk, P: tl.constexpr):
    """Programs of kernels that go over memory in order: (first outer of this one's unit, where its chunk begins in that, how many elements
    the unit has)."""
    outer = (tl.program_id(0) // P.chunks).to(tl.int64) * P.units
    part = tl.program_id(0) % P.chunks
    limit = tl.minimum(outers - outer, P.units) * (P.pixels * P.channels)
    if P.units * P.pixels * P.channels + chunk * P.chunks < 2**31:
        return outer, part * chunk, limit.to(tl.int32)
    else:
        return outer, part.to(tl.int64) * chunk, limit


@triton.jit
def codes_kernel(x_ptr, seed_ptr, lfc_ptr, codes_ptr, low_ptr, inverse_ptr, outers, P: tl.constexpr):
    """Codes in memory order, from finished means, low and step."""
    outer, start, limit = _unit(outers, P.threads * 8, P)
    eight, map = outer * (P.pixels * P.channels) // 8, outer * P.channels
    pointers = lfc_ptr + map * P.means, low_ptr + map, inverse_ptr + map
    first = start + tl.arange(0, P.threads) * 8
    seed = tl.load(seed_ptr)
    _encode_eights(x_ptr + eight * 8, pointers, codes_ptr + eight * P.bits, seed, eight, first, first < limit, limit, P)


@triton.jit
def _unpack(ptr, first, limit, BITS: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr):
    """Codes of LANES neighbours from each of `first` on, int32 [T, LANES]; ptr[0] holds that of element 0."""
    BYTES: tl.constexpr = (LANES * BITS + 7) // 8
    byte = (first * BITS // 8)[:, None] + tl.arange(0, BYTES)[None, :]
    if WHOLE:
        packed = tl.load(ptr + byte).to(tl.int32)
    else:
        packed = tl.load(ptr + byte, mask=byte * 8 < limit * BITS, other=0).to(tl.int32)
    if LANES * BITS < 8:  # half a byte
        packed = packed >> (first % 8)[:, None]
    shift = tl.arange(0, LANES // BYTES) * BITS
    return tl.reshape(packed[:, :, None] >> shift[None, None, :], [first.shape[0], LANES]) & (2**BITS - 1)


@triton.jit
def decode_kernel(lfc_ptr, codes_ptr, low_ptr, step_ptr, mask_ptr, x_ptr, outers, P: tl.constexpr, LANES: tl.constexpr):
    """x in memory order, LANES neighbours a thread, 16 bytes; zero where the mask, if there is one, is."""
    outer, start, limit = _unit(outers, P.threads * LANES, P)
    base, map = outer * (P.pixels * P.channels), outer * P.channels
    first = start + tl.arange(0, P.threads) * LANES
    if P.whole:
        at = tl.minimum(first // LANES, limit // LANES - 1) * LANES
    else:
        at = tl.minimum(first, limit - 1)
    pointers = lfc_ptr + map * P.means, low_ptr + map, step_ptr + map
    mean, low, step = _parameters(pointers, at, limit, P, LANES)
    at = at if P.whole else first
    codes = _unpack(codes_ptr + base // 8 * P.bits, at, limit, P.bits, LANES, P.whole)
    x = codes.to(tl.float32) * step + low + mean
    if mask_ptr is not None:
        x = tl.where(_unpack(mask_ptr + base // 8, at, limit, 1, LANES, P.whole) != 0, x, 0.0)
    element = first[:, None] + tl.arange(0, LANES)[None, :]
    tl.store(x_ptr + base + element, x, mask=(first < limit)[:, None] if P.whole else element < limit)
