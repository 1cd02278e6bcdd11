"""Device code of DIVISION, first half: block means, extremes and expected errors. What is computed is in division.py.

Memory is seen as [outer, pixels, channels]: maps one after the other (NCHW) are `outer` with one channel, channels_last is what it says.
bf16 travels as int16 (rounding.py).

A tile is [maps, blocks, columns of a block], one for each row of a block, so that a thread holds columns of blocks from top to bottom.
"""

from .launch import tl, triton
from .rounding import bf16_floor_bits, bf16_nearest_bits, bf16_value, finite_bits


@triton.jit
def own_maps(program, outers, P: tl.constexpr):
    """The maps of a program: (outer of the first, its channel, how many there are)."""
    if P.channels == 1:
        outer = program.to(tl.int64) * P.maps
        return outer, program * 0, tl.minimum(outers - outer, P.maps).to(tl.int32)
    else:
        PER_OUTER: tl.constexpr = (P.channels + P.maps - 1) // P.maps
        channel = program % PER_OUTER * P.maps
        return (program // PER_OUTER).to(tl.int64), channel, tl.minimum(P.channels - channel, P.maps)


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
def _offsets(maps, each, P: tl.constexpr):
    """Offsets of a program's maps in memory that holds `each` per map. Maps that are not there repeat the last."""
    map = tl.minimum(tl.arange(0, P.maps), maps - 1)
    return map * each if P.channels == 1 else map


@triton.jit
def tile(x_ptr, i, maps, P: tl.constexpr):
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
    at = _offsets(maps, P.means, P)[:, None] + block_of(pixel, P) * P.channels
    mean = tl.load(lfc_ptr + at)
    if P.pixels * P.channels >= 2**31:
        pixel = pixel.to(tl.int64)
    x = tl.load(x_ptr + _offsets(maps, P.pixels, P)[:, None] + pixel * P.channels).to(tl.float32)[:, :, None]
    return (x,), (x == x,), mean


@triton.jit
def store_means(lfc_ptr, mean, i, maps, P: tl.constexpr):
    map, block = tl.arange(0, P.maps)[:, None], (i * P.tile + tl.arange(0, P.tile))[None, :]
    at = map * P.means + block if P.channels == 1 else map + block * P.channels
    tl.store(lfc_ptr + at, mean, mask=(map < maps) & (block < P.means))


@triton.jit
def _all(x):
    """[maps, blocks, columns] -> [maps, all of a map]. What is then joined is reduced together, one reduction instead of several."""
    return tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]])


@triton.jit
def extremes(x, mean, P: tl.constexpr):
    """(-least, greatest, -least, greatest) of the high frequencies and, auto, of x, each fp32 [maps]. NaN is left out; where the mean
    is not finite, the greatest is infinite."""
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
def scan(x_ptr, lfc_ptr, first, last, maps, P: tl.constexpr):
    """Extremes of tiles first .. last - 1, whose means are stored."""
    a = tl.full([P.maps], float("-inf"), tl.float32)
    b, c, d = a, a, a
    for i in range(first, last):
        if P.known:
            x, _, mean = _pixels(x_ptr, lfc_ptr, i, maps, P)
        else:
            x, _, mean = tile(x_ptr, i, maps, P)
            store_means(lfc_ptr, mean, i, maps, P)
        e, f, g, h = extremes(x, mean, P)
        a, b, c, d = tl.maximum(a, e), tl.maximum(b, f), tl.maximum(c, g), tl.maximum(d, h)
    return a, b, c, d


@triton.jit
def scale_of(least, greatest, P: tl.constexpr):
    """From minus the least and the greatest: (bits of low, of step, what differences are multiplied with). NaN if these, or the range,
    are infinite."""
    zero = (least - least) + (greatest - greatest)
    low = finite_bits(bf16_floor_bits(zero - least))
    minus_range = bf16_value(low) - greatest
    minus_range += minus_range - minus_range
    step = finite_bits(bf16_floor_bits(tl.div_rn(minus_range, 2.0**P.bits - 1))) ^ -0x8000  # its negative
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
def errors(x, inside, mean, i, rest, plain, P: tl.constexpr):
    """(of the high frequencies, of x), [maps], in steps squared, of tile i; rest, plain: their scales."""
    least = bf16_value(mean)[:, :, None] + bf16_value(rest[0])[:, None, None]
    with_means = _error(x, inside, least, rest[2][:, None, None], P)
    without = _error(x, inside, bf16_value(plain[0])[:, None, None], plain[2][:, None, None], P)
    exists = (i * P.tile + tl.arange(0, P.tile) < (P.pixels if P.known else P.means))[None, :, None]
    both = tl.join(_all(tl.where(exists, with_means, 0.0)), _all(tl.where(exists, without, 0.0)))
    return tl.split(tl.sum(both, axis=1))


