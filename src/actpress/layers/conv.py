"""Convolutions of 1 to 3 axes. dx and the bias gradient are exact; the weight gradient is computed from what the codec kept of x.

Shapes: x and dy are [N, C, *axes]. Codecs see 1-d and 3-d inputs as maps, see codec.maps_shape.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from actpress.codec import Codec, Context, convolution_backward, keep, maps_shape, without_autocast
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.common.layout import is_channels_last
from actpress.layers.base import Layer, compute_dtype, own, probe_of, records, refuse, shape_only

STOCK = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Conv(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, conv, codec, context, origin):
        ctx.dtype, ctx.conv, ctx.x_dtype = compute_dtype(x), conv, x.dtype
        ctx.shape, ctx.origin, ctx.channels_last = x.shape, origin, is_channels_last(x)
        ctx.kept, saved = keep(codec, x, context, ctx.dtype, maps_shape(x.shape), origin)
        probe = probe_of(x)
        ctx.save_for_backward(weight, probe, *saved)
        y = STOCK[x.dim() - 2](x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return own(y), probe

    @staticmethod
    def backward(ctx, dy, _):
        weight, probe, *saved = ctx.saved_tensors
        dx = dw = db = None
        with without_autocast(dy):
            if ctx.needs_input_grad[0]:
                x = shape_only(dy, ctx.shape, ctx.channels_last)
                mask = (True, False, False)
                dx = convolution_backward(dy, x, weight.to(ctx.dtype), ctx.conv, mask)[0].to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                with torch.no_grad():
                    dw = _weight_grad(ctx, tuple(saved), dy).to(weight.dtype)
                (dw,) = refuse(ctx.origin, probe, dy, dw)
            if ctx.needs_input_grad[2]:
                db = dy.sum((0, *range(2, dy.dim()))).to(weight.dtype)
        return dx, dw, db, None, None, None, None


def _weight_grad(ctx: Any, saved: tuple[Tensor, ...], dy: Tensor) -> Tensor:
    if dy.dim() == 4:
        return ctx.kept.conv2d_weight_grad(saved, dy, ctx.conv)
    x = ctx.kept.decode(saved).reshape(ctx.shape)
    return convolution_backward(dy, x, shape_only(dy, ctx.conv.weight_shape), ctx.conv, (False, True, False))[1]


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | str | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
    codec: Codec,
    context: Context,
    origin: str,
) -> Tensor:
    axes = weight.dim() - 2
    if not records(x, weight) or x.dim() != axes + 2 or x.shape[1] != weight.shape[1] * groups:
        return STOCK[axes](x, weight, bias, stride, padding, dilation, groups)
    stride, dilation = (_each_axis(value, axes) for value in (stride, dilation))
    if isinstance(padding, str):
        x, padding = _padded(x, padding, weight.shape[2:], dilation)
    conv = ConvGeometry(weight.shape, stride, _each_axis(padding, axes), dilation, groups)
    return _Conv.apply(x, weight, bias, conv, codec, context, origin)[0]


def _each_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _padded(x: Tensor, padding: str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """padding="same" or "valid" as numbers; where "same" is uneven, x is padded first."""
    if padding == "valid":
        return x, (0,) * len(kernel)
    if padding != "same":
        raise ValueError(f"convolution: padding={padding!r}, allowed: same, valid, integers from 0")
    total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if all(t % 2 == 0 for t in total):
        return x, tuple(t // 2 for t in total)
    return F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)]), (0,) * len(kernel)


def conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, codec, context, origin="conv1d()"):
    """F.conv1d that saves its input [N, C, L] as `codec` says."""
    return _convolution(input, weight, bias, stride, padding, dilation, groups, codec, context, origin)


def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, codec, context, origin="conv2d()"):
    """F.conv2d that saves its input [N, C, H, W] as `codec` says."""
    return _convolution(input, weight, bias, stride, padding, dilation, groups, codec, context, origin)


def conv3d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, *, codec, context, origin="conv3d()"):
    """F.conv3d that saves its input [N, C, D, H, W] as `codec` says."""
    return _convolution(input, weight, bias, stride, padding, dilation, groups, codec, context, origin)


class _ConvLayer(Layer):
    """nn.Conv1d, Conv2d or Conv3d that saves its (padded, unless padding is zeros) input [N, C, *axes] as `codec` says."""

    kind = "maps"

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, self.weight) or input.dim() != self.weight.dim():
            return self.stock(input)
        if input.shape[1] != self.weight.shape[1] * self.groups:  # PyTorch's own error; see base.py of dynamic shapes
            return self.stock(input)
        padding = self._zero_padding()
        if padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * (input.dim() - 2)
        conv = ConvGeometry(self.weight.shape, self.stride, padding, self.dilation, self.groups)
        return _Conv.apply(input, self.weight, self.bias, conv, self.codec, self.context, self.origin)[0]

    def _zero_padding(self) -> tuple[int, ...] | None:
        """The padding if it is zeros and symmetric, otherwise None."""
        sides = self._reversed_padding_repeated_twice
        low, high = tuple(sides[-2::-2]), tuple(sides[-1::-2])
        return low if self.padding_mode == "zeros" and low == high else None


class Conv1d(_ConvLayer, nn.Conv1d):
    functional = ("conv1d",)


class Conv2d(_ConvLayer, nn.Conv2d):
    functional = ("conv2d",)


class Conv3d(_ConvLayer, nn.Conv3d):
    functional = ("conv3d",)
