"""Mean-pooled maps, and the weight gradient of a convolution against one.

    p(x)[i, j] = mean of block (i, j) of k x k pixels
    x~         = p(x) upsampled (nearest): what the weight gradient is taken against
    dW[:, :, a, b] = sum over blocks of S_ab p(x)^T,  S_ab = dY summed over the pixels whose tap (a, b) falls into each block

The reference does not build the upsampled map: tap (a, b) of the kernel meets pixel (stride * row + dilation * a - padding) of x~, so dY,
summed over the rows and columns that meet the same block, is all a matrix product with p(x) needs. Exact against x~, with k^2 fewer FLOPs.
The weight gradient's kernel is in pooled_convolution.py, what is cheaper than all taps in pooled_product.py.

align="ceil": block of pixel h is h // k; a last, smaller block holds the mean of what it covers.
align="authors": the official code's floor mode. Only whole blocks are pooled, from the top left; upsampled, they are padded with zeros at
the top and left, so on sizes that k does not divide, x~ is shifted and its first rows and columns are zero.

Source: arXiv 2409.11902 and the authors' experimental code. There a map smaller than k is an error; here k is cut to the map.
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.launch import cdiv, next_power_of_2, tl, triton
from actpress.kernels.common.layout import dense, is_channels_last

ALIGN = ("ceil", "authors")


def pool_reference(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """x [N, C, H, W] -> block means [N, C, h, w] in x's dtype and memory format."""
    if x_NCHW.numel() == 0:
        return _pooled_like(x_NCHW, block, align)
    kernel = tuple(min(block, size) for size in x_NCHW.shape[2:])
    return F.avg_pool2d(x_NCHW, kernel, kernel, ceil_mode=align == "ceil", count_include_pad=False)


def upsample_reference(pooled_NCHW: Tensor, size: tuple[int, int], block: int, align: str) -> Tensor:
    """Block means -> x~ [N, C, H, W]."""
    out, before = pooled_NCHW, [0, 0]
    for axis in (3, 2):  # columns first, while there are few rows
        length = size[axis - 2]
        side = max(min(block, length), 1)
        out = out.repeat_interleave(side, axis)  # several times as fast on a CPU as an index per pixel
        before[axis - 2] = length % side if align == "authors" else 0
        if out.shape[axis] + before[axis - 2] > length:
            out = out.narrow(axis, 0, length)
    if any(before):
        out = F.pad(out, (before[1], 0, before[0], 0))
    return out