@triton.jit
def scan_errors(x_ptr, lfc_ptr, first, last, maps, rest, plain, P: tl.constexpr):
    """The same of tiles first .. last - 1."""
    with_means, without = tl.full([P.maps], 0.0, tl.float32), tl.full([P.maps], 0.0, tl.float32)
    for i in range(first, last):
        if P.known:
            x, inside, mean = _pixels(x_ptr, lfc_ptr, i, maps, P)
        else:
            x, inside, mean = tile(x_ptr, i, maps, P)
        a, b = errors(x, inside, mean, i, rest, plain, P)
        with_means, without = with_means + a, without + b
    return with_means, without


@triton.jit
def better(with_means, without, rest, plain):
    """Of two scales that with the lesser error: (which maps are plain, their scales). Errors are in steps squared."""
    rest_step, plain_step = bf16_value(rest[1]), bf16_value(plain[1])
    is_plain = without * (plain_step * plain_step) < with_means * (rest_step * rest_step)
    is_plain |= (with_means != with_means) & (without == without)  # means that are not finite, of an x that is
    low, step = tl.where(is_plain, plain[0], rest[0]), tl.where(is_plain, plain[1], rest[1])
    return is_plain, (low, step, tl.where(is_plain, plain[2], rest[2]))


@triton.jit
def leave_out(lfc_ptr, is_plain, tiles, maps, P: tl.constexpr):
    """Zero the means, stored before, of the first `tiles` tiles of plain maps."""
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


@triton.jit
def means_kernel(x_ptr, lfc_ptr, outers, P: tl.constexpr, LANES: tl.constexpr):
    """Means of blocks of any size, LANES pixels at a time."""
    outer, channel, maps = own_maps(tl.program_id(0) // P.tiles, outers, P)
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
    store_means(lfc_ptr + outer * (P.means * P.channels) + channel, bf16_nearest_bits(mean), i, maps, P)


@triton.jit
def partials_kernel(x_ptr, lfc_ptr, partials_ptr, outers, parts, tiles, P: tl.constexpr):
    """Extremes of part of a map, `tiles` tiles of it, to partials [4, maps, parts]."""
    part = tl.program_id(0) % parts
    outer, channel, maps = own_maps(tl.program_id(0) // parts, outers, P)
    x_ptr += outer * (P.pixels * P.channels) + channel
    lfc_ptr += outer * (P.means * P.channels) + channel
    a, b, c, d = scan(x_ptr, lfc_ptr, part * tiles, tl.minimum((part + 1) * tiles, P.tiles), maps, P)
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
    return scale_of(least, greatest, P)


@triton.jit
def errors_kernel(x_ptr, lfc_ptr, partials_ptr, errors_ptr, outers, parts, tiles, P: tl.constexpr, PARTS: tl.constexpr):
    """Expected errors of the same parts, with and without means, to errors [2, maps, parts]."""
    part = tl.program_id(0) % parts
    outer, channel, maps = own_maps(tl.program_id(0) // parts, outers, P)
    first, size = outer * P.channels + channel, outers.to(tl.int64) * P.channels * parts
    rest = _scale_of_parts(partials_ptr, parts, first, maps, size, P, PARTS)
    plain = _scale_of_parts(partials_ptr + 2 * size, parts, first, maps, size, P, PARTS)
    x_ptr += outer * (P.pixels * P.channels) + channel
    lfc_ptr += outer * (P.means * P.channels) + channel
    last = tl.minimum((part + 1) * tiles, P.tiles)
    with_means, without = scan_errors(x_ptr, lfc_ptr, part * tiles, last, maps, rest, plain, P)
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
    outer, channel, maps = own_maps(tl.program_id(0), outers, P)
    first, size = outer * P.channels + channel, outers.to(tl.int64) * P.channels * parts
    scale = _scale_of_parts(partials_ptr, parts, first, maps, size, P, PARTS)
    if P.auto:
        plain = _scale_of_parts(partials_ptr + 2 * size, parts, first, maps, size, P, PARTS)
        with_means = tl.sum(_partials(errors_ptr, parts, first, maps, 0.0, P, PARTS), axis=1)
        without = tl.sum(_partials(errors_ptr + size, parts, first, maps, 0.0, P, PARTS), axis=1)
        is_plain, scale = better(with_means, without, scale, plain)
        leave_out(lfc_ptr + outer * (P.means * P.channels) + channel, is_plain, P.tiles, maps, P)
    store_scale(low_ptr, step_ptr, inverse_ptr, scale, first, maps, P)
