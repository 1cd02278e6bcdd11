"""Device code of DIVISION: kernels for maps that are split into parts, each of which is a program's share.

Means come first where blocks are too tall for a tile, then extremes of each part, its expected errors, and low and step of each map.
"""

from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.rounding import bf16_nearest_bits
from actpress.kernels.division.tiles import (
    better,
    leave_out,
    of_maps,
    offsets,
    own_maps,
    scale_of,
    scan,
    scan_errors,
    store_means,
    store_scale,
    sum_of_maps,
)


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
        mask = ((lane < P.kh * P.kw) & (row < P.height) & (column < P.width))[None, :, :]
        if P.partial:
            mask = mask & (tl.arange(0, P.maps) < maps)[:, None, None]
        if P.pixels * P.channels >= 2**31:
            row = row.to(tl.int64)
        at = offsets(maps, P.pixels, P)[:, None, None] + ((row * P.width + column) * P.channels)[None, :, :]
        total += tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(P.height - top, P.kh) * tl.minimum(P.width - left, P.kw)
    mean = tl.div_rn(tl.sum(total, axis=2), tl.reshape(count.to(tl.float32), [1, P.tile]))
    store_means(lfc_ptr + outer * (P.means * P.channels) + channel, bf16_nearest_bits(mean), i, maps, P)


@triton.jit
def partials_kernel(x_ptr, lfc_ptr, partials_ptr, outers, parts, tiles, P: tl.constexpr):
    """Extremes of a part of a map, `tiles` tiles, to partials [4, maps, parts]."""
    part = tl.program_id(0) % parts
    outer, channel, maps = own_maps(tl.program_id(0) // parts, outers, P)
    x_ptr += outer * (P.pixels * P.channels) + channel
    lfc_ptr += outer * (P.means * P.channels) + channel
    lanes = scan(x_ptr, lfc_ptr, part * tiles, tl.minimum((part + 1) * tiles, P.tiles), maps, P)
    a, b, c, d = of_maps(lanes, P)
    map = tl.arange(0, P.maps)
    size = tl.cast(outers, tl.int64) * P.channels * parts
    partials_ptr += (outer * P.channels + channel + map) * parts + part
    tl.store(partials_ptr, a, mask=map < maps)
    tl.store(partials_ptr + size, b, mask=map < maps)
    if P.auto:
        tl.store(partials_ptr + 2 * size, c, mask=map < maps)
        tl.store(partials_ptr + 3 * size, d, mask=map < maps)


@triton.jit
def _partials(ptr, parts, first, maps, filling, P: tl.constexpr, PARTS: tl.constexpr):
    """[P.maps, PARTS] from [maps, parts], from map `first` on."""
    map, part = tl.minimum(tl.arange(0, P.maps), maps - 1)[:, None], tl.arange(0, PARTS)[None, :]
    return tl.load(ptr + (first + map) * parts + part, mask=(part < parts) & (map >= 0), other=filling)


@triton.jit
def _scale_of_parts(ptr, parts, first, maps, size, P: tl.constexpr, PARTS: tl.constexpr):
    least = tl.max(_partials(ptr, parts, first, maps, float("-inf"), P, PARTS), axis=1)
    greatest = tl.max(_partials(ptr + size, parts, first, maps, float("-inf"), P, PARTS), axis=1)
    return scale_of(least, greatest, P)


@triton.jit
def errors_kernel(x_ptr, lfc_ptr, partials_ptr, errors_ptr, outers, parts, tiles, P: tl.constexpr, PARTS: tl.constexpr):
    """Expected errors of the sampled rows of each part, with and without means, to errors [2, maps, parts]."""
    part = tl.program_id(0) % parts
    outer, channel, maps = own_maps(tl.program_id(0) // parts, outers, P)
    first, size = outer * P.channels + channel, tl.cast(outers, tl.int64) * P.channels * parts
    rest = _scale_of_parts(partials_ptr, parts, first, maps, size, P, PARTS)
    plain = _scale_of_parts(partials_ptr + 2 * size, parts, first, maps, size, P, PARTS)
    x_ptr += outer * (P.pixels * P.channels) + channel
    lfc_ptr += outer * (P.means * P.channels) + channel
    last = tl.minimum((part + 1) * tiles, P.tiles)
    with_means, without = sum_of_maps(scan_errors(x_ptr, lfc_ptr, part * tiles, last, maps, rest, plain, P), P)
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
    """low and step of maps from their parts. P.auto: with the smaller error; means are set to zero where that is the code without them."""
    outer, channel, maps = own_maps(tl.program_id(0), outers, P)
    first, size = outer * P.channels + channel, tl.cast(outers, tl.int64) * P.channels * parts
    scale = _scale_of_parts(partials_ptr, parts, first, maps, size, P, PARTS)
    if P.auto:
        plain = _scale_of_parts(partials_ptr + 2 * size, parts, first, maps, size, P, PARTS)
        with_means = tl.sum(_partials(errors_ptr, parts, first, maps, 0.0, P, PARTS), axis=1)
        without = tl.sum(_partials(errors_ptr + size, parts, first, maps, 0.0, P, PARTS), axis=1)
        is_plain, scale = better(with_means, without, scale, plain)
        leave_out(lfc_ptr + outer * (P.means * P.channels) + channel, is_plain, P.tiles, maps, P)
    store_scale(low_ptr, step_ptr, inverse_ptr, scale, first, maps, P)
