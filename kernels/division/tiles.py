"""Device code of DIVISION: block means, extremes and expected errors of a tile. The formulas are in the docstring of the package.

Memory is seen as [outer, pixels, channels]: maps one after the other (NCHW) are `outer` with one channel, channels_last is what it says.
bf16 is passed as int16 (kernels/common/rounding.py).

A tile is [maps, blocks, columns of a block], one for each row of a block, so that a thread holds columns of blocks from top to bottom.
In channels_last order it holds those of eight neighbouring channels: a load takes 16 bytes of bf16. The compiler recognises neighbours only
where nothing clamps their numbers, so channels past the last are masked. Reductions over a map run over tiles first, lane by lane, and
across threads once.
"""

from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.rounding import bf16_floor_bits, bf16_nearest_bits, bf16_value, finite_bits


@triton.jit
def own_maps(program, outers, P: tl.constexpr):
    """The maps of a program: (outer of the first, its channel, number of maps from it on, which may exceed P.maps for channels)."""
    if P.channels == 1:
        outer = program.to(tl.int64) * P.maps
        return outer, program * 0, tl.minimum(outers - outer, P.maps).to(tl.int32)
    else:
        PER_OUTER: tl.constexpr = (P.channels + P.maps - 1) // P.maps
        channel = program % PER_OUTER * P.maps
        return (program // PER_OUTER).to(tl.int64), channel, P.channels - channel


@triton.jit
def block_of(pixel, P: tl.constexpr):
    """Block that a pixel belongs to."""
    row, column = pixel // P.width, pixel % P.width
    if P.nearest:  # as PyTorch resizes: floor(i * (blocks / size)) in fp32
        row = tl.minimum((row.to(tl.float32) * (P.hb / P.height)).to(tl.int32), P.hb - 1)
        column = tl.minimum((column.to(tl.float32) * (P.wb / P.width)).to(tl.int32), P.wb - 1)
        return row * P.wb + column
    else:
        return row // P.kh * P.wb + column // P.kw


@triton.jit
def offsets(maps, each, P: tl.constexpr):
    """Offsets of a program's maps in memory with `each` elements per map.

    Maps past the last repeat it; channels past the last have to be masked.
    """
    map = tl.arange(0, P.maps)
    return tl.minimum(map, maps - 1) * each if P.channels == 1 else map


@triton.jit
def _place(i, maps, P: tl.constexpr):
    """(offsets of the first rows [maps, blocks, columns]; first row, first column of blocks [blocks]; which columns exist
    [blocks, columns]) of tile i. Blocks past the last repeat it."""
    block = tl.minimum(i * P.tile + tl.arange(0, P.tile), P.means - 1)
    top, left = block // P.wb * P.kh, block % P.wb * P.kw
    lane = tl.arange(0, P.columns)[None, :]
    column = left[:, None] + lane
    there = (lane < P.kw) & (column < P.width)
    if P.pixels * P.channels >= 2**31:
        column = column.to(tl.int64)
    at = offsets(maps, P.pixels, P)[:, None, None] + ((top[:, None] * P.width + column) * P.channels)[None, :, :]
    return at, top, left, there


@triton.jit
def _row(x_ptr, place, r: tl.constexpr, maps, P: tl.constexpr):
    """Row r of the blocks of a tile: (fp32 [maps, blocks, columns], NaN in lanes that are no pixels; which lanes are pixels)."""
    at, top, _, there = place
    pixels = ((top[:, None] + r < P.height) & there)[None, :, :]
    at += r * P.width * P.channels
    mask = pixels & (tl.arange(0, P.maps) < maps)[:, None, None] if P.partial else pixels
    if P.ragged or P.partial:
        row = tl.load(x_ptr + at, mask=mask, other=float("nan"))
    else:
        row = tl.load(x_ptr + at)
    return row.to(tl.float32), pixels


@triton.jit
def tile(x_ptr, i, maps, P: tl.constexpr):
    """(x: a tuple of the rows of blocks, each [maps, blocks, columns]; the sum over rows; bits of the means [maps, blocks]) of tile i.

    Blocks past the last repeat it; lanes that are no pixels hold NaN.
    """
    ROWS: tl.constexpr = P.kh
    place = _place(i, maps, P)
    _, top, left, _ = place
    x = ()
    total = tl.full([P.maps, P.tile, P.columns], 0.0, tl.float32)
    for r in tl.static_range(ROWS):
        row, pixels = _row(x_ptr, place, r, maps, P)
        total += tl.where(pixels, row, 0.0) if P.ragged else row
        x = x + (row,)  # noqa: RUF005 - Triton has no unpacking
    mean = tl.sum(total, axis=2)
    if P.ragged:
        count = tl.minimum(P.height - top, P.kh) * tl.minimum(P.width - left, P.kw)
        mean = tl.div_rn(mean, count.to(tl.float32)[None, :])
    else:
        mean *= 1.0 / (P.kh * P.kw)  # a power of two: as exact as a division
    return x, total, bf16_nearest_bits(mean)


@triton.jit
def _sample(x_ptr, i, maps, P: tl.constexpr):
    """The sampled rows of tile i, for expected errors: (x, which lanes are pixels of such rows), two tuples."""
    ROWS: tl.constexpr = P.kh
    place = _place(i, maps, P)
    _, top, _, _ = place
    x, inside = (), ()
    STRIDE: tl.constexpr = P.stride
    for r in tl.static_range(0, ROWS, STRIDE):
        row, pixels = _row(x_ptr, place, r, maps, P)
        if P.every > P.stride:
            pixels &= ((top + r) % P.every == 0)[None, :, None]
        x, inside = x + (row,), inside + (pixels,)  # noqa: RUF005
    return x, inside


@triton.jit
def _means(lfc_ptr, i, maps, P: tl.constexpr):
    """Bits of the stored means of tile i: [maps, blocks, 1] or, of channels, [maps, blocks, columns], as the pixels are held."""
    block = tl.minimum(i * P.tile + tl.arange(0, P.tile), P.means - 1)
    if P.channels == 1:
        return tl.load(lfc_ptr + offsets(maps, P.means, P)[:, None] + block[None, :])[:, :, None]
    else:
        map = tl.arange(0, P.maps)[:, None, None]
        at = map + (block * P.channels)[None, :, None] + tl.full([1, 1, P.columns], 0, tl.int32)
        if P.partial:
            return tl.load(lfc_ptr + at, mask=map < maps, other=0)
        else:
            return tl.load(lfc_ptr + at)


@triton.jit
def _pixels(x_ptr, lfc_ptr, i, maps, P: tl.constexpr):
    """A tile where means are known, of blocks of one pixel: (x, which lanes are pixels of sampled rows, two tuples; bits of the means).

    Pixels past the last repeat it.
    """
    pixel = tl.minimum(i * P.tile + tl.arange(0, P.tile), P.pixels - 1)[None, :]
    at = offsets(maps, P.means, P)[:, None] + block_of(pixel, P) * P.channels
    inside = (pixel // P.width % P.every == 0)[:, :, None]
    if P.pixels * P.channels >= 2**31:
        pixel = pixel.to(tl.int64)
    x_at = offsets(maps, P.pixels, P)[:, None] + pixel * P.channels
    if P.partial:
        there = (tl.arange(0, P.maps) < maps)[:, None]
        mean, x = tl.load(lfc_ptr + at, mask=there, other=0), tl.load(x_ptr + x_at, mask=there, other=0.0)
    else:
        mean, x = tl.load(lfc_ptr + at), tl.load(x_ptr + x_at)
    x = x.to(tl.float32)[:, :, None]
    return (x,), (inside & (x == x),), mean


@triton.jit
def store_means(lfc_ptr, mean, i, maps, P: tl.constexpr):
    map, block = tl.arange(0, P.maps)[:, None], (i * P.tile + tl.arange(0, P.tile))[None, :]
    at = map * P.means + block if P.channels == 1 else map + block * P.channels
    tl.store(lfc_ptr + at, mean, mask=(map < maps) & (block < P.means))


@triton.jit
def no_extremes(P: tl.constexpr):
    """The initial value of `extremes`."""
    a = tl.full([P.maps, P.tile, P.columns], float("-inf"), tl.float32)
    return a, a, a, a


@triton.jit
def extremes(before, x, total, mean, P: tl.constexpr):
    """`before`, combined with a tile: (-least, greatest) of the high frequencies and, with P.auto, (-least, greatest) of x.

    Each is fp32 [maps, blocks, columns]. total: sum of x over the rows. The greatest is infinite where the mean is not finite or x is NaN.
    Minimum and maximum ignore NaN, so the sum shows it: a running sum of finite numbers may become infinite, but never NaN.
    """
    ROWS: tl.constexpr = P.rows
    mean = bf16_value(mean)[:, :, None]
    least, greatest = x[0], x[0]
    for r in tl.static_range(1, ROWS):
        least, greatest = tl.minimum(least, x[r]), tl.maximum(greatest, x[r])
    if P.ragged:  # lanes that are no pixels
        least, greatest = tl.minimum(least, float("inf")), tl.maximum(greatest, float("-inf"))
    # Subtracting is monotonous: the extremes of x - mean are those of x, less the mean.
    rest_least, rest_greatest = mean - least, tl.where(mean - mean == 0, greatest - mean, float("inf"))
    if P.known:  # whose x, unlike that of a whole block, may be NaN where the mean is not
        rest_greatest = tl.where(total == total, rest_greatest, float("inf"))
    a, b, c, d = before
    a, b = tl.maximum(a, rest_least), tl.maximum(b, rest_greatest)
    if P.auto:
        return a, b, tl.maximum(c, -least), tl.maximum(d, tl.where(total == total, greatest, float("inf")))
    else:
        return a, b, c, d


@triton.jit
def of_maps(lanes, P: tl.constexpr):
    """`extremes` reduced to [maps] each. Joined tensors are reduced together, by one reduction instead of several.

    One axis is reduced at a time: as one merged axis, blocks and columns may lie in lanes of a warp that are separated by those of maps,
    and Triton up to 3.6 then shuffles wrong lanes (scripts/dev/reductions.py).
    """
    # the first axis is the one along which a thread holds neighbours, or along which warps differ
    FIRST: tl.constexpr = 2 if P.channels == 1 else 1
    a, b, c, d = lanes
    rest = tl.join(a, b)
    if P.auto:
        rest, plain = tl.split(tl.max(tl.max(tl.join(rest, tl.join(c, d)), axis=FIRST), axis=1))
        a, b = tl.split(rest)
        c, d = tl.split(plain)
        return a, b, c, d
    else:
        a, b = tl.split(tl.max(tl.max(rest, axis=FIRST), axis=1))
        return a, b, a, b


@triton.jit
def scan(x_ptr, lfc_ptr, first, last, maps, P: tl.constexpr):
    """`extremes` of tiles first .. last - 1, whose means are stored."""
    lanes = no_extremes(P)
    for i in range(first, last):
        if P.known:
            x, _, mean = _pixels(x_ptr, lfc_ptr, i, maps, P)
            total = x[0]
        else:
            x, total, mean = tile(x_ptr, i, maps, P)
            store_means(lfc_ptr, mean, i, maps, P)
        lanes = extremes(lanes, x, total, mean, P)
    return lanes


@triton.jit
def scale_of(least, greatest, P: tl.constexpr):
    """(bits of low, bits of step, fp32 factor for differences) from minus the least and the greatest. NaN if these or the range are
    infinite."""
    zero = (least - least) + (greatest - greatest)
    low = finite_bits(bf16_floor_bits(zero - least))
    minus_range = bf16_value(low) - greatest
    minus_range += minus_range - minus_range
    step = finite_bits(bf16_floor_bits(tl.div_rn(minus_range, 2.0**P.bits - 1))) ^ -0x8000  # its negative
    return low, step, tl.where(bf16_value(step) > 0, tl.div_rn(1.0, bf16_value(step)), 0.0)


@triton.jit
def _error(before, x, inside, exists, least, inverse, P: tl.constexpr):
    """`before`, plus the expected squared error of stochastic rounding, f (1 - f) in steps, summed over rows.

    f is the fraction of a step that is rounded away, counted from `least`. With r the distance to the nearest code, f (1 - f) = r - r^2,
    and two additions find the nearest code.
    """
    ROWS: tl.constexpr = P.sampled
    offset = -least * inverse
    linear, square = tl.zeros_like(x[0]), tl.zeros_like(x[0])
    for r in tl.static_range(ROWS):
        steps = tl.fma(x[r], inverse, offset)
        distance = steps - ((steps + 1.5 * 2**23) - 1.5 * 2**23)
        if P.ragged or P.every > P.stride:
            distance = tl.where(inside[r], distance, 0.0)
        linear += tl.abs(distance)
        square = tl.fma(distance, distance, square)
    return before + tl.where(exists, linear - square, 0.0)


@triton.jit
def errors(before, x, inside, mean, i, rest, plain, P: tl.constexpr):
    """`before`, plus the expected errors (of the high frequencies, of x) of the sampled rows of tile i.

    [maps, blocks, columns], in steps squared. rest, plain: scales of the high frequencies and of x.
    """
    least = bf16_value(mean) + bf16_value(rest[0])[:, None, None]
    exists = (i * P.tile + tl.arange(0, P.tile) < (P.pixels if P.known else P.means))[None, :, None]
    with_means = _error(before[0], x, inside, exists, least, rest[2][:, None, None], P)
    least = bf16_value(plain[0])[:, None, None]
    return with_means, _error(before[1], x, inside, exists, least, plain[2][:, None, None], P)


@triton.jit
def errors_at(before, x_ptr, mean, i, maps, rest, plain, P: tl.constexpr):
    """`errors` of tile i, which is read from memory; its means are [maps, blocks]."""
    x, inside = _sample(x_ptr, i, maps, P)
    return errors(before, x, inside, mean[:, :, None], i, rest, plain, P)


@triton.jit
def no_errors(P: tl.constexpr):
    zero = tl.full([P.maps, P.tile, P.columns], 0.0, tl.float32)
    return zero, zero


@triton.jit
def scan_errors(x_ptr, lfc_ptr, first, last, maps, rest, plain, P: tl.constexpr):
    """`errors` of tiles first .. last - 1; their means are in memory."""
    lanes = no_errors(P)
    for i in range(first, last):
        if P.known:
            x, inside, mean = _pixels(x_ptr, lfc_ptr, i, maps, P)
            lanes = errors(lanes, x, inside, mean[:, :, None], i, rest, plain, P)
        else:
            x, inside = _sample(x_ptr, i, maps, P)
            lanes = errors(lanes, x, inside, _means(lfc_ptr, i, maps, P), i, rest, plain, P)
    return lanes


@triton.jit
def sum_of_maps(lanes, P: tl.constexpr):
    """`errors` reduced to [maps] each, one axis at a time as in `of_maps`."""
    FIRST: tl.constexpr = 2 if P.channels == 1 else 1
    with_means, without = lanes
    return tl.split(tl.sum(tl.sum(tl.join(with_means, without), axis=FIRST), axis=1))


@triton.jit
def better(with_means, without, rest, plain):
    """The scale with the smaller error of each map: (which maps are plain, scales). Errors are in steps squared."""
    rest_step, plain_step = bf16_value(rest[1]), bf16_value(plain[1])
    is_plain = without * (plain_step * plain_step) < with_means * (rest_step * rest_step)
    is_plain |= (with_means != with_means) & (without == without)  # means that are not finite, of an x that is
    low, step = tl.where(is_plain, plain[0], rest[0]), tl.where(is_plain, plain[1], rest[1])
    return is_plain, (low, step, tl.where(is_plain, plain[2], rest[2]))


@triton.jit
def leave_out(lfc_ptr, is_plain, tiles, maps, P: tl.constexpr):
    """Set the stored means of the first `tiles` tiles of plain maps to zero."""
    zero = tl.full([P.maps, P.tile], 0, tl.int16)
    for i in range(tiles):
        map, block = tl.arange(0, P.maps)[:, None], (i * P.tile + tl.arange(0, P.tile))[None, :]
        at = map * P.means + block if P.channels == 1 else map + block * P.channels
        tl.store(lfc_ptr + at, zero, mask=is_plain[:, None] & (map < maps) & (block < P.means))


@triton.jit
def store_scale(low_ptr, step_ptr, inverse_ptr, scale, first, maps, P: tl.constexpr):
    map = tl.arange(0, P.maps)
    tl.store(low_ptr + first + map, scale[0], mask=map < maps)
    tl.store(step_ptr + first + map, scale[1], mask=map < maps)
    tl.store(inverse_ptr + first + map, scale[2], mask=map < maps)
