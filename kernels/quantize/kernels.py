"""Device code of group quantization. The formulas are in the docstring of the package; triton.py says which kernel runs when.

"Eight": eight elements next to each other in memory, counted from the first element of the tensor, whose codes fill whole bytes. One thread
holds an eight, as it loads it and as it packs it: nothing goes through shared memory in between. Two eights next to each other share a draw
of 8-bit noise (kernels/common/noise.py). low and step are bf16, passed as int16.
"""

from actpress.kernels.common.bits import load8, load_at, pack8, store_words, unpack_at
from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.noise import draws
from actpress.kernels.common.rounding import bf16_ceil_bits, bf16_floor_bits, bf16_value, finite_bits, saturate


@triton.jit
def _statistics(low, high, zero, axis: tl.constexpr, BITS: tl.constexpr):
    """int16 bits of low and step of groups along `axis`.

    low and high: the elements, NaN where there is none. zero: 0, or NaN for an element that is not finite.
    """
    poison = tl.sum(zero, axis)
    low = finite_bits(bf16_floor_bits(tl.min(low, axis) + poison))
    size = tl.max(high, axis) + poison - bf16_value(low)
    step = finite_bits(bf16_ceil_bits(tl.div_rn(size + (size - size), 2.0**BITS - 1)))
    return low, step


@triton.jit
def _inverse(step):
    """int16 bits of step -> fp32 factor for differences."""
    step = bf16_value(step)
    return tl.where(step >= 2.0**-126, tl.div_rn(1.0, step), 0.0)


@triton.jit
def _codes(steps, noise, BITS: tl.constexpr):
    """Differences in steps, fp32 [K, 8], and noise -> uint32. NaN gives the greatest code."""
    return tl.minimum(steps + noise, 2.0**BITS - 1).to(tl.uint32)  # converting cuts off: floor, as there is no sign


@triton.jit
def _noise(seed_ptr, start, first, BITS: tl.constexpr, EIGHTS: tl.constexpr):
    """Noise of EIGHTS eights from each element start + first on: a tuple of terms to add to [K, 8]."""
    if seed_ptr is not None:
        return draws(tl.load(seed_ptr), start, first, BITS, EIGHTS)
    elif EIGHTS == 2:
        return 0.5, 0.5
    else:
        return (0.5,)


