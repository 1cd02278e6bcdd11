"""Mean-pooled maps, and the weight gradient of a convolution against one, in plain PyTorch.

    p(x)[i, j] = mean of block (i, j) of k x k pixels
    x~         = p(x) upsampled (nearest neighbour): the input that the weight gradient is computed against
    dW[:, :, a, b] = sum over blocks of S_ab p(x)^T,  S_ab = dY summed over the positions whose tap (a, b) falls into each block

The reference does not build the upsampled map. Tap (a, b) of the kernel meets pixel (stride * row + dilation * a - padding) of x~. So dY is
summed over the rows and columns that meet the same block, and a matrix product with p(x) gives dW. The result is exact against x~, with
k^2 fewer FLOPs.

align="ceil": pixel h belongs to block h // k. The last block may be smaller; it holds the mean of the pixels that it covers.
align="authors": the floor mode of the official code. Only whole blocks are pooled, from the top left. The upsampled map is padded with
zeros at the top and left. So if k does not divide the size, x~ is shifted, and its first rows and columns are zero.

Source: arXiv 2409.11902 and the authors' experimental code. There a map smaller than k is an error; here k is limited to the map's size.
Shapes: x [N, I, H, W], p(x) [N, I, h, w], dY [N, O, P, Q].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.common.launch import cdiv
from actpress.kernels.common.layout import empty, is_channels_last

ALIGN = ("ceil", "authors")


class ConvAxis(NamedTuple):
    """Rows or columns of a convolution over a pooled map. A tuple, since it is a cache's key and cheap to make and to hash."""

    outputs: int  # positions of dY
    length: int  # pixels of x
    taps: int
    stride: int
    padding: int
    dilation: int
    block: int  # pixels of a block, at most `length`
    align: str

    @property
    def shift(self) -> int:
        """Pixels before the first block."""
        return self.length % self.block if self.align == "authors" else 0

    @property
    def blocks(self) -> int:
        return self.length // self.block if self.align == "authors" else cdiv(self.length, self.block)

    def blocks_met(self, tap: int, device: torch.device) -> Tensor:
        """The block that a tap meets at each position of dY, int64 [outputs]; -1 where it meets padding or pixels outside of blocks."""
        pixel = torch.arange(self.outputs, device=device) * self.stride + tap * self.dilation - self.padding
        inside = (pixel >= self.shift) & (pixel < self.length)
        return torch.where(inside, (pixel - self.shift) // self.block, -1)


@dataclass(frozen=True)
class PooledConv:
    """A 2-d convolution whose input was pooled: its geometry, the size (H, W) of the input, and how that was pooled."""

    conv: ConvGeometry
    size: tuple[int, int]
    block: int
    align: str

    @classmethod
    def of_numbers(
        cls,
        size: Sequence[int],
        weight_shape: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        block: int,
        align: str,
    ) -> "PooledConv":
        """From the arguments of the registered operation, which takes plain numbers."""
        conv = ConvGeometry(torch.Size(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)
        return cls(conv, tuple(size), block, align)

    def numbers(self) -> tuple:
        """The arguments of `of_numbers`."""
        conv = self.conv
        geometry = conv.weight_shape, conv.stride, conv.padding, conv.dilation, conv.groups
        return self.size, *geometry, self.block, self.align

    def axes(self, dy_NOPQ: Tensor) -> tuple[ConvAxis, ConvAxis]:
        """Rows and columns. The map must have pixels."""
        conv = self.conv
        rows, columns = (
            ConvAxis(*numbers, min(self.block, numbers[1]), self.align)
            for numbers in zip(
                dy_NOPQ.shape[2:],
                self.size,
                conv.weight_shape[2:],
                conv.stride,
                conv.padding,
                conv.dilation,
                strict=True,
            )
        )
        return rows, columns


def pool_reference(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """x [N, C, H, W] -> block means [N, C, h, w] in x's dtype and memory format."""
    if x_NCHW.numel() == 0:
        return empty_pooled(x_NCHW, block, align)
    kernel = tuple(min(block, size) for size in x_NCHW.shape[2:])
    return F.avg_pool2d(x_NCHW, kernel, kernel, ceil_mode=align == "ceil", count_include_pad=False)


def pool_max(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """`pool_reference` with the maximum of each block in place of its mean. There is no kernel."""
    if x_NCHW.numel() == 0:
        return empty_pooled(x_NCHW, block, align)
    kernel = tuple(min(block, size) for size in x_NCHW.shape[2:])
    return F.max_pool2d(x_NCHW, kernel, kernel, ceil_mode=align == "ceil")


def empty_pooled(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """Uninitialised block means of x, in its memory format."""
    sides = [(length, max(min(block, length), 1)) for length in x_NCHW.shape[2:]]
    sizes = [length // side if align == "authors" else cdiv(length, side) for length, side in sides]
    return empty((*x_NCHW.shape[:2], *sizes), x_NCHW.dtype, x_NCHW.device, is_channels_last(x_NCHW))


def upsample_reference(pooled_NCHW: Tensor, size: tuple[int, int], block: int, align: str) -> Tensor:
    """Block means -> x~ [N, C, H, W] of `size` (H, W)."""
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


def conv2d_weight_grad_reference(pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv) -> Tensor:
    """dW [O, I / groups, kh, kw] against x~, in dy's dtype. Half types are summed in fp32. Zeros if x or dY is empty."""
    weight_shape, groups = geometry.conv.weight_shape, geometry.conv.groups
    if 0 in (pooled_NIhw.numel(), dy_NOPQ.numel()):
        return dy_NOPQ.new_zeros(weight_shape)
    compute = compute_dtype(dy_NOPQ.dtype)
    pooled, dy = pooled_NIhw.to(compute), dy_NOPQ.to(compute)
    n, out_channels = dy.shape[:2]
    grouped = pooled.reshape(n, groups, -1, pooled.shape[2] * pooled.shape[3])  # [N, groups, I / groups, blocks]
    met_rows, met_columns = (
        [axis.blocks_met(tap, dy.device) for tap in range(axis.taps)] for axis in geometry.axes(dy_NOPQ)
    )
    dw = dy.new_empty(weight_shape)
    rows = [_sum_into(dy, 2, index, pooled.shape[2]) for index in met_rows]
    for a, b in product(range(len(met_rows)), range(len(met_columns))):
        summed = _sum_into(rows[a], 3, met_columns[b], pooled.shape[3]).reshape(n, groups, out_channels // groups, -1)
        dw[:, :, a, b] = torch.einsum("ngos,ngis->goi", summed, grouped).reshape(weight_shape[:2])
    return dw.to(dy_NOPQ.dtype)


def _sum_into(x: Tensor, axis: int, index: Tensor, count: int) -> Tensor:
    """x summed along `axis` into `count` places; elements of index -1 are dropped."""
    shape = list(x.shape)
    shape[axis] = count + 1  # the last place takes the dropped elements
    index = torch.where(index < 0, count, index)
    return x.new_zeros(shape).index_add_(axis, index, x).narrow(axis, 0, count)
