"""Device code of DIVISION, second half: codes, made and decoded in memory order, and the kernel that does all at once.

Threads own neighbours: an "eight", whose elements share a draw of noise and whose codes fill whole bytes.
"""

from .bits import pack8
from .division_tiles import (
    better,
    block_of,
    errors,
    extremes,
    leave_out,
    own_maps,
    scale_of,
    scan,
    scan_errors,
    store_means,
    store_scale,
    tile,
)
from .launch import tl, triton
from .noise import uniform8
from .rounding import bf16_value, saturate


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
        return tl.load(x_ptr + element, mask=element < limit, other=0.0)


@triton.jit
def _load_eights(x_ptr, first, limit, WHOLE: tl.constexpr):
    """[T] -> fp32 [T, 8], each eight with one thread: fp32 in halves, of 16 bytes as a thread loads them."""
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
    if not P.whole:  # what fills the last byte is 0
        steps = tl.where(first[:, None] + tl.arange(0, 8)[None, :] < limit, steps, 0.0)
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
    outer, channel, maps = own_maps(tl.program_id(0), outers, P)
    x_ptr += outer * (P.pixels * P.channels)
    lfc_ptr += outer * (P.means * P.channels)
    low_ptr += outer * P.channels
    inverse_ptr += outer * P.channels
    own_x_ptr, own_lfc_ptr = x_ptr + channel, lfc_ptr + channel
    a, b, c, d = scan(own_x_ptr, own_lfc_ptr, 0, LAST, maps, P)
    x, inside, mean = tile(own_x_ptr, LAST, maps, P)
    e, f, g, h = extremes(x, mean, P)
    scale = scale_of(tl.maximum(a, e), tl.maximum(b, f), P)
    if P.auto:
        plain = scale_of(tl.maximum(c, g), tl.maximum(d, h), P)
        with_means, without = errors(x, inside, mean, LAST, scale, plain, P)
        more_with, more_without = scan_errors(own_x_ptr, own_lfc_ptr, 0, LAST, maps, scale, plain, P)
        is_plain, scale = better(with_means + more_with, without + more_without, scale, plain)
        mean = tl.where(is_plain[:, None], 0, mean)
        if LAST > 0:
            tl.debug_barrier()  # other threads stored them
            leave_out(own_lfc_ptr, is_plain, LAST, maps, P)
    store_means(own_lfc_ptr, mean, LAST, maps, P)
    store_scale(low_ptr, step_ptr + outer * P.channels, inverse_ptr, scale, channel, maps, P)

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
    x = saturate(codes.to(tl.float32) * step + low + mean, x_ptr.dtype.element_ty)
    if mask_ptr is not None:
        x = tl.where(_unpack(mask_ptr + base // 8, at, limit, 1, LANES, P.whole) != 0, x, 0.0)
    element = first[:, None] + tl.arange(0, LANES)[None, :]
    tl.store(x_ptr + base + element, x, mask=(first < limit)[:, None] if P.whole else element < limit)
