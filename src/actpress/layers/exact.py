"""Layers whose gradient is exact from less than stock PyTorch saves: masks of one bit, window offsets of one byte, or nothing.

    ReLU, ReLU6, Hardtanh, LeakyReLU, Hardsigmoid    1 bit per element: on which side of a bend x lies
    Dropout                                          1 bit per element
    MaxPool2d                                        1 byte per output
    AvgPool2d                                        nothing

All are linear in dy, so their backward can be differentiated again. They need no codec.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from actpress.codec import leave_mask
from actpress.kernels import dropout as dropout_kernels
from actpress.kernels import masks, max_pool
from actpress.kernels.common.layout import is_channels_last
from actpress.layers.base import Layer, differentiating_twice, records, self_adjoint, shape_only


class _ReLU(Function):
    @staticmethod
    def forward(ctx, x, inplace):
        if inplace:
            ctx.mark_dirty(x)
            y, packed = x, masks.relu_(x)
        else:
            y, packed = masks.relu(x)
        ctx.channels_last = is_channels_last(y)
        ctx.save_for_backward(packed)
        leave_mask(y, packed, inplace)
        return y

    @staticmethod
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        return self_adjoint(masks.relu_backward, dy, packed, ctx.channels_last), None


def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """F.relu that saves one bit per element instead of its output."""
    if not records(input, input):
        return F.relu(input, inplace)
    if torch.compiler.is_compiling():  # compiled code decides on its own buffers
        return into(input, _ReLU.apply(input, False), inplace)
    return _ReLU.apply(input, inplace)


def relu_(input: Tensor) -> Tensor:
    """In-place relu."""
    return relu(input, inplace=True)


def into(x: Tensor, y: Tensor, inplace: bool) -> Tensor:
    """y, written into x if `inplace`: what an in-place function of compiled code does, whoever reads x afterwards."""
    return x.copy_(y) if inplace else y


class ReLU(Layer, nn.ReLU):
    """nn.ReLU that saves one bit per element instead of its output."""

    kind, functional = "exact", ("relu", "relu_")

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace) if records(input, input) else self.stock(input)


class _Bent(Function):
    """A function that is linear on both sides of its bends."""

    @staticmethod
    def forward(ctx, x, name, options, inplace):
        stock, where, slopes = BENT[name]
        mask = where(x, *options)
        ctx.slopes, ctx.channels_last = slopes(*options), is_channels_last(mask)
        if inplace:
            ctx.mark_dirty(x)
        y = stock(x, *options)
        y = x.copy_(y) if inplace else y
        ctx.save_for_backward(masks.pack_mask(mask))
        return y

    @staticmethod
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        return self_adjoint(_bent_backward, dy, packed, *ctx.slopes, ctx.channels_last), None, None, None


def _bent_backward(dy: Tensor, packed: Tensor, inside: float, outside: float | None, channels_last: bool) -> Tensor:
    """dy times the slope; 0 where that is None, also for a dy that is not finite."""
    mask = masks.unpack_mask(packed, dy.shape, channels_last)
    return torch.where(mask, dy if inside == 1 else dy * inside, 0 if outside is None else dy * outside)


def _between(x: Tensor, low: float, high: float) -> Tensor:
    return ~((x <= low) | (x >= high))


# name -> (stock function, where its slope is the first of two, the slopes)
BENT = {
    "leaky_relu": (F.leaky_relu, lambda x, slope: x > 0, lambda slope: (1.0, slope)),
    "relu6": (F.relu6, lambda x: _between(x, 0, 6), lambda: (1.0, None)),
    "hardtanh": (F.hardtanh, _between, lambda low, high: (1.0, None)),
    "hardsigmoid": (F.hardsigmoid, lambda x: (x > -3) & (x < 3), lambda: (1 / 6, None)),
}


def _bent(x: Tensor, name: str, options: tuple[float, ...], inplace: bool) -> Tensor:
    if not records(x, x):
        y = BENT[name][0](x, *options)
        return into(x, y, inplace)
    if torch.compiler.is_compiling():
        return into(x, _Bent.apply(x, name, options, False), inplace)
    return _Bent.apply(x, name, options, inplace)


def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """F.leaky_relu that saves one bit per element."""
    return _bent(input, "leaky_relu", (negative_slope,), inplace)


def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """In-place leaky_relu."""
    return _bent(input, "leaky_relu", (negative_slope,), True)


def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """In-place hardtanh."""
    return _bent(input, "hardtanh", (min_val, max_val), True)


def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """F.relu6 that saves one bit per element."""
    return _bent(input, "relu6", (), inplace)


def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """F.hardtanh that saves one bit per element."""
    return _bent(input, "hardtanh", (min_val, max_val), inplace)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """F.hardsigmoid that saves one bit per element."""
    return _bent(input, "hardsigmoid", (), inplace)


class LeakyReLU(Layer, nn.LeakyReLU):
    """nn.LeakyReLU that saves one bit per element."""

    kind, functional = "exact", ("leaky_relu", "leaky_relu_")

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace) if records(input, input) else self.stock(input)


class ReLU6(Layer, nn.ReLU6):
    """nn.ReLU6 that saves one bit per element."""

    kind, functional = "exact", ("relu6",)

    def forward(self, input: Tensor) -> Tensor:
        return relu6(input, self.inplace) if records(input, input) else self.stock(input)


class Hardtanh(Layer, nn.Hardtanh):
    """nn.Hardtanh that saves one bit per element."""

    kind, functional = "exact", ("hardtanh", "hardtanh_")

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        return hardtanh(input, self.min_val, self.max_val, self.inplace)


class Hardsigmoid(Layer, nn.Hardsigmoid):
    """nn.Hardsigmoid that saves one bit per element."""

    kind, functional = "exact", ("hardsigmoid",)

    def forward(self, input: Tensor) -> Tensor:
        return hardsigmoid(input, self.inplace) if records(input, input) else self.stock(input)


class _Dropout(Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.p = p
        if x.is_cuda:  # the very operation F.dropout runs there, which draws the same mask
            y, mask = torch.native_dropout(x, p, True)
        else:
            scale = torch.empty_like(x).bernoulli_(1 - p)
            mask = scale != 0
            y = x * scale.div_(1 - p)
        ctx.channels_last = is_channels_last(mask)
        ctx.save_for_backward(masks.pack_mask(mask))
        return y

    @staticmethod
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        return self_adjoint(dropout_kernels.dropout_backward, dy, packed, ctx.p, ctx.channels_last), None


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """F.dropout that saves one bit per element. It draws the mask stock dropout would draw."""
    active = training and 0 < p < 1 and not inplace
    return _Dropout.apply(input, p) if active and records(input, input) else F.dropout(input, p, training, inplace)


class Dropout(Layer, nn.Dropout):
    """nn.Dropout that saves one bit per element. It draws the mask stock dropout would draw."""

    kind, functional = "exact", ("dropout",)

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        return dropout(input, self.p, self.training, self.inplace)


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx, x_NCHW, window, ceil_mode):
        y, offset = max_pool.max_pool2d(x_NCHW, window, ceil_mode)
        ctx.window, ctx.shape, ctx.channels_last = window, x_NCHW.shape, is_channels_last(x_NCHW)
        ctx.save_for_backward(offset)
        return y

    @staticmethod
    def backward(ctx, dy_NCHW):
        (offset,) = ctx.saved_tensors
        run = _MaxPool2dBackward.apply if differentiating_twice() else max_pool.max_pool2d_backward
        return run(dy_NCHW, offset, ctx.shape, ctx.window, ctx.channels_last), None, None


class _MaxPool2dBackward(Function):
    """dx of dy; its adjoint reads dx at the maxima."""

    @staticmethod
    def forward(ctx, dy_NCHW, offset, shape, window, channels_last):
        ctx.save_for_backward(offset)
        ctx.window = window
        return max_pool.max_pool2d_backward(dy_NCHW, offset, shape, window, channels_last)

    @staticmethod
    def backward(ctx, ddx_NCHW):
        (offset,) = ctx.saved_tensors
        index = max_pool.window_index_reference(offset, ddx_NCHW.shape[-1], ctx.window)
        ddy = ddx_NCHW.flatten(-2).gather(-1, index.flatten(-2)).view(offset.shape)
        return ddy, None, None, None, None


def max_pool2d(
    input: Tensor, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> Tensor:
    """F.max_pool2d that saves one byte per output instead of its input and an int64 index."""
    stride = kernel_size if stride is None or stride == [] or stride == () else stride
    if return_indices or not records(input, input):
        return F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
    window = max_pool.Window(*(tuple(_pair(v)) for v in (kernel_size, stride, padding, dilation)))
    return _MaxPool2d.apply(input, window, ceil_mode)


class MaxPool2d(Layer, nn.MaxPool2d):
    """nn.MaxPool2d that saves one byte per output instead of its input and an int64 index."""

    kind, functional = "exact", ("max_pool2d",)

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        options = (self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices)
        return max_pool2d(input, self.kernel_size, *options)


class _AvgPool2d(Function):
    @staticmethod
    def forward(ctx, x_NCHW, *window):
        ctx.window, ctx.shape, ctx.channels_last = window, x_NCHW.shape, is_channels_last(x_NCHW)
        return F.avg_pool2d(x_NCHW, *window)

    @staticmethod
    def backward(ctx, dy_NCHW):
        kernel, stride, padding, *options = ctx.window
        x = shape_only(dy_NCHW, ctx.shape, ctx.channels_last)
        dx = torch.ops.aten.avg_pool2d_backward(dy_NCHW, x, _pair(kernel), _pair(stride), _pair(padding), *options)
        return dx, *(None for _ in ctx.window)


def avg_pool2d(
    input: Tensor,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
) -> Tensor:
    """F.avg_pool2d that saves nothing: stock PyTorch saves its input, of which the backward pass reads only the shape."""
    stride = kernel_size if stride is None or stride == [] or stride == () else stride
    window = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _AvgPool2d.apply(input, *window) if records(input, input) else F.avg_pool2d(input, *window)


class AvgPool2d(Layer, nn.AvgPool2d):
    """nn.AvgPool2d that saves nothing."""

    kind, functional = "exact", ("avg_pool2d",)

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        options = (self.ceil_mode, self.count_include_pad, self.divisor_override)
        return avg_pool2d(input, self.kernel_size, self.stride, self.padding, *options)
