"""Device code of group quantisation; what it computes, and when which kernel runs, is in quantize.py.

"Eight": eight elements next to each other in memory, counted from the first element of the tensor. They share a draw of noise, and
their codes fill whole bytes. low and step are bf16, passed as int16.
"""

from .bits import pack8, unpack8
from .launch import tl, triton
from .noise import uniform8
from .rounding import bf16_ceil_bits, bf16_floor_bits, bf16_value, finite_bits, saturate


@triton.jit
def _statistics(low, high, zero, axis: tl.constexpr, BITS: tl.constexpr):
    """Of groups along `axis`: int16 bits of low and step. low and high: the elements, NaN where there is none; zero: 0, or NaN for
    an element that is not finite."""
    poison = tl.sum(zero, axis)
    low = finite_bits(bf16_floor_bits(tl.min(low, axis) + poison))
    size = tl.max(high, axis) + poison - bf16_value(low)
    step = finite_bits(bf16_ceil_bits(tl.div_rn(size + (size - size), 2.0**BITS - 1)))
    return low, step


@triton.jit
def _inverse(step):
    """int16 bits of step -> fp32 by which differences are multiplied."""
    step = bf16_value(step)
    return tl.where(step >= 2.0**-126, tl.div_rn(1.0, step), 0.0)


@triton.jit
def _packed_codes(steps, seed_ptr, eight, BITS: tl.constexpr):
    """Differences in steps, fp32 [K, 8], of the eights `eight`, int64 [K] -> uint8 [K, BITS]. NaN gives the greatest code."""
    if seed_ptr is None:
        steps += 0.5
    else:
        steps += uniform8(tl.load(seed_ptr), eight)
    codes = tl.minimum(steps, 2.0**BITS - 1).to(tl.int32)  # converting cuts off: floor, as there is no sign
    return pack8(codes, BITS)


@triton.jit
def _store_codes(codes_ptr, packed, eight, mask, BITS: tl.constexpr, total):
    """uint8 [K, BITS] to where the eights [K] lie; mask [K]; total: bytes in all, since the last eight may be incomplete."""
    byte = eight[:, None] * BITS + tl.arange(0, BITS)[None, :]
    tl.store(codes_ptr + byte, packed, mask=mask[:, None] & (byte < total))


