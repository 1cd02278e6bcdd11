"""Triton kernel of what each tap of a convolution meets, for the weight gradient against a pooled map: all taps from one read.

A program owns a tile of output positions. It loads the window that their taps reach once and adds up in registers. The input may have any
strides. The output has one of three memory orders, outermost axis first:

    taps        groups, taps, channels, samples, rows, columns
    samples     samples, groups, taps, channels, rows, columns
    channels    samples, rows, columns, groups, taps, channels: for an input in channels_last

plan.py documents axes, windows, sums and spread.
"""

from math import prod

from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, next_power_of_2, tl, triton
from actpress.kernels.pooling.plan import Axis, Belongs

# LANES: outputs of one tap per program. CHANNELS: of them, neighbouring channels in the order "channels".
CONFIGS: tuple[launch.Config, ...] = (
    {"LANES": 1024, "CHANNELS": 16, "num_warps": 8},
    {"LANES": 512, "CHANNELS": 8, "num_warps": 4},
    {"LANES": 2048, "CHANNELS": 32, "num_warps": 16},
)
ORDERS = {  # of [groups, taps, channels, samples, rows, columns], outermost first
    "taps": (0, 1, 2, 3, 4, 5),
    "samples": (3, 0, 1, 2, 4, 5),
    "channels": (3, 4, 5, 0, 1, 2),
}
UNROLLED = 64, 16  # places of a window and taps, up to which a program holds their sums in registers
ALWAYS, SOMETIMES, FIRST = (
    tl.constexpr(belongs.value) for belongs in (Belongs.ALWAYS, Belongs.SOMETIMES, Belongs.FIRST)
)


@triton.jit
def _belongs(u, v, offset, axis: tl.constexpr):
    pixel = axis.stride * (u if axis.spread else v) + offset
    within = pixel - axis.shift - axis.block * (v if axis.spread else u)
    return (within >= 0) & (within < axis.block) & (pixel < axis.length)


@triton.jit
def _window_sums(x_ptr, xr, xq, u_r, u_q, inside, R: tl.constexpr, Q: tl.constexpr):
    """The sums of all taps, [rows of taps, columns of taps]: over columns first, which the rows of taps share."""
    first_r = (R.up * u_r + R.start) // R.down - R.bias
    first_q = (Q.up * u_q + Q.start) // Q.down - Q.bias
    taps_r: tl.constexpr = len(R.offsets)
    taps_q: tl.constexpr = len(Q.offsets)
    x_ptr += first_r * xr + first_q * xq  # may lie before the map; what is read does not
    across = ()  # [rows of the window, columns of taps]
    for m in tl.static_range(len(R.reach)):
        r = first_r + R.reach[m]
        in_row = inside & (r >= 0) & (r < R.read)
        cells = ()
        for j in tl.static_range(len(Q.reach)):
            q = first_q + Q.reach[j]
            x = tl.load(x_ptr + R.reach[m] * xr + Q.reach[j] * xq, mask=in_row & (q >= 0) & (q < Q.read), other=0.0)
            cells += (x.to(tl.float32),)
        for b in tl.static_range(taps_q):
            total = tl.zeros(inside.shape, tl.float32)
            for j in tl.static_range(len(Q.reach)):
                if Q.meets[j * taps_q + b] == FIRST:
                    total = cells[j]
                elif Q.meets[j * taps_q + b] == SOMETIMES:
                    total += tl.where(_belongs(u_q, first_q + Q.reach[j], Q.offsets[b], Q), cells[j], 0.0)
                elif Q.meets[j * taps_q + b] == ALWAYS:
                    total += cells[j]
            across += (total,)
    totals = ()
    for a in tl.static_range(taps_r):
        for b in tl.static_range(taps_q):
            total = tl.zeros(inside.shape, tl.float32)
            for m in tl.static_range(len(R.reach)):
                if R.meets[m * taps_r + a] == FIRST:
                    total = across[m * taps_q + b]
                elif R.meets[m * taps_r + a] == SOMETIMES:
                    total += tl.where(_belongs(u_r, first_r + R.reach[m], R.offsets[a], R), across[m * taps_q + b], 0.0)
                elif R.meets[m * taps_r + a] == ALWAYS:
                    total += across[m * taps_q + b]
            totals += (total,)
    return totals