def conv2d_weight_grad_reference(
    pooled_NIhw: Tensor,
    dy_NOPQ: Tensor,
    size: tuple[int, int],
    weight_shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    block: int,
    align: str,
) -> Tensor:
    """dW [O, I / groups, kh, kw] against x~ of `size` (H, W), in dy's dtype. Half types are summed in fp32."""
    if 0 in (pooled_NIhw.numel(), dy_NOPQ.numel()):
        return dy_NOPQ.new_zeros(weight_shape)
    compute = dy_NOPQ.dtype if dy_NOPQ.dtype == torch.float64 else torch.float32
    pooled, dy = pooled_NIhw.to(compute), dy_NOPQ.to(compute)
    n, out_channels = dy.shape[:2]
    grouped = pooled.reshape(n, groups, -1, pooled.shape[2] * pooled.shape[3])  # [N, groups, I / groups, blocks]
    kernel = tuple(weight_shape[2:])
    met = [  # for each axis and tap: the block that each output position meets, -1 for none
        [
            blocks_met(
                dy.shape[2 + axis],
                size[axis],
                tap,
                stride[axis],
                padding[axis],
                dilation[axis],
                block,
                align,
                dy.device,
            )
            for tap in range(kernel[axis])
        ]
        for axis in (0, 1)
    ]
    dw = dy.new_empty(weight_shape)
    rows = [_sum_into(dy, 2, index, pooled.shape[2]) for index in met[0]]
    for a, b in product(range(kernel[0]), range(kernel[1])):
        summed = _sum_into(rows[a], 3, met[1][b], pooled.shape[3]).reshape(n, groups, out_channels // groups, -1)
        dw[:, :, a, b] = torch.einsum("ngos,ngis->goi", summed, grouped).reshape(weight_shape[:2])
    return dw.to(dy_NOPQ.dtype)


def block_of(pixel: Tensor, length: int, block: int, align: str) -> Tensor:
    """Index of the block that each pixel of an axis belongs to; -1 for pixels outside of it or in no block."""
    block = min(block, length)
    shift = length % block if align == "authors" else 0
    inside = (pixel >= shift) & (pixel < length)
    return torch.where(inside, (pixel - shift) // block, -1)


def blocks_met(
    outputs: int,
    length: int,
    tap: int,
    stride: int,
    padding: int,
    dilation: int,
    block: int,
    align: str,
    device: torch.device,
) -> Tensor:
    pixel = torch.arange(outputs, device=device) * stride + tap * dilation - padding
    return block_of(pixel, length, block, align)


def _sum_into(x: Tensor, axis: int, index: Tensor, count: int) -> Tensor:
    """x summed along `axis` into `count` places; index -1 is dropped."""
    shape = list(x.shape)
    shape[axis] = count + 1  # the last place takes what is dropped
    index = torch.where(index < 0, count, index)
    return x.new_zeros(shape).index_add_(axis, index, x).narrow(axis, 0, count)


CONFIGS: tuple[launch.Config, ...] = (
    {"ELEMENTS": 1024, "num_warps": 4},
    {"ELEMENTS": 2048, "num_warps": 4},
    {"ELEMENTS": 4096, "num_warps": 8},
)


@triton.jit
def _pool_kernel(
    x_ptr,
    y_ptr,
    outputs,
    H: tl.constexpr,
    W: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    INNER: tl.constexpr,  # channels that lie next to each other: all of channels_last maps, 1 of NCHW maps
    ROWS: tl.constexpr,  # of a block
    COLUMNS: tl.constexpr,
    SIDE: tl.constexpr,  # lanes per output: the columns of a block next to each other in memory, filled up to a power of 2
    CELLS: tl.constexpr,  # of a row of a block, those that a lane adds up
    UNROLL: tl.constexpr,  # cells; divides their number
    WIDE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64) if WIDE else tl.program_id(0)
    lane = pid * ELEMENTS + tl.arange(0, ELEMENTS)
    row = lane // (OUT_W * INNER * SIDE)  # of all output rows of all maps
    inside = lane < outputs * SIDE
    if SIDE == COLUMNS and INNER == 1:  # a row of blocks is a row of the map
        column = lane % (OUT_W * SIDE)
    else:
        column = lane // (INNER * SIDE) % OUT_W * COLUMNS + lane % SIDE
        inside &= lane % SIDE < COLUMNS
    top = row % OUT_H * ROWS
    start = (row // OUT_H * H + top) * W
    total = tl.zeros([ELEMENTS], tl.float32)
    for cells in range(0, ROWS * CELLS, UNROLL):
        for cell in tl.static_range(UNROLL):
            a, b = (cells + cell) // CELLS, (cells + cell) % CELLS
            within = inside
            if OUT_H * ROWS > H:
                within &= top + a < H
            if OUT_W * COLUMNS > W:
                within &= column + b < W
            x = tl.load(x_ptr + (start + a * W + column + b) * INNER + lane % INNER, mask=within, other=0.0)
            total += x.to(tl.float32)
    if SIDE > 1:
        total = tl.sum(tl.reshape(total, [ELEMENTS // SIDE, SIDE]), 1)
    out = pid * (ELEMENTS // SIDE) + tl.arange(0, ELEMENTS // SIDE)
    if OUT_H * ROWS > H or OUT_W * COLUMNS > W:  # the last blocks are smaller
        rows = tl.minimum(H - out // (OUT_W * INNER) % OUT_H * ROWS, ROWS)
        columns = tl.minimum(W - out // INNER % OUT_W * COLUMNS, COLUMNS)
        mean = tl.div_rn(total, (rows * columns).to(tl.float32))
    elif ROWS * COLUMNS & (ROWS * COLUMNS - 1) == 0:
        mean = total * (1 / (ROWS * COLUMNS))  # as exact as the quotient
    else:
        mean = tl.div_rn(total, tl.full(total.shape, ROWS * COLUMNS, tl.float32))
    tl.store(y_ptr + out, mean, mask=out < outputs)


def pool_triton(x_NCHW: Tensor, block: int, align: str, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`pool_reference` in one pass; equal but for the order of the fp32 sums (NCHW: first over the rows of a block). Both divide the sum
    and round the quotient once to x's dtype, so half types differ by at most that rounding, and rarely."""
    x = dense(x_NCHW)
    y = _pooled_like(x, block, align)
    if x.numel() == 0:
        return y
    rows, columns = (min(block, size) for size in x.shape[2:])
    inner = x.shape[1] if is_channels_last(x) else 1
    side = next_power_of_2(columns) if inner == 1 else 1
    cells = columns if side == 1 else 1
    elements = max(config["ELEMENTS"], side)
    launch.run(
        _pool_kernel,
        (cdiv(y.numel() * side, elements),),
        x,
        y,
        y.numel(),
        H=x.shape[2],
        W=x.shape[3],
        OUT_H=y.shape[2],
        OUT_W=y.shape[3],
        INNER=inner,
        ROWS=rows,
        COLUMNS=columns,
        SIDE=side,
        CELLS=cells,
        UNROLL=rows * cells if rows * cells <= 16 else 1,
        WIDE=max(x.numel(), y.numel() * side) + elements >= 2**31,
        **{**config, "ELEMENTS": elements},
    )
    return y


def _pooled_like(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """Empty block means of x, in its memory format."""
    sides = [(length, max(min(block, length), 1)) for length in x_NCHW.shape[2:]]
    sizes = [length // side if align == "authors" else cdiv(length, side) for length, side in sides]
    memory_format = torch.channels_last if is_channels_last(x_NCHW) else torch.contiguous_format
    shape = (*x_NCHW.shape[:2], *sizes)
    return torch.empty(shape, dtype=x_NCHW.dtype, device=x_NCHW.device, memory_format=memory_format)


@torch.library.custom_op("actpress::pool", mutates_args=())
def _pool(x: Tensor, block: int, align: str) -> Tensor:
    return pool_reference(x, block, align)


@_pool.register_fake
def _(x: Tensor, block: int, align: str) -> Tensor:
    return _pooled_like(dense(x), block, align)


launch.on_cuda(_pool, pool_triton)


def pool(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """x [N, C, H, W] of any floating dtype and strides -> block means [N, C, h, w] in its dtype and memory format."""
    run = launch.way(_pool, x_NCHW) if launch.on_gpu(x_NCHW) else pool_reference
    return run(x_NCHW, block, align)


def pool_max(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """The greatest value of each block in place of its mean; no kernel."""
    if x_NCHW.numel() == 0:
        return _pooled_like(x_NCHW, block, align)
    kernel = tuple(min(block, size) for size in x_NCHW.shape[2:])
    return F.max_pool2d(x_NCHW, kernel, kernel, ceil_mode=align == "ceil")


def cases() -> list[launch.Case]:
    """A ResNet-50 activation at batch 64: 64 x 256 x 56 x 56."""
    return [
        _case("pool_2", 2, torch.contiguous_format),
        _case("pool_2_channels_last", 2, torch.channels_last),
        _case("pool_4", 4, torch.contiguous_format),
    ]


def _case(name: str, block: int, memory_format: torch.memory_format) -> launch.Case:
    def make(dtype: torch.dtype, device: str, shape=(64, 256, 56, 56)) -> tuple[Tensor, int, str]:
        return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format), block, "ceil"

    def bytes_of(x: Tensor, block: int, align: str) -> int:
        return launch.nbytes(x, pool_reference(x.to("meta"), block, align))

    return launch.Case(
        name,
        make,
        pool_triton,
        pool_reference,
        bytes_of,
        bytes_of,
        CONFIGS,
        stock=lambda x, block, align: F.avg_pool2d(x, block),
        tolerance=3e-4,  # half types: a sum now and then rounds to the neighbour; fp32 differs by 1e-7
        tiny=lambda dtype, device: make(dtype, device, (2, 8, 9, 14)),
    )
