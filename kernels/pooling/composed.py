"""The weight gradient of a convolution against a pooled map, composed of PyTorch's own operations: three strategies, and the cheapest.

    smaller    one convolution's weight gradient on p(x) itself. If blocks divide the stride, tap a meets block
               (stride / k) * row + floor((dilation * a - padding) / k). So does a tap of a convolution of stride / k on p(x), each of whose
               taps stands for up to k taps of the original. A 16 x 16 patch embedding with blocks of 2 becomes an 8 x 8 one.
    taps       `conv2d_weight_grad_reference`: for each tap, dY summed over blocks and a product with p(x)
    decoded    x~ is built, then the weight gradient of stock PyTorch: x~ is dense for as long as that takes

All are exact against x~. "smaller" is used wherever it exists; it never multiplies more than stock. Otherwise "taps" is used, if it does
not multiply more than stock either and is estimated to be cheaper than "decoded". Estimates count multiply-adds per image. A pass over
memory is weighted by the multiply-adds that a CPU core does in the same time:

    taps       O * I / groups * kh * kw * h * w + SUMMING * O * (kh * P + kh * kw * h) * Q
    decoded    O * I / groups * kh * kw * P * Q + DECODING * I * H * W

So "taps" serves wide layers of few taps, and no kernel, stride, dilation, padding or number of groups costs much more than stock.
Shapes: dY [N, O, P, Q], p(x) [N, I, h, w], x~ [N, I, H, W], k the block.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.common.layout import dense_as, is_channels_last
from actpress.kernels.pooling.reference import ConvAxis, PooledConv, conv2d_weight_grad_reference, upsample_reference

SUMMING = (
    75  # multiply-adds of a convolution in the time that adding an element of dY to its block takes: one thread, fp32
)
DECODING = 33  # in the time that writing an element of x~ takes


class SmallerAxis(NamedTuple):
    """Rows or columns of the convolution on p(x)."""

    first: int  # block that its first tap meets at the first position of dY; below 0: zeros before the map
    length: int  # blocks that it reaches
    stride: int
    dilation: int
    taps: int
    stands_for: tuple[int, ...]  # for each tap of the original convolution, the tap that stands for it


def smaller_axis(axis: ConvAxis) -> SmallerAxis | None:
    """The axis of the convolution on p(x).

    None if blocks do not divide the stride, if the padding reaches beyond a last block that is smaller than the others, or if nothing but
    padding is met.
    """
    beyond = axis.stride * (axis.outputs - 1) + axis.dilation * (axis.taps - 1) - axis.padding >= axis.length
    if axis.stride % axis.block or (beyond and (axis.length - axis.shift) % axis.block):
        return None
    met = [(axis.dilation * tap - axis.padding - axis.shift) // axis.block for tap in range(axis.taps)]
    stride = axis.stride // axis.block
    length = stride * (axis.outputs - 1) + met[-1] - met[0] + 1
    if met[0] + length <= 0:  # padding alone
        return None
    apart = max(math.gcd(*(blocks - met[0] for blocks in met)), 1)
    stands_for = tuple((blocks - met[0]) // apart for blocks in met)
    return SmallerAxis(met[0], length, stride, apart, stands_for[-1] + 1, stands_for)


def smaller_axes(dy_NOPQ: Tensor, geometry: PooledConv) -> tuple[SmallerAxis, SmallerAxis] | None:
    """Both axes, if the convolution on p(x) exists and has no more taps than the original."""
    rows, columns = (smaller_axis(axis) for axis in geometry.axes(dy_NOPQ))
    if rows is None or columns is None or rows.taps * columns.taps > math.prod(geometry.conv.weight_shape[2:]):
        return None
    return rows, columns


def by_smaller(
    pooled_NIhw: Tensor, dy_NOPQ: Tensor, axes: tuple[SmallerAxis, SmallerAxis], geometry: PooledConv
) -> Tensor:
    """dW by the convolution on p(x). Half types are summed in fp32."""
    compute = compute_dtype(dy_NOPQ.dtype)
    rows, columns = axes
    edges = [edge for axis, size in ((columns, 3), (rows, 2)) for edge in _edges(axis, pooled_NIhw.shape[size])]
    pooled = F.pad(pooled_NIhw.to(compute), edges) if any(edges) else pooled_NIhw.to(compute)
    shape = torch.Size((*geometry.conv.weight_shape[:2], rows.taps, columns.taps))
    stride, dilation = (rows.stride, columns.stride), (rows.dilation, columns.dilation)
    smaller = ConvGeometry(shape, stride, (0, 0), dilation, geometry.conv.groups)
    dw = _weight_grad(pooled, dy_NOPQ.to(compute), smaller)
    for dim, axis in enumerate(axes, start=2):
        if axis.stands_for != tuple(range(axis.taps)):
            dw = dw.index_select(dim, torch.tensor(axis.stands_for, device=dw.device))
    return dw.to(dy_NOPQ.dtype)


def by_decoding(pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv) -> Tensor:
    """dW from x~ as stock PyTorch computes it, in dY's dtype."""
    x = upsample_reference(pooled_NIhw.to(dy_NOPQ.dtype), geometry.size, geometry.block, geometry.align)
    return _weight_grad(dense_as(x, is_channels_last(dy_NOPQ)), dy_NOPQ, geometry.conv)


def taps_are_cheaper(dy_NOPQ: Tensor, geometry: PooledConv) -> bool:
    """Whether "taps" is cheaper than "decoded", by the estimates above."""
    (height, width), (_, inputs, kh, kw) = geometry.size, geometry.conv.weight_shape
    _, outputs, p, q = dy_NOPQ.shape
    h, w = (-(-length // min(geometry.block, length)) for length in (height, width))
    product = outputs * inputs * kh * kw
    by_taps = product * h * w + SUMMING * outputs * (kh * p + kh * kw * h) * q
    decoding = DECODING * inputs * geometry.conv.groups * height * width
    return h * w <= p * q and by_taps < product * p * q + decoding


def conv2d_weight_grad_composed(pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv) -> Tensor:
    """`conv2d_weight_grad_reference` by the cheapest strategy: dW [O, I / groups, kh, kw] in dY's dtype, zeros if x or dY is empty.

    Differs from it in the order of sums, and where x~ is decoded in the dtype in which stock PyTorch sums.
    """
    if 0 in (pooled_NIhw.numel(), dy_NOPQ.numel()):
        return dy_NOPQ.new_zeros(geometry.conv.weight_shape)
    axes = smaller_axes(dy_NOPQ, geometry)
    if axes is not None:
        return by_smaller(pooled_NIhw, dy_NOPQ, axes, geometry)
    strategy = conv2d_weight_grad_reference if taps_are_cheaper(dy_NOPQ, geometry) else by_decoding
    return strategy(pooled_NIhw, dy_NOPQ, geometry)


def _edges(axis: SmallerAxis, blocks: int) -> tuple[int, int]:
    """Zeros to add before and after an axis of p(x), so that it is what the convolution reaches; below 0: blocks to remove."""
    return -axis.first, axis.first + axis.length - blocks


def _weight_grad(x: Tensor, dy: Tensor, conv: ConvGeometry) -> Tensor:
    weight = dy.new_empty(()).expand(tuple(conv.weight_shape))  # only its shape is read
    geometry = conv.stride, conv.padding, conv.dilation, False, (0, 0), conv.groups
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, (False, True, False))[1].contiguous()