@triton.jit
def aligned_kernel(
    x_ptr,
    seed_ptr,
    codes_ptr,
    low_ptr,
    step_ptr,
    programs,
    per_row,
    length,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    EIGHTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Groups of consecutive elements that begin and end on eights: read once. `programs` a row, each GROUPS groups of EIGHTS or less.

    In the tile, LANES eights of the first group are followed by as many of the second, and so on; then come the next of the first. So a
    thread, which holds elements that are far apart, holds them of one group: little is left to do across threads and per group."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * GROUPS  # group of the row
    slot = tl.arange(0, GROUPS * EIGHTS)
    k = first + slot // LANES % GROUPS
    within = (slot // (GROUPS * LANES) * LANES + slot % LANES) * 8  # element of the group
    own = (k < per_row) & (within < SIZE) & (k * SIZE + within < length)
    # What is past the end repeats what is before it: nothing to mask in what follows.
    start = tl.minimum(k * SIZE + tl.minimum(within, SIZE - 8), length - 8)
    eight = row * (length // 8) + start // 8
    x = tl.load(x_ptr + eight[:, None] * 8 + tl.arange(0, 8)[None, :]).to(tl.float32)
    x = tl.reshape(x, [EIGHTS // LANES, GROUPS, LANES * 8])
    low, step = _statistics(tl.min(x, 0), tl.max(x, 0), tl.sum(x - x, 0), 1, BITS)
    k = first + tl.arange(0, GROUPS)
    tl.store(low_ptr + row * per_row + k, low, mask=k < per_row)
    tl.store(step_ptr + row * per_row + k, step, mask=k < per_row)
    steps = (x - bf16_value(low)[None, :, None]) * _inverse(step)[None, :, None]
    packed = _packed_codes(tl.reshape(steps, [GROUPS * EIGHTS, 8]), seed_ptr, eight, BITS)
    byte = eight[:, None] * BITS + tl.arange(0, BITS)[None, :]
    tl.store(codes_ptr + byte, packed, mask=own[:, None])


@triton.jit
def rows_kernel(
    x_ptr,
    seed_ptr,
    codes_ptr,
    low_ptr,
    step_ptr,
    programs,
    per_row,
    length,
    total,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    EIGHTS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Groups of consecutive elements anywhere; tile as above, of elements. Codes only where a program's groups, whole ones, fill whole
    eights: there is one row then, and they are read again, from the cache. total: bytes of all codes. BITS = 0: low and step are fp32,
    least and greatest, of parts of a larger group."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * GROUPS  # group of the row
    k = first + tl.arange(0, GROUPS)
    column = (tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :])[:, None, :]
    within = (k * SIZE)[None, :, None] + column  # element of the row
    inside = (column < SIZE) & (within < length)
    x = tl.load(x_ptr + row * length + within, mask=inside, other=float("nan")).to(tl.float32)
    low, high, zero = tl.min(x, 0), tl.max(x, 0), tl.sum(tl.where(inside, x - x, 0.0), 0)
    if BITS == 0:
        poison = tl.sum(zero, 1)
        low, step = tl.min(low, 1) + poison, tl.max(high, 1) + poison
    else:
        low, step = _statistics(low, high, zero, 1, BITS)
    tl.store(low_ptr + row * per_row + k, low, mask=k < per_row)
    tl.store(step_ptr + row * per_row + k, step, mask=k < per_row)
    if codes_ptr is not None:
        local = tl.arange(0, EIGHTS)  # eights of this program
        group = tl.minimum(tl.arange(0, EIGHTS * (8 // SHARE)) * SHARE // SIZE, GROUPS - 1)
        own_low = tl.reshape(tl.gather(bf16_value(low), group, 0), [EIGHTS, 8 // SHARE, 1])
        own_inverse = tl.reshape(tl.gather(_inverse(step), group, 0), [EIGHTS, 8 // SHARE, 1])
        eight = first * SIZE // 8 + local
        element = eight[:, None] * 8 + tl.arange(0, 8)[None, :]
        own = local < GROUPS * SIZE // 8
        there = own[:, None] & (element < length)
        x = tl.load(x_ptr + element, mask=there, other=0.0).to(tl.float32)
        steps = (tl.reshape(x, [EIGHTS, 8 // SHARE, SHARE]) - own_low) * own_inverse
        steps = tl.where(there, tl.reshape(steps, [EIGHTS, 8]), 0.0)  # what fills up the last byte has code 0
        packed = _packed_codes(steps, seed_ptr, eight, BITS)
        _store_codes(codes_ptr, packed, eight, own, BITS, total)


@triton.jit
def finish_kernel(
    least_ptr, greatest_ptr, low_ptr, step_ptr, PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Least and greatest of the PARTS of each group, fp32 [groups, PARTS], to its low and step."""
    group = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    least = tl.full([BLOCK], float("inf"), tl.float32)
    greatest, zero = -least, tl.zeros([BLOCK], tl.float32)
    for first in range(0, PARTS, BLOCK):
        at = group * PARTS + tl.minimum(first + part, PARTS - 1)
        low, high = tl.load(least_ptr + at), tl.load(greatest_ptr + at)
        zero += low - low
        least, greatest = tl.minimum(least, low), tl.maximum(greatest, high)
    low, step = _statistics(least, greatest, zero, 0, BITS)
    tl.store(low_ptr + group, low)
    tl.store(step_ptr + group, step)


@triton.jit
def maps_kernel(
    x_ptr,
    seed_ptr,
    codes_ptr,
    low_ptr,
    step_ptr,
    programs,
    channels,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Groups that are channels of x [rows, SIZE, channels]: CHANNELS of one row a program, read twice, the second time from a
    cache as long as they fit. Codes only where channels are a multiple of eight, ALIGNED."""
    row = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs) * CHANNELS
    if ALIGNED:
        channels = channels // 8 * 8  # tells the compiler
    channel = first + tl.arange(0, CHANNELS)
    pixel = tl.arange(0, PIXELS)
    there = (channel < channels)[None, :]
    x_ptr += row * SIZE * channels
    low = tl.full([PIXELS, CHANNELS], float("inf"), tl.float32)
    high = -low
    for p in range(0, SIZE, PIXELS):
        # Lanes past the last pixel repeat it: nothing to mask in what follows.
        at = tl.minimum(p + pixel, SIZE - 1).to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
    low, step = _statistics(low, high, (low - low) + (high - high), 0, BITS)
    tl.store(low_ptr + row * channels + channel, low, mask=channel < channels)
    tl.store(step_ptr + row * channels + channel, step, mask=channel < channels)
    if codes_ptr is not None:
        inverse = _inverse(step)[None, :]
        low = bf16_value(low)[None, :]
        slot = tl.arange(0, PIXELS * CHANNELS // 8)
        slot_pixel, slot_eight = slot // (CHANNELS // 8), first // 8 + slot % (CHANNELS // 8)
        for p in range(0, SIZE, PIXELS):
            at = tl.minimum(p + pixel, SIZE - 1).to(tl.int64)[:, None] * channels + channel[None, :]
            x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
            steps = tl.reshape((x - low) * inverse, [PIXELS * CHANNELS // 8, 8])
            eight = (row * SIZE + p + slot_pixel) * (channels // 8) + slot_eight
            packed = _packed_codes(steps, seed_ptr, eight, BITS)
            own = (p + slot_pixel < SIZE) & (slot_eight < channels // 8)
            byte = eight[:, None] * BITS + tl.arange(0, BITS)[None, :]
            tl.store(codes_ptr + byte, packed, mask=own[:, None])


@triton.jit
def _group_of(first, local, LENGTH: tl.constexpr, SIZE: tl.constexpr, PER_ROW: tl.constexpr, CHANNELS: tl.constexpr):
    """Group of element first + local: int64. local: int32, below 2^30."""
    row = first // LENGTH
    at = first - row * LENGTH
    if LENGTH < 2**30:
        at = at.to(tl.int32)
    at += local
    row += at // LENGTH
    if CHANNELS > 1:
        return row * PER_ROW + at % CHANNELS
    return row * PER_ROW + at % LENGTH // SIZE


@triton.jit
def codes_kernel(
    x_ptr,
    seed_ptr,
    codes_ptr,
    low_ptr,
    step_ptr,
    count,
    total,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    PER_ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    EIGHTS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """Codes of x in memory order, from finished low and step. SHARE neighbours, of eight, are of one group."""
    first = tl.program_id(0).to(tl.int64) * EIGHTS
    local = tl.arange(0, EIGHTS)
    element = (first + local)[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + element, mask=element < count, other=0.0).to(tl.float32)
    own = local[:, None] * 8 + tl.arange(0, 8 // SHARE)[None, :] * SHARE
    group = _group_of(first * 8, own, LENGTH, SIZE, PER_ROW, CHANNELS)
    there = first * 8 + own < count
    low = bf16_value(tl.load(low_ptr + group, mask=there, other=0))[:, :, None]
    inverse = _inverse(tl.load(step_ptr + group, mask=there, other=0))[:, :, None]
    steps = (tl.reshape(x, [EIGHTS, 8 // SHARE, SHARE]) - low) * inverse
    steps = tl.where(element < count, tl.reshape(steps, [EIGHTS, 8]), 0.0)  # what fills up the last byte has code 0
    packed = _packed_codes(steps, seed_ptr, first + local, BITS)
    _store_codes(codes_ptr, packed, first + local, local >= 0, BITS, total)


@triton.jit
def decode_kernel(
    codes_ptr,
    low_ptr,
    step_ptr,
    x_ptr,
    count,
    total,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    PER_ROW: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    EIGHTS: tl.constexpr,
    SHARE: tl.constexpr,
):
    """x in memory order. SHARE neighbours, of eight, are of one group."""
    first = tl.program_id(0).to(tl.int64) * EIGHTS
    local = tl.arange(0, EIGHTS)
    byte = (first + local)[:, None] * BITS + tl.arange(0, BITS)[None, :]
    codes = unpack8(tl.load(codes_ptr + byte, mask=byte < total, other=0), BITS).to(tl.float32)
    own = local[:, None] * 8 + tl.arange(0, 8 // SHARE)[None, :] * SHARE
    group = _group_of(first * 8, own, LENGTH, SIZE, PER_ROW, CHANNELS)
    there = first * 8 + own < count
    step = bf16_value(tl.load(step_ptr + group, mask=there, other=0))[:, :, None]
    low = bf16_value(tl.load(low_ptr + group, mask=there, other=0))[:, :, None]
    x = saturate(tl.reshape(codes, [EIGHTS, 8 // SHARE, SHARE]) * step + low, x_ptr.dtype.element_ty)
    element = (first + local)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(x_ptr + element, tl.reshape(x, [EIGHTS, 8]), mask=element < count)


@triton.jit
def decode_maps_kernel(
    codes_ptr,
    low_ptr,
    step_ptr,
    x_ptr,
    blocks,
    programs,
    pixels,
    channels,
    BITS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """x [rows, pixels, channels] of groups that are channels, a multiple of eight: PIXELS x CHANNELS of one row a program."""
    channels = channels // 8 * 8  # tells the compiler
    row = (tl.program_id(0) // (blocks * programs)).to(tl.int64)
    p = tl.program_id(0) // programs % blocks * PIXELS
    first = tl.program_id(0) % programs * CHANNELS
    slot = tl.arange(0, PIXELS * CHANNELS // 8)
    slot_pixel, slot_eight = p + slot // (CHANNELS // 8), first // 8 + slot % (CHANNELS // 8)
    own = (slot_pixel < pixels) & (slot_eight < channels // 8)
    eight = (row * pixels + slot_pixel) * (channels // 8) + slot_eight
    byte = eight[:, None] * BITS + tl.arange(0, BITS)[None, :]
    codes = unpack8(tl.load(codes_ptr + byte, mask=own[:, None], other=0), BITS).to(tl.float32)
    channel = first + tl.arange(0, CHANNELS)
    there = channel < channels
    low = bf16_value(tl.load(low_ptr + row * channels + channel, mask=there, other=0))[None, :]
    step = bf16_value(tl.load(step_ptr + row * channels + channel, mask=there, other=0))[None, :]
    x = saturate(tl.reshape(codes, [PIXELS, CHANNELS]) * step + low, x_ptr.dtype.element_ty)
    pixel = p + tl.arange(0, PIXELS)[:, None]
    at = (row * pixels + pixel) * channels + channel[None, :]
    tl.store(x_ptr + at, x, mask=(pixel < pixels) & there[None, :])