@triton.jit
def _store_codes(codes_ptr, codes, eight, mask, BITS: tl.constexpr, total):
    """Store codes uint32 [K, 8] of the eights [K]; mask [K]. total: bytes of all codes, since the last eight may be incomplete."""
    byte = eight[:, None] * BITS + tl.arange(0, BITS)[None, :]
    tl.store(codes_ptr + byte, pack8(codes, BITS), mask=mask[:, None] & (byte < total))


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
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    """Groups of consecutive elements that begin and end on slots; x is read once. A slot is EIGHTS eights, one or two.

    A row has `programs` programs, each with GROUPS groups of at most SLOTS slots. In the tile, LANES slots of the first group are followed
    by LANES slots of the second, and so on; then come the next LANES slots of the first. A thread holds slots that are far apart, so it
    holds slots of one group, and few reductions across threads remain.
    """
    SLOT: tl.constexpr = 8 * EIGHTS
    row = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs).to(tl.int64) * GROUPS  # group of the row
    slot = tl.arange(0, GROUPS * SLOTS)
    k = first + slot // LANES % GROUPS
    within = (slot // (GROUPS * LANES) * LANES + slot % LANES) * SLOT  # element of the group
    own = (k < per_row) & (within < SIZE) & (k * SIZE + within < length)
    # Slots past the end repeat earlier ones, so that nothing below needs a mask.
    start = tl.minimum(k * SIZE + tl.minimum(within, SIZE - SLOT), length - SLOT)
    at = (row * (length // SLOT) + start // SLOT) * SLOT
    x = ()
    for e in tl.static_range(EIGHTS):
        x = x + (load8(x_ptr, at + 8 * e, 0, True),)  # noqa: RUF005 - Triton has no unpacking
    low, high, zero = x[0], x[0], x[0] - x[0]
    if EIGHTS == 2:
        low, high, zero = tl.minimum(low, x[1]), tl.maximum(high, x[1]), zero + (x[1] - x[1])
    low, high = tl.min(_by_group(low, GROUPS, SLOTS, LANES), 0), tl.max(_by_group(high, GROUPS, SLOTS, LANES), 0)
    low, step = _statistics(low, high, tl.sum(_by_group(zero, GROUPS, SLOTS, LANES), 0), 1, BITS)
    k = first + tl.arange(0, GROUPS)
    tl.store(low_ptr + row * per_row + k, low, mask=k < per_row)
    tl.store(step_ptr + row * per_row + k, step, mask=k < per_row)
    low, inverse = bf16_value(low)[None, :, None], _inverse(step)[None, :, None]
    noise = _noise(seed_ptr, row * 0, at, BITS, EIGHTS)
    codes = ()
    for e in tl.static_range(EIGHTS):
        steps = tl.reshape((_by_group(x[e], GROUPS, SLOTS, LANES) - low) * inverse, [GROUPS * SLOTS, 8])
        codes = codes + (_codes(steps, noise[e], BITS),)  # noqa: RUF005
    store_words(codes_ptr, codes, at, own, BITS)


@triton.jit
def _by_group(x, GROUPS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr):
    return tl.reshape(x, [SLOTS // LANES, GROUPS, LANES * 8])


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
    """Groups of consecutive elements at any place. The tile is that of aligned_kernel, of elements instead of slots.

    Codes are made only where the whole groups of a program fill whole eights; there is one row then, and x is read again, from the cache.
    total: bytes of all codes. BITS = 0: low and step are fp32, the least and the greatest of parts of a larger group.
    """
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
        end = tl.minimum(first * SIZE + GROUPS * SIZE, length)
        there = element < end
        x = load8(x_ptr, eight * 8, end, False)
        steps = (tl.reshape(x, [EIGHTS, 8 // SHARE, SHARE]) - own_low) * own_inverse
        steps = tl.where(there, tl.reshape(steps, [EIGHTS, 8]), 0.0)  # the padding of the last byte has code 0
        codes = _codes(steps, _noise(seed_ptr, row * 0, eight * 8, BITS, 1)[0], BITS)
        _store_codes(codes_ptr, codes, eight, own, BITS, total)


@triton.jit
def finish_kernel(
    least_ptr, greatest_ptr, low_ptr, step_ptr, PARTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """low and step of each group from the least and the greatest of its PARTS, fp32 [groups, PARTS]."""
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
    inverse_ptr,
    programs,
    channels,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGNED: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    """Groups that are channels of x [rows, SIZE, channels]; a program has CHANNELS channels of one row.

    x is read twice, the second time from a cache as long as it fits. Codes are made only where channels are a multiple of eight (ALIGNED).
    A thread encodes EIGHTS eights: one, or two where channels are a multiple of sixteen. inverse: fp32 scratch memory for the factors of
    differences.
    """
    row = (tl.program_id(0) // programs).to(tl.int64)
    first = (tl.program_id(0) % programs) * CHANNELS
    if ALIGNED:
        channels = channels // 8 * 8  # tells the compiler
    channel = first + tl.arange(0, CHANNELS)
    pixel = tl.arange(0, PIXELS)
    there = (channel < channels)[None, :]
    start = row * SIZE * channels
    x_ptr += start
    low = tl.full([PIXELS, CHANNELS], float("inf"), tl.float32)
    high = -low
    for p in range(0, SIZE, PIXELS):
        # Lanes past the last pixel repeat it, so that nothing below needs a mask.
        at = tl.minimum(p + pixel, SIZE - 1).to(tl.int64)[:, None] * channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=there, other=0.0).to(tl.float32)
        low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
        high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
    low, step = _statistics(low, high, (low - low) + (high - high), 0, BITS)
    low_ptr += row * channels
    step_ptr += row * channels
    tl.store(low_ptr + channel, low, mask=channel < channels)
    tl.store(step_ptr + channel, step, mask=channel < channels)
    if codes_ptr is not None:
        SLOT: tl.constexpr = 8 * EIGHTS
        SLOTS: tl.constexpr = CHANNELS // SLOT  # of a pixel
        inverse_ptr += row * channels
        tl.store(inverse_ptr + channel, _inverse(step), mask=channel < channels)
        tl.debug_barrier()  # what other threads stored is read from here on
        codes_ptr += start // 8 * BITS
        if ALIGNED and EIGHTS == 2:
            channels = channels // 16 * 16
        # Slots past the last channel repeat the last slot and are not stored.
        channel = tl.minimum((first + tl.arange(0, SLOTS) * SLOT) // SLOT, channels // SLOT - 1) * SLOT
        own = first + tl.arange(0, SLOTS) * SLOT < channels
        low, inverse = (), ()
        for e in tl.static_range(EIGHTS):
            low = low + (bf16_value(load_at(low_ptr, channel + 8 * e, 0, 8, True))[None, :, :],)  # noqa: RUF005
            inverse = inverse + (load8(inverse_ptr, channel + 8 * e, 0, True)[None, :, :],)  # noqa: RUF005
        pixel = tl.arange(0, PIXELS)
        for p in range(0, SIZE, PIXELS):
            at = tl.minimum(p + pixel, SIZE - 1)[:, None] * channels + channel[None, :]
            flat = tl.reshape(at, [PIXELS * SLOTS])
            noise = _noise(seed_ptr, start, flat, BITS, EIGHTS)
            codes = ()
            for e in tl.static_range(EIGHTS):
                steps = (load8(x_ptr, at + 8 * e, 0, True) - low[e]) * inverse[e]
                codes = codes + (_codes(tl.reshape(steps, [PIXELS * SLOTS, 8]), noise[e], BITS),)  # noqa: RUF005
            mask = tl.reshape((p + pixel < SIZE)[:, None] & own[None, :], [PIXELS * SLOTS])
            store_words(codes_ptr, codes, flat, mask, BITS)


@triton.jit
def _group_of(first, local, LENGTH: tl.constexpr, SIZE: tl.constexpr, PER_ROW: tl.constexpr, CHANNELS: tl.constexpr):
    """int64 number of the group of element first + local. local: int32, below 2^30."""
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
    """Codes of x in memory order, from finished low and step. Of eight neighbours, each SHARE are of one group."""
    first = tl.program_id(0).to(tl.int64) * EIGHTS
    local = tl.arange(0, EIGHTS)
    element = (first + local)[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = load8(x_ptr, (first + local) * 8, count, False)
    own = local[:, None] * 8 + tl.arange(0, 8 // SHARE)[None, :] * SHARE
    group = _group_of(first * 8, own, LENGTH, SIZE, PER_ROW, CHANNELS)
    there = first * 8 + own < count
    low = bf16_value(tl.load(low_ptr + group, mask=there, other=0))[:, :, None]
    inverse = _inverse(tl.load(step_ptr + group, mask=there, other=0))[:, :, None]
    steps = (tl.reshape(x, [EIGHTS, 8 // SHARE, SHARE]) - low) * inverse
    steps = tl.where(element < count, tl.reshape(steps, [EIGHTS, 8]), 0.0)  # the padding of the last byte has code 0
    codes = _codes(steps, _noise(seed_ptr, first * 8, local * 8, BITS, 1)[0], BITS)
    _store_codes(codes_ptr, codes, first + local, local >= 0, BITS, total)


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
    SLOTS: tl.constexpr,
    LANES: tl.constexpr,
    SHARE: tl.constexpr,
):
    """x in memory order, LANES neighbours (16 bytes) a thread; each SHARE of them are of one group."""
    first = tl.program_id(0).to(tl.int64) * (SLOTS * LANES)
    local = tl.arange(0, SLOTS) * LANES
    codes = unpack_at(codes_ptr, first + local, total, BITS, LANES, False).to(tl.float32)
    own = local[:, None] + tl.arange(0, LANES // SHARE)[None, :] * SHARE
    group = _group_of(first, own, LENGTH, SIZE, PER_ROW, CHANNELS)
    there = first + own < count
    step = bf16_value(tl.load(step_ptr + group, mask=there, other=0))[:, :, None]
    low = bf16_value(tl.load(low_ptr + group, mask=there, other=0))[:, :, None]
    x = saturate(tl.reshape(codes, [SLOTS, LANES // SHARE, SHARE]) * step + low, x_ptr.dtype.element_ty)
    element = (first + local)[:, None] + tl.arange(0, LANES)[None, :]
    tl.store(x_ptr + element, tl.reshape(x, [SLOTS, LANES]), mask=element < count)


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
    LANES: tl.constexpr,
):
    """x [rows, pixels, channels] of groups that are channels, a multiple of eight: PIXELS x CHANNELS of one row a program, LANES
    neighbours a thread, 16 bytes."""
    SLOTS: tl.constexpr = CHANNELS // LANES  # of a pixel
    channels = channels // 8 * 8  # tells the compiler
    row = (tl.program_id(0) // (blocks * programs)).to(tl.int64)
    p = tl.program_id(0) // programs % blocks * PIXELS
    first = tl.program_id(0) % programs * CHANNELS
    pixel, channel = p + tl.arange(0, PIXELS), first + tl.arange(0, SLOTS) * LANES
    own = channel < channels
    x_ptr += row * pixels * channels
    codes_ptr += row * pixels * channels // 8 * BITS
    # Slots past the end repeat another; they are not stored.
    pixel_at = tl.minimum(pixel, pixels - 1)[:, None].to(tl.int64) * channels
    codes = unpack_at(codes_ptr, pixel_at + tl.where(own, channel, first)[None, :], 0, BITS, LANES, True).to(tl.float32)
    lanes = channel[:, None] + tl.arange(0, LANES)[None, :]
    low = bf16_value(tl.load(low_ptr + row * channels + lanes, mask=own[:, None], other=0))[None, :, :]
    step = bf16_value(tl.load(step_ptr + row * channels + lanes, mask=own[:, None], other=0))[None, :, :]
    x = saturate(codes * step + low, x_ptr.dtype.element_ty)
    there = (pixel < pixels)[:, None] & own[None, :]
    at = pixel_at + channel[None, :]
    tl.store(x_ptr + at[:, :, None] + tl.arange(0, LANES)[None, None, :], x, mask=there[:, :, None])
