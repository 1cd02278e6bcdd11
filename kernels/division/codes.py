"""Device code of DIVISION: codes, made and decoded in memory order, and the kernel that encodes whole maps in one pass.

A thread owns neighbours: an "eight", whose codes fill whole bytes, or the two eights of a "sixteen", which share a draw of 8-bit noise
(kernels/common/noise.py). A load takes 16 bytes of an eight.
"""

from actpress.kernels.common.bits import load8, load_at, pack8, store_words, unpack_at
from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.noise import draws
from actpress.kernels.common.rounding import bf16_value, saturate
from actpress.kernels.division.tiles import (
    better,
    block_of,
    errors_at,
    extremes,
    leave_out,
    no_errors,
    no_extremes,
    of_maps,
    own_maps,
    scale_of,
    scan,
    scan_errors,
    store_means,
    store_scale,
    sum_of_maps,
    tile,
)


@triton.jit
def _fp32(ptr, at):
    """Load fp32 values, or bf16 values that are stored as int16 bits."""
    if ptr.dtype.element_ty == tl.int16:
        return bf16_value(tl.load(ptr + at))
    else:
        return tl.load(ptr + at)


@triton.jit
def _parameters(pointers, first, limit, P: tl.constexpr, LANES: tl.constexpr):
    """(mean, low, scale) of LANES neighbours from each of `first` on: [T] -> [T, LANES].

    pointers: to mean, low and scale of the first map. first < limit, the number of elements.
    """
    lfc_ptr, low_ptr, scale_ptr = pointers
    if P.in_row:
        if first.dtype == tl.int32:
            first = first.to(tl.uint32)  # divides faster
        pixel, channel, lane = first // P.channels, first % P.channels, tl.arange(0, LANES)[None, :]
        outer, block = pixel // P.pixels, block_of(pixel % P.pixels, P)
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
    """Parameters of elements first + OFFSET, first + OFFSET + STRIDE, ... below LANES, each looked up by itself: [T] -> [T, 2, 2, ...].

    They are joined from halves, so they stay with the thread that looked them up; those of a load of [T, LANES] would not.
    """
    if STRIDE + OFFSET >= LANES:
        return _look_up(pointers, first, limit, here, after, P, LANES, OFFSET)
    else:
        a, b, c = _tree(pointers, first, limit, here, after, P, LANES, OFFSET, 2 * STRIDE)
        d, e, f = _tree(pointers, first, limit, here, after, P, LANES, OFFSET + STRIDE, 2 * STRIDE)
        return tl.join(a, d), tl.join(b, e), tl.join(c, f)


@triton.jit
def _look_up(pointers, first, limit, here, after, P: tl.constexpr, LANES: tl.constexpr, OFFSET: tl.constexpr):
    """Parameters of elements first + OFFSET.

    here, after: (number, mean of its first block, low, scale) of the map that holds `first`, and of the next map.
    """
    lfc_ptr, low_ptr, scale_ptr = pointers
    if P.channels == 1 and P.pixels >= LANES:
        outer, mean, low, scale = here
        pixel = (first % P.pixels + OFFSET).to(tl.uint32)  # divides faster
        if P.pixels % LANES:  # the map may end within these neighbours; at most one other begins
            next = pixel >= P.pixels
            pixel = tl.where(next, pixel - P.pixels, pixel)
            outer, mean = tl.where(next, after[0], outer), tl.where(next, after[1], mean)
            low, scale = tl.where(next, after[2], low), tl.where(next, after[3], scale)
        if P.means > 1:
            mean = _fp32(lfc_ptr, outer * P.means + block_of(pixel, P))
        return mean, low, scale
    else:
        element = tl.minimum(first + OFFSET, limit - 1)
        channel, pixel = element % P.channels, element // P.channels
        outer, block = pixel // P.pixels, block_of(pixel % P.pixels, P)
        map = outer * P.channels + channel
        return (
            _fp32(lfc_ptr, (outer * P.means + block) * P.channels + channel),
            _fp32(low_ptr, map),
            _fp32(scale_ptr, map),
        )


