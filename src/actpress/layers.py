"""The layers a method puts in place of stock ones: same forward output, same parameters, less kept for backward.

Each is a subclass of its stock layer with one autograd.Function. What a layer keeps of its input is decided by a Codec;
masks and window offsets are exact and need none. Everything kept goes through save_for_backward, so in-place changes are caught and
saved-tensor hooks see it. Where nothing has to be kept (no_grad, frozen weights) the stock layer runs.

Under autocast inputs are cast before they are kept (bf16 stays bf16) and parameters are cast again in the backward pass
instead of keeping the cast copy.

Shapes: x_NCHW and dy_NCHW are maps, dy_O ends in the output features, idx holds positions in a map.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

from actpress.codec import Codec, Context, Conv, convolution_backward, keep, leave_mask
from actpress.kernels import dropout, masks, max_pool
from actpress.kernels.layout import is_channels_last


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, runs a matrix product or convolution of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def shape_only(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of `shape` without memory of its own, for backward ops that read only the shape of an argument."""
    return like.new_empty(()).expand(shape)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, codec, context):
        ctx.dtype, ctx.codec, ctx.x_dtype = compute_dtype(x), codec, x.dtype
        ctx.like, kept = keep(codec, x, context, ctx.dtype)
        ctx.save_for_backward(weight, *kept)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_O):
        weight, *kept = ctx.saved_tensors
        dx = dw = db = None
        with torch.autocast(dy_O.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dx = (dy_O @ weight.to(ctx.dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                dw = ctx.codec.linear_weight_grad(tuple(kept), ctx.like, dy_O).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                db = dy_O.reshape(-1, dy_O.shape[-1]).sum(0).to(weight.dtype)
        return dx, dw, db, None, None


class Linear(nn.Linear):
    """nn.Linear that keeps its input x [..., in] as `codec` says."""

    codec: Codec
    context: Context

    def forward(self, x: Tensor) -> Tensor:
        if not needs_grad(self.weight):
            return super().forward(x)
        return _Linear.apply(x, self.weight, self.bias, self.codec, self.context)


class _Conv2d(Function):
    @staticmethod
    def forward(ctx, x_NCHW, weight, bias, conv, codec, context):
        ctx.dtype, ctx.conv, ctx.codec, ctx.x_dtype = compute_dtype(x_NCHW), conv, codec, x_NCHW.dtype
        ctx.like, kept = keep(codec, x_NCHW, context, ctx.dtype)
        ctx.save_for_backward(weight, *kept)
        return F.conv2d(x_NCHW, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NCHW):
        weight, *kept = ctx.saved_tensors
        dx = dw = db = None
        with torch.autocast(dy_NCHW.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                x = shape_only(dy_NCHW, ctx.like.shape)
                dx = convolution_backward(dy_NCHW, x, weight.to(ctx.dtype), ctx.conv, (True, False, False))[0].to(
                    ctx.x_dtype
                )
            if ctx.needs_input_grad[1]:
                dw = ctx.codec.conv2d_weight_grad(tuple(kept), ctx.like, dy_NCHW, ctx.conv).to(weight.dtype)
            if ctx.needs_input_grad[2]:
                db = dy_NCHW.sum((0, 2, 3)).to(weight.dtype)
        return dx, dw, db, None, None, None


class Conv2d(nn.Conv2d):
    """nn.Conv2d that keeps its (padded, unless padding is zeros) input x [N, C, H, W] as `codec` says."""

    codec: Codec
    context: Context

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not needs_grad(self.weight) or x_NCHW.dim() != 4:
            return super().forward(x_NCHW)
        padding = self._zero_padding()
        if padding is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x_NCHW, padding = F.pad(x_NCHW, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        conv = Conv(self.weight.shape, self.stride, padding, self.dilation, self.groups)
        return _Conv2d.apply(x_NCHW, self.weight, self.bias, conv, self.codec, self.context)

    def _zero_padding(self) -> tuple[int, int] | None:
        """The padding if it is zeros and symmetric, otherwise None."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        return (top, left) if self.padding_mode == "zeros" and (top, left) == (bottom, right) else None


class _BatchNorm2d(Function):
    @staticmethod
    def forward(ctx, x_NCHW, weight, bias, running_mean, running_var, training, momentum, eps, codec, context):
        y, mean, invstd, _, _ = torch._batch_norm_impl_index(
            x_NCHW, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.training, ctx.eps, ctx.codec, ctx.like = training, eps, codec, None
        kept = ()
        if training or ctx.needs_input_grad[1]:
            ctx.like, kept = keep(codec, x_NCHW, context, x_NCHW.dtype)
        # the batch's own statistics in training, the running ones otherwise
        statistics = (mean, invstd) if training else (running_mean, running_var)
        ctx.shape = x_NCHW.shape
        ctx.save_for_backward(weight, *statistics, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NCHW):
        weight, mean, spread, *kept = ctx.saved_tensors
        x = ctx.codec.decode(tuple(kept), ctx.like) if ctx.like else shape_only(dy_NCHW, ctx.shape)
        running, batch = ((None, None), (mean, spread)) if ctx.training else ((mean, spread), (None, None))
        grads = torch.ops.aten.native_batch_norm_backward(
            dy_NCHW, x, weight, *running, *batch, ctx.training, ctx.eps, list(ctx.needs_input_grad[:3])
        )
        return *grads, None, None, None, None, None, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d that keeps its input x [N, C, H, W] as `codec` says. Mean and inverse deviation stay exact."""

    codec: Codec
    context: Context

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not needs_grad(x_NCHW, self.weight, self.bias):
            return super().forward(x_NCHW)
        self._check_input_dim(x_NCHW)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        training = self.training or self.running_mean is None
        return _BatchNorm2d.apply(
            x_NCHW, self.weight, self.bias, mean, var, training, momentum, self.eps, self.codec, self.context
        )


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps, codec, context):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.codec = shape, codec
        ctx.like, kept = keep(codec, x, context, x.dtype)
        ctx.save_for_backward(weight, bias, mean, rstd, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, bias, mean, rstd, *kept = ctx.saved_tensors
        x = ctx.codec.decode(tuple(kept), ctx.like)
        mask = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(dy, x, ctx.shape, mean, rstd, weight, bias, mask)
        return dx, None, dw, db, None, None, None


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that keeps its input x [..., *normalized_shape] as `codec` says. Mean and inverse deviation stay exact."""

    codec: Codec
    context: Context

    def forward(self, x: Tensor) -> Tensor:
        if not needs_grad(x, self.weight, self.bias):
            return super().forward(x)
        # CUDA's autocast runs layer norm in fp32; the operation called here is below autocast
        x = x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") else x
        return _LayerNorm.apply(x, self.normalized_shape, self.weight, self.bias, self.eps, self.codec, self.context)


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
    @once_differentiable
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        return masks.relu_backward(dy, packed, ctx.channels_last), None


def relu(x: Tensor, inplace: bool = False) -> Tensor:
    """F.relu that keeps one bit per element instead of its output."""
    if not needs_grad(x):
        return x.relu_() if inplace else x.relu()
    return _ReLU.apply(x, inplace and not torch.compiler.is_compiling())  # compiled code decides on its own buffers


def relu_(x: Tensor) -> Tensor:
    """In-place relu."""
    return relu(x, inplace=True)


class ReLU(nn.ReLU):
    """nn.ReLU that keeps one bit per element instead of its output."""

    def forward(self, x: Tensor) -> Tensor:
        return relu(x, self.inplace)


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
    @once_differentiable
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        return dropout.dropout_backward(dy, packed, ctx.p, ctx.channels_last), None


class Dropout(nn.Dropout):
    """nn.Dropout that keeps one bit per element. It draws the mask stock dropout would draw."""

    def forward(self, x: Tensor) -> Tensor:
        active = self.training and 0 < self.p < 1 and not self.inplace
        return _Dropout.apply(x, self.p) if active and needs_grad(x) else super().forward(x)


class _MaxPool2d(Function):
    @staticmethod
    def forward(ctx, x_NCHW, window, ceil_mode):
        y, offset = max_pool.max_pool2d(x_NCHW, window, ceil_mode)
        ctx.window, ctx.shape, ctx.channels_last = window, x_NCHW.shape, is_channels_last(x_NCHW)
        ctx.save_for_backward(offset)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NCHW):
        (offset,) = ctx.saved_tensors
        return max_pool.max_pool2d_backward(dy_NCHW, offset, ctx.shape, ctx.window, ctx.channels_last), None, None


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d that keeps one byte per output instead of its input and an int64 index."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not needs_grad(x_NCHW) or self.return_indices:
            return super().forward(x_NCHW)
        window = max_pool.Window(_pair(self.kernel_size), _pair(self.stride), _pair(self.padding), _pair(self.dilation))
        return _MaxPool2d.apply(x_NCHW, window, self.ceil_mode)


class _AvgPool2d(Function):
    @staticmethod
    def forward(ctx, x_NCHW, *window):
        ctx.window, ctx.shape = window, x_NCHW.shape
        return F.avg_pool2d(x_NCHW, *window)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NCHW):
        kernel, stride, padding, *options = ctx.window
        x = shape_only(dy_NCHW, ctx.shape)
        dx = torch.ops.aten.avg_pool2d_backward(dy_NCHW, x, _pair(kernel), _pair(stride), _pair(padding), *options)
        return dx, *(None for _ in ctx.window)


class AvgPool2d(nn.AvgPool2d):
    """nn.AvgPool2d that keeps nothing: stock PyTorch keeps its input, of which the backward pass reads only the shape."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if not needs_grad(x_NCHW):
            return super().forward(x_NCHW)
        options = (self.ceil_mode, self.count_include_pad, self.divisor_override)
        return _AvgPool2d.apply(x_NCHW, self.kernel_size, self.stride, self.padding, *options)