@triton.jit
def _first(u, offset, axis: tl.constexpr):
    """The first v of one tap."""
    later = offset - axis.offsets[0] if axis.spread else axis.offsets[len(axis.offsets) - 1] - offset
    return (axis.up * u + axis.start + later) // axis.down - axis.bias


@triton.jit
def _loop_sum(x_ptr, xr, xq, u_r, u_q, inside, tap, R: tl.constexpr, Q: tl.constexpr):
    """The sum of one tap: for windows too large, or taps too many, to unroll."""
    offset_r, offset_q = R.offsets[0], Q.offsets[0]
    for a in tl.static_range(len(R.offsets)):
        offset_r = tl.where(tap // len(Q.offsets) == a, R.offsets[a], offset_r)
    for b in tl.static_range(len(Q.offsets)):
        offset_q = tl.where(tap % len(Q.offsets) == b, Q.offsets[b], offset_q)
    first_r, first_q = _first(u_r, offset_r, R), _first(u_q, offset_q, Q)
    total = tl.zeros(inside.shape, tl.float32)
    for m in range(R.span):
        r = first_r + m
        in_row = inside & (r >= 0) & (r < R.read) & _belongs(u_r, r, offset_r, R)
        for j in range(Q.span):
            q = first_q + j
            belongs = in_row & (q >= 0) & (q < Q.read) & _belongs(u_q, q, offset_q, Q)
            total += tl.load(x_ptr + (r * xr + q * xq), mask=belongs, other=0.0).to(tl.float32)
    return total


@triton.jit
def _taps_kernel(
    x_ptr,
    y_ptr,
    samples,
    channels,
    group_channels,
    xn,  # strides of x [samples, channels, rows, columns]
    xc,
    xr,
    xq,
    yg,  # strides of y [groups, taps, channels of the group, samples, positions]
    yt,
    yc,
    yn,
    yp,
    R: tl.constexpr,  # Axis of the rows
    Q: tl.constexpr,  # Axis of the columns
    GROUPED: tl.constexpr,
    UNROLL: tl.constexpr,
    SAMPLES: tl.constexpr,  # of a tile
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,  # parts of a tile, one after the other
):
    pid = tl.program_id(0)
    first_c = pid % tl.cdiv(channels, CHANNELS) * CHANNELS
    pid //= tl.cdiv(channels, CHANNELS)
    first_q = pid % tl.cdiv(Q.written, COLUMNS) * COLUMNS
    pid //= tl.cdiv(Q.written, COLUMNS)
    first_r = pid % tl.cdiv(R.written, ROWS) * ROWS
    first_n = pid // tl.cdiv(R.written, ROWS) * SAMPLES
    lanes: tl.constexpr = SAMPLES * ROWS * COLUMNS * CHANNELS // STEPS
    for step in tl.static_range(STEPS):
        lane = step * lanes + tl.arange(0, lanes)
        c = first_c + lane % CHANNELS
        q = first_q + lane // CHANNELS % COLUMNS
        r = first_r + lane // (CHANNELS * COLUMNS) % ROWS
        n = first_n + lane // (CHANNELS * COLUMNS * ROWS)
        inside = (c < channels) & (q < Q.written) & (r < R.written) & (n < samples)
        n, c = n.to(tl.int64), c.to(tl.int64)
        x = x_ptr + (n * xn + c * xc)
        g = c // group_channels if GROUPED else 0
        y = y_ptr + (n * yn + g * yg + (c - g * group_channels) * yc + (r * Q.written + q).to(tl.int64) * yp)
        if UNROLL:
            totals = _window_sums(x, xr, xq, r, q, inside, R, Q)
            for tap in tl.static_range(len(R.offsets) * len(Q.offsets)):
                tl.store(y + tl.full([], tap, tl.int64) * yt, totals[tap], mask=inside)
        else:
            for tap in range(len(R.offsets) * len(Q.offsets)):
                total = _loop_sum(x, xr, xq, r, q, inside, tap, R, Q)
                tl.store(y + tl.full([], tap, tl.int64) * yt, total, mask=inside)


def unrolled(rows: Axis, columns: Axis) -> bool:
    """Whether a program computes the sums of all taps at once."""
    taps = len(rows.offsets) * len(columns.offsets)
    return len(rows.reach) * len(columns.reach) <= UNROLLED[0] and taps <= UNROLLED[1]


def tile_of(rows: Axis, columns: Axis, channels: int, order: str, config: launch.Config) -> dict[str, int]:
    """Samples, rows, columns and channels of one program's output."""
    lanes = config["LANES"] if order == "channels" or unrolled(rows, columns) else 32 * config["num_warps"]
    if order == "channels":  # squares, whose windows overlap least, of channels that fill a sector of memory
        inner, height, width = min(config["CHANNELS"], next_power_of_2(channels)), 8, 8
    else:  # long rows for a warp to read
        inner, height, width = 1, lanes, 32
    width = min(width, next_power_of_2(columns.written))
    height = min(height, next_power_of_2(rows.written), lanes // (inner * width))
    return {"SAMPLES": lanes // (inner * width * height), "ROWS": height, "COLUMNS": width, "CHANNELS": inner}


def met_triton(
    x_NCrq: Tensor, rows: Axis, columns: Axis, groups: int, order: str, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`plan.met_reference` in one pass, for x of any strides with fewer than 2^31 elements per sample.

    Sums are computed in fp32 in another order and rounded once to x's dtype, as in the reference. So half types sometimes round to the
    neighbouring number. Sums of one element are equal.
    """
    taps, (n, channels) = len(rows.offsets) * len(columns.offsets), x_NCrq.shape[:2]
    shape, outermost = (groups, taps, channels // groups, n, rows.written, columns.written), ORDERS[order]
    y = x_NCrq.new_empty([shape[dim] for dim in outermost]).permute([outermost.index(dim) for dim in range(6)])
    tile = tile_of(rows, columns, channels, order, config)
    tiles = zip((n, rows.written, columns.written, channels), tile.values(), strict=True)
    launch.run(
        _taps_kernel,
        (prod(cdiv(length, side) for length, side in tiles),),
        x_NCrq,
        y,
        n,
        channels,
        channels // groups,
        *x_NCrq.stride(),
        *(y.stride(dim) for dim in (0, 1, 2, 3, 5)),
        R=rows,
        Q=columns,
        GROUPED=groups > 1,
        UNROLL=unrolled(rows, columns),
        **tile,
        # A thread takes vectors of channels, but single positions of a map: next in memory are its neighbours', so that a warp reads a row.
        STEPS=1 if order == "channels" else max(1, prod(tile.values()) // (32 * config["num_warps"])),
        num_warps=config["num_warps"],
    )
    return y


def met_bytes(x_NCrq: Tensor, rows: Axis, columns: Axis, groups: int, order: str) -> int:
    """Bytes that the kernel moves in its default configuration. Neighbouring tiles both read the positions that their windows share."""
    n, channels = x_NCrq.shape[:2]
    tile = tile_of(rows, columns, channels, order, CONFIGS[0])
    read = _positions(rows, tile["ROWS"]) * _positions(columns, tile["COLUMNS"])
    written = len(rows.offsets) * rows.written * len(columns.offsets) * columns.written
    return n * channels * (read + written) * x_NCrq.itemsize


def _positions(axis: Axis, tile: int) -> int:
    """Input positions that all tiles read together, for tiles of `tile` output positions."""
    first = [(axis.up * u + axis.start) // axis.down - axis.bias for u in range(axis.written)]
    tiles = (first[u : u + tile] for u in range(0, axis.written, tile))
    return sum(len({v + m for v in tile for m in axis.reach if 0 <= v + m < axis.read}) for tile in tiles)