@triton.jit
def _spread(x, LANES: tl.constexpr):
    """[T, 2, 2, ...] -> [T, LANES]; each value is repeated for its neighbours."""
    COUNT: tl.constexpr = x.numel // x.shape[0]
    x = tl.reshape(x, [x.shape[0], COUNT, 1])
    return tl.reshape(tl.broadcast_to(x, [x.shape[0], COUNT, LANES // COUNT]), [x.shape[0], LANES])


@triton.jit
def _codes(x, mean, low, inverse, noise, first, limit, P: tl.constexpr):
    """Codes uint32 [T, 8] of elements from first [T] on; 0 past the limit."""
    steps = (x - mean - low) * inverse + noise
    steps = tl.minimum(steps, 2.0**P.bits - 1, propagate_nan=tl.PropagateNan.ALL)
    if not P.whole:  # the padding of the last byte is 0
        steps = tl.where(first[:, None] + tl.arange(0, 8)[None, :] < limit, steps, 0.0)
    return steps.to(tl.uint32)  # cuts off: floor, as there is no sign; NaN becomes 0


@triton.jit
def _store_codes(codes_ptr, codes, first, exists, limit, P: tl.constexpr):
    """Store the codes of P.lanes elements, one or two eights, from first [T] on."""
    EIGHTS: tl.constexpr = P.lanes // 8
    if P.whole:
        store_words(codes_ptr, codes, first, exists, P.bits)
    else:
        for e in tl.static_range(EIGHTS):
            byte = (first // 8 + e)[:, None] * P.bits + tl.arange(0, P.bits)[None, :]
            tl.store(codes_ptr + byte, pack8(codes[e], P.bits), mask=exists[:, None] & (byte * 8 < limit * P.bits))


@triton.jit
def _encode_neighbours(x_ptr, pointers, codes_ptr, seed, start, first, exists, limit, P: tl.constexpr):
    """Make the codes of the P.lanes neighbours from elements first [T] on.

    Pointers are to the first of `limit` elements, of whole maps; `start` is the number of that element in the whole tensor.
    """
    EIGHTS: tl.constexpr = P.lanes // 8
    if P.whole:
        # written so that the compiler sees the alignment
        at = tl.minimum(first // P.lanes, limit // P.lanes - 1) * P.lanes
    else:
        at = first
    noise = draws(seed, start, first, P.bits, EIGHTS)
    codes = ()
    for e in tl.static_range(EIGHTS):
        known = at + 8 * e if P.whole else tl.minimum(at + 8 * e, limit - 1)
        mean, low, inverse = _parameters(pointers, known, limit, P, 8)
        x = load8(x_ptr, at + 8 * e, limit, P.whole)
        codes = codes + (_codes(x, mean, low, inverse, noise[e], first + 8 * e, limit, P),)  # noqa: RUF005
    _store_codes(codes_ptr, codes, first, exists, limit, P)


@triton.jit
def _eight(ptr, at):
    """fp32 [T, 8] from each of `at` on, 16 bytes a load; int16 is read as the bits of bf16."""
    if ptr.dtype.element_ty == tl.int16:
        return bf16_value(load_at(ptr, at, 0, 8, True))
    else:
        return load8(ptr, at, 0, True)


@triton.jit
def _encode_channels(x_ptr, pointers, codes_ptr, seed, start, channel, P: tl.constexpr):
    """Make the codes of P.maps channels from `channel` on. A thread has the same P.lanes channels in each pixel and loads their low and
    inverse once."""
    lfc_ptr, low_ptr, inverse_ptr = pointers
    EIGHTS: tl.constexpr = P.lanes // 8
    PER_PIXEL: tl.constexpr = P.maps // P.lanes
    index = tl.arange(0, P.threads)
    own = channel + index % PER_PIXEL * P.lanes
    there = own < P.channels
    if P.partial:
        own = tl.minimum(own // P.lanes, P.channels // P.lanes - 1) * P.lanes
    low, inverse = (), ()
    for e in tl.static_range(EIGHTS):
        low = low + (_eight(low_ptr, own + 8 * e),)  # noqa: RUF005
        inverse = inverse + (_eight(inverse_ptr, own + 8 * e),)  # noqa: RUF005
    for i in range(0, P.pixels, P.threads // PER_PIXEL):
        pixel = (i + index // PER_PIXEL).to(tl.uint32)  # divides faster
        exists = there & (pixel < P.pixels)
        pixel = tl.minimum(pixel, P.pixels - 1)
        first = pixel.to(tl.int32) * P.channels + own
        block = block_of(pixel, P).to(tl.int32) * P.channels + own
        noise = draws(seed, start, first, P.bits, EIGHTS)
        codes = ()
        for e in tl.static_range(EIGHTS):
            mean, x = _eight(lfc_ptr, block + 8 * e), _eight(x_ptr, first + 8 * e)
            codes = codes + (_codes(x, mean, low[e], inverse[e], noise[e], first, 0, P),)  # noqa: RUF005
        _store_codes(codes_ptr, codes, first, exists, 0, P)


@triton.jit
def encode_kernel(x_ptr, seed_ptr, lfc_ptr, codes_ptr, low_ptr, step_ptr, inverse_ptr, outers, P: tl.constexpr):
    """Encode P.maps maps a program: means, extremes, expected errors, low and step, codes.

    A cache serves the second read of the sampled rows, for expected errors, and the second read of all rows, for the codes.
    """
    LAST: tl.constexpr = P.tiles - 1
    outer, channel, maps = own_maps(tl.program_id(0), outers, P)
    x_ptr += outer * (P.pixels * P.channels)
    lfc_ptr += outer * (P.means * P.channels)
    low_ptr += outer * P.channels
    inverse_ptr += outer * P.channels
    own_x_ptr, own_lfc_ptr = x_ptr + channel, lfc_ptr + channel
    if LAST > 0:
        lanes = scan(own_x_ptr, own_lfc_ptr, 0, P.tiles, maps, P)
    else:
        x, total, mean = tile(own_x_ptr, 0, maps, P)
        lanes = extremes(no_extremes(P), x, total, mean, P)
    a, b, c, d = of_maps(lanes, P)
    scale = scale_of(a, b, P)
    if P.auto:
        plain = scale_of(c, d, P)
        if LAST > 0:
            tl.debug_barrier()  # means that other threads stored are read from here on
            lanes = scan_errors(own_x_ptr, own_lfc_ptr, 0, P.tiles, maps, scale, plain, P)
        else:
            lanes = errors_at(no_errors(P), own_x_ptr, mean, 0, maps, scale, plain, P)
        with_means, without = sum_of_maps(lanes, P)
        is_plain, scale = better(with_means, without, scale, plain)
        if LAST > 0:
            tl.debug_barrier()
            leave_out(own_lfc_ptr, is_plain, P.tiles, maps, P)
        else:
            mean = tl.where(is_plain[:, None], 0, mean)
    if LAST == 0:
        store_means(own_lfc_ptr, mean, 0, maps, P)
    store_scale(low_ptr, step_ptr + outer * P.channels, inverse_ptr, scale, channel, maps, P)

    if P.codes:
        tl.debug_barrier()  # what other threads stored is read from here on
        pointers = lfc_ptr, low_ptr, inverse_ptr
        seed = tl.load(seed_ptr)
        start = outer * (P.pixels * P.channels)
        codes_ptr += start // 8 * P.bits
        if P.channels == 1:
            limit = maps * P.pixels
            for i in range(0, (P.maps * P.pixels + P.lanes - 1) // P.lanes, P.threads):
                first = (i + tl.arange(0, P.threads)) * P.lanes
                _encode_neighbours(x_ptr, pointers, codes_ptr, seed, start, first, first < limit, limit, P)
        else:
            _encode_channels(x_ptr, pointers, codes_ptr, seed, start, channel, P)


@triton.jit
def _unit(outers, chunk, P: tl.constexpr):
    """The share of a program that runs over memory in order: (first outer of its unit, start of its chunk in the unit, elements of the
    unit)."""
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
    outer, chunk, limit = _unit(outers, P.threads * P.lanes, P)
    start, map = outer * (P.pixels * P.channels), outer * P.channels
    pointers = lfc_ptr + map * P.means, low_ptr + map, inverse_ptr + map
    first = chunk + tl.arange(0, P.threads) * P.lanes
    seed = tl.load(seed_ptr)
    codes_ptr += start // 8 * P.bits
    _encode_neighbours(x_ptr + start, pointers, codes_ptr, seed, start, first, first < limit, limit, P)


@triton.jit
def decode_kernel(lfc_ptr, codes_ptr, low_ptr, step_ptr, mask_ptr, x_ptr, outers, P: tl.constexpr, LANES: tl.constexpr):
    """x in memory order, LANES neighbours (16 bytes) a thread; zero where the mask, if there is one, is 0."""
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
    codes = unpack_at(codes_ptr + base // 8 * P.bits, at, (limit * P.bits + 7) // 8, P.bits, LANES, P.whole)
    x = saturate(codes.to(tl.float32) * step + low + mean, x_ptr.dtype.element_ty)
    if mask_ptr is not None:
        x = tl.where(unpack_at(mask_ptr + base // 8, at, (limit + 7) // 8, 1, LANES, P.whole) != 0, x, 0.0)
    element = first[:, None] + tl.arange(0, LANES)[None, :]
    tl.store(x_ptr + base + element, x, mask=(first < limit)[:, None] if P.whole else element < limit)
