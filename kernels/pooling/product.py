"""The weight gradient of a convolution against a pooled map (pooling.py) in PyTorch's own operations: three ways, and which is cheapest.

    smaller    one convolution's weight gradient on p(x) itself. Where blocks divide the stride, tap a meets block
               (stride / k) * row + floor((dilation * a - padding) / k): so does a tap of a convolution of stride / k on p(x), whose
               taps stand for up to k of ours each. A 16 x 16 patch embedding with blocks of 2 becomes an 8 x 8 one.
    taps       `conv2d_weight_grad_reference`: for each tap, dY summed over blocks and a product with p(x)
    decoded    x~ is built, then stock's weight gradient: x~ is dense for as long as that takes

All are exact against x~. "smaller" is taken wherever it exists: it never multiplies more than stock. "taps" is, too, if it does not
and takes less than decoding, in multiply-adds of an image, a pass over memory weighted by how many of these a CPU core does meanwhile:

    taps       O * I / groups * kh * kw * h * w + SUMMING * O * (kh * P + kh * kw * h) * Q
    decoded    O * I / groups * kh * kw * P * Q + DECODING * I * H * W

So taps serve wide layers of few taps, and no kernel, stride, dilation, padding or number of groups costs much more than stock.
Shapes: dY [N, O, P, Q], p(x) [N, I, h, w], x~ [N, I, H, W], k the block.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.pooling import conv2d_weight_grad_reference, upsample_reference

SUMMING = 75  # multiply-adds of a convolution in the time that adding an element of dY to its block takes: measured, one thread, fp32
DECODING = 33  # in the time that writing an element of x~ takes


class Axis(NamedTuple):
    """Rows or columns of the convolution on p(x)."""

    first: int  # block that its first tap meets at the first position of dY; below 0: zeros before the map
    length: int  # blocks that it reaches
    stride: int
    dilation: int
    taps: int
    stands_for: tuple[int, ...]  # which of its taps stands for each of the convolution's


def smaller_axis(
    outputs: int, length: int, taps: int, stride: int, padding: int, dilation: int, block: int, align: str
) -> Axis | None:
    """The axis of the convolution on p(x) with `outputs` positions of dY; None where there is none: blocks do not divide the stride, the
    padding reaches beyond a last block that is smaller than the others, or nothing but padding is met."""
    block = min(block, length)
    shift = length % block if align == "authors" else 0
    beyond = stride * (outputs - 1) + dilation * (taps - 1) - padding >= length
    if stride % block or (beyond and (length - shift) % block):
        return None
    met = [(dilation * tap - padding - shift) // block for tap in range(taps)]
    stride //= block
    length = stride * (outputs - 1) + met[-1] - met[0] + 1
    if met[0] + length <= 0:  # padding alone
        return None
    apart = max(math.gcd(*(blocks - met[0] for blocks in met)), 1)
    stands_for = tuple((blocks - met[0]) // apart for blocks in met)
    return Axis(met[0], length, stride, apart, stands_for[-1] + 1, stands_for)


def smaller_axes(dy_NOPQ: Tensor, *geometry: Any) -> tuple[Axis, Axis] | None:
    """Both axes, if the convolution on p(x) exists and has no more taps than the convolution."""
    size, weight_shape, stride, padding, dilation, _, block, align = geometry
    axes = [
        smaller_axis(*axis, block, align)
        for axis in zip(dy_NOPQ.shape[2:], size, weight_shape[2:], stride, padding, dilation, strict=True)
    ]
    if None in axes or axes[0].taps * axes[1].taps > math.prod(weight_shape[2:]):
        return None
    return axes[0], axes[1]


def by_smaller(pooled_NIhw: Tensor, dy_NOPQ: Tensor, axes: tuple[Axis, Axis], weight_shape: Sequence[int], groups: int):
    """dW by the convolution on p(x). Half types are summed in fp32."""
    compute = torch.promote_types(dy_NOPQ.dtype, torch.float32)
    rows, columns = axes
    edges = [edge for axis, size in ((columns, 3), (rows, 2)) for edge in _edges(axis, pooled_NIhw.shape[size])]
    pooled = F.pad(pooled_NIhw.to(compute), edges) if any(edges) else pooled_NIhw.to(compute)
    shape = (*weight_shape[:2], rows.taps, columns.taps)
    stride, dilation = (rows.stride, columns.stride), (rows.dilation, columns.dilation)
    dw = _weight_grad(pooled, dy_NOPQ.to(compute), shape, stride, (0, 0), dilation, groups)
    for dim, axis in enumerate(axes, start=2):
        if axis.stands_for != tuple(range(axis.taps)):
            dw = dw.index_select(dim, torch.tensor(axis.stands_for, device=dw.device))
    return dw.to(dy_NOPQ.dtype)


def by_decoding(pooled_NIhw: Tensor, dy_NOPQ: Tensor, *geometry: Any) -> Tensor:
    """dW from x~ as stock PyTorch computes it, in dY's dtype."""
    size, weight_shape, stride, padding, dilation, groups, block, align = geometry
    x = upsample_reference(pooled_NIhw.to(dy_NOPQ.dtype), size, block, align)
    memory_format = torch.channels_last if is_channels_last(dy_NOPQ) else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    return _weight_grad(x, dy_NOPQ, weight_shape, stride, padding, dilation, groups)


def taps_are_cheaper(dy_NOPQ: Tensor, *geometry: Any) -> bool:
    """Than decoding, by the counts above."""
    (height, width), (_, inputs, kh, kw), *_, groups, block, _ = geometry
    _, outputs, p, q = dy_NOPQ.shape
    h, w = (-(-length // min(block, length)) for length in (height, width))
    product = outputs * inputs * kh * kw
    by_taps = product * h * w + SUMMING * outputs * (kh * p + kh * kw * h) * q
    return h * w <= p * q and by_taps < product * p * q + DECODING * inputs * groups * height * width


def conv2d_weight_grad_composed(pooled_NIhw: Tensor, dy_NOPQ: Tensor, *geometry: Any) -> Tensor:
    """`conv2d_weight_grad_reference` in the cheapest of three ways; equal but for the order of sums, and, where x~ is decoded, but for the
    dtype in which stock PyTorch sums. dW [O, I / groups, kh, kw] in dY's dtype, zeros without an element of x or dY."""
    weight_shape, groups = geometry[1], geometry[5]
    if 0 in (pooled_NIhw.numel(), dy_NOPQ.numel()):
        return dy_NOPQ.new_zeros(weight_shape)
    axes = smaller_axes(dy_NOPQ, *geometry)
    if axes is not None:
        return by_smaller(pooled_NIhw, dy_NOPQ, axes, weight_shape, groups)
    way = conv2d_weight_grad_reference if taps_are_cheaper(dy_NOPQ, *geometry) else by_decoding
    return way(pooled_NIhw, dy_NOPQ, *geometry)


def _edges(axis: Axis, blocks: int) -> tuple[int, int]:
    """Zeros before and after an axis of p(x), so that it is what the convolution reaches; below 0: blocks that are left out."""
    return -axis.first, axis.first + axis.length - blocks


def _weight_grad(x: Tensor, dy: Tensor, weight_shape: Sequence[int], stride, padding, dilation, groups: int) -> Tensor:
    weight = dy.new_empty(()).expand(tuple(weight_shape))  # only its shape is read
    geometry = stride, padding, dilation, False, (0, 0), groups
    return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, (False, True, False))[1].contiguous()
