"""Normalisation layers: mean and inverse deviation stay exact, the normalised input is saved as the codec says.

The backward pass of a norm, y = w xhat + b with xhat = (x - mean) / deviation, reads xhat alone:

    dw = sum dy xhat        dx = (w dy - mean(w dy) - xhat mean(w dy xhat)) / deviation

so xhat is what codecs get, not x. It is bounded whatever the scale of a token or a channel: its error is not amplified by 1 / deviation.
Layer, RMS and group norms of tokens hand it over as rows, a token each, so that a code has ranges of its own for every token; batch norms
hand over maps. Codecs that ask for x itself (Codec.normalised) get it, as do those that keep it dense.

PyTorch's own backward operations are called, with xhat as x, mean 0 and deviation 1, and what is left is a factor of dx.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from actpress.codec import Codec, Context, keep_normalised, maps_shape
from actpress.kernels.common.launch import directly
from actpress.kernels.common.layout import dense
from actpress.layers.base import Layer, differentiating_twice, own, probe_of, records, refuse, shape_only


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, training, momentum, eps, codec, context, origin):
        y, mean, invstd, _, _ = torch._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.training, ctx.eps, ctx.origin, ctx.shape = training, eps, origin, x.shape
        spread = invstd
        if not training:  # the running statistics instead of the batch's own
            mean, spread, invstd = running_mean, running_var, _inverse_deviation(running_var, eps)
        ctx.kept, saved, ctx.normalised = None, (), True
        if training or ctx.needs_input_grad[1]:

            def normalise() -> Tensor:
                return _normalised(x, mean, invstd)

            ctx.kept, saved, ctx.normalised = keep_normalised(codec, x, normalise, context, maps_shape(x.shape), origin)
        probe = probe_of(x)
        ctx.save_for_backward(weight, mean, spread, probe, *saved)
        return own(y), probe

    @staticmethod
    def backward(ctx, dy, _):
        weight, mean, spread, probe, *saved = ctx.saved_tensors
        with torch.no_grad():
            dx, dw, db = _batch_norm_backward(ctx, dy, weight, mean, spread, tuple(saved))
        if differentiating_twice():
            if ctx.training:
                dx, dw, db = refuse(ctx.origin, probe, dy, dx, dw, db)
            else:  # linear in dy
                (dw,) = refuse(ctx.origin, probe, dy, dw)
                invstd = _inverse_deviation(spread, ctx.eps)
                scale = invstd if weight is None else weight * invstd
                dx = None if dx is None else (dy * _by_channel(scale, dy)).to(dx.dtype)
                db = None if db is None else dy.sum([d for d in range(dy.dim()) if d != 1]).to(db.dtype)
        return dx, dw, db, *(None for _ in range(8))


def _batch_norm_backward(ctx: Any, dy: Tensor, weight: Tensor | None, mean: Tensor, spread: Tensor, saved: tuple):
    """spread: the batch's inverse deviation, in evaluation the running variance."""
    x = ctx.kept.decode(saved).reshape(ctx.shape) if ctx.kept else shape_only(dy, ctx.shape)
    scale, eps = weight, 0.0 if ctx.training else ctx.eps
    if ctx.normalised:
        invstd = spread if ctx.training else _inverse_deviation(spread, eps)
        scale = invstd if weight is None else weight.to(invstd.dtype) * invstd
        mean, spread, scale, eps = torch.zeros_like(mean), torch.ones_like(spread), scale.to(spread.dtype), 0.0
    mask = list(ctx.needs_input_grad[:3])
    running, batch = ((None, None), (mean, spread)) if ctx.training else ((mean, spread), (None, None))
    dx, dw, db = torch.ops.aten.native_batch_norm_backward(dy, x, scale, *running, *batch, ctx.training, eps, mask)
    return dx, *(None if g is None or weight is None else g.to(weight.dtype) for g in (dw, db))


def _normalised(x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    """(x - mean) invstd of a batch norm, computed in at least fp32."""
    if directly(x) and x.numel():  # one pass over memory, rounded to x's dtype, instead of three and a fourth to round
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.batch_norm_elemt(x.detach(), None, None, mean.to(wide), invstd.to(wide), 0.0)
    return (upcast(x) - _by_channel(mean, x)).mul_(_by_channel(invstd, x))


def _inverse_deviation(var: Tensor, eps: float) -> Tensor:
    """In at least fp32: fp16 has no number above 65504, and 1 / eps is one."""
    return (var.to(torch.promote_types(var.dtype, torch.float32)) + eps).rsqrt()


def upcast(x: Tensor) -> Tensor:
    """x without its graph, in at least fp32: a difference of two fp16 numbers may be too large for fp16."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *(1 for _ in range(x.dim() - 2)))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    codec: Codec,
    context: Context,
    origin: str = "batch_norm()",
) -> Tensor:
    """F.batch_norm that saves its input [N, C] or [N, C, *axes], normalised, as `codec` says. Standardised weights stay stock."""
    if _is_parameter(input) or not records(input, input, weight, bias):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if training and (input.numel() == input.shape[1] or eps <= 0):  # PyTorch's own errors
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    arguments = (input, weight, bias, running_mean, running_var, training, momentum, eps, codec, context, origin)
    return _BatchNorm.apply(*arguments)[0]


def _is_parameter(x: Tensor) -> bool:
    return isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter)


class _BatchNormLayer(Layer):
    """nn.BatchNorm1d, BatchNorm2d or BatchNorm3d that saves its normalised input [N, C, *axes] as `codec` says."""

    kind, functional = "maps", ("batch_norm",)

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input, self.weight, self.bias):
            return self.stock(input)
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if tracked else (None, None)
        training = self.training or self.running_mean is None
        keeping = {"codec": self.codec, "context": self.context, "origin": self.origin}
        return batch_norm(input, mean, var, self.weight, self.bias, training, momentum, self.eps, **keeping)


class BatchNorm1d(_BatchNormLayer, nn.BatchNorm1d):
    pass


class BatchNorm2d(_BatchNormLayer, nn.BatchNorm2d):
    pass


class BatchNorm3d(_BatchNormLayer, nn.BatchNorm3d):
    pass


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx, x, shape, weight, bias, eps, codec, context, origin):
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.shape, ctx.origin = shape, origin

        def normalise() -> Tensor:
            return (upcast(x) - mean).mul_(rstd)

        rows = torch.Size((mean.numel(), math.prod(shape)))
        ctx.kept, saved, ctx.normalised = keep_normalised(codec, x, normalise, context, rows, origin)
        probe = probe_of(x)
        ctx.save_for_backward(weight, bias, None if ctx.normalised else mean, rstd, probe, *saved)
        return own(y), probe

    @staticmethod
    def backward(ctx, dy, _):
        weight, bias, mean, rstd, probe, *saved = ctx.saved_tensors
        mask = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        with torch.no_grad():
            x = ctx.kept.decode(tuple(saved)).reshape(dy.shape)
            mean, scale = (mean, rstd) if mean is not None else (torch.zeros_like(rstd), torch.ones_like(rstd))
            dx, dw, db = torch.ops.aten.native_layer_norm_backward(dy, x, ctx.shape, mean, scale, weight, bias, mask)
            if ctx.normalised and dx is not None:
                dx = dx.mul_(rstd)
        dx, dw, db = refuse(ctx.origin, probe, dy, dx, dw, db)
        return dx, None, dw, db, None, None, None, None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    codec: Codec,
    context: Context,
    origin: str = "layer_norm()",
) -> Tensor:
    """F.layer_norm that saves its input [..., *normalized_shape], normalised, as `codec` says."""
    if not records(input, input, weight, bias):
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    # CUDA's autocast runs layer norm in fp32; the operation called here is below autocast
    x = input.float() if input.is_cuda and torch.is_autocast_enabled("cuda") else input
    return _LayerNorm.apply(x, tuple(normalized_shape), weight, bias, eps, codec, context, origin)[0]


class LayerNorm(Layer, nn.LayerNorm):
    """nn.LayerNorm that saves its normalised input [..., *normalized_shape] as `codec` says."""

    kind, functional = "token norms", ("layer_norm",)

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input, self.weight, self.bias):
            return self.stock(input)
        keeping = {"codec": self.codec, "context": self.context, "origin": self.origin}
        return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps, **keeping)


class _GroupNorm(Function):
    @staticmethod
    def forward(ctx, x, groups, weight, bias, eps, codec, context, origin):
        x = dense(x)
        n, channels, *axes = x.shape
        ctx.geometry = (n, channels, math.prod(axes), groups)
        y, mean, rstd = torch.native_group_norm(x, weight, bias, *ctx.geometry, eps)
        ctx.shape, ctx.origin = x.shape, origin

        def normalise() -> Tensor:
            return (upcast(x).reshape(n, groups, -1) - mean.unsqueeze(2)).mul_(rstd.unsqueeze(2))

        ctx.kept, saved, ctx.normalised = keep_normalised(codec, x, normalise, context, maps_shape(x.shape), origin)
        probe = probe_of(x)
        ctx.save_for_backward(weight, None if ctx.normalised else mean, rstd, probe, *saved)
        return own(y), probe

    @staticmethod
    def backward(ctx, dy, _):
        weight, mean, rstd, probe, *saved = ctx.saved_tensors
        mask = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        with torch.no_grad():
            x = ctx.kept.decode(tuple(saved)).reshape(ctx.shape).contiguous()
            mean, scale = (mean, rstd) if mean is not None else (torch.zeros_like(rstd), torch.ones_like(rstd))
            dx, dw, db = torch.ops.aten.native_group_norm_backward(
                dy.contiguous(), x, mean, scale, weight, *ctx.geometry, mask
            )
            if ctx.normalised and dx is not None:
                n, groups = ctx.geometry[0], ctx.geometry[3]
                dx.view(n, groups, -1).mul_(rstd.unsqueeze(2))
        dx, dw, db = refuse(ctx.origin, probe, dy, dx, dw, db)
        return dx, None, dw, db, None, None, None, None


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    codec: Codec,
    context: Context,
    origin: str = "group_norm()",
) -> Tensor:
    """F.group_norm that saves its input [N, C, *axes], normalised, as `codec` says."""
    autocast = input.is_cuda and torch.is_autocast_enabled("cuda")
    if not records(input, input, weight, bias) or input.dim() < 3:
        return F.group_norm(input, num_groups, weight, bias, eps)
    fits = weight is None or input.shape[1] == weight.shape[0]
    if not fits or input.shape[1] % num_groups or input.numel() // input.shape[0] == num_groups:  # PyTorch's own errors
        return F.group_norm(input, num_groups, weight, bias, eps)
    x = input.float() if autocast else input  # as for layer_norm
    return _GroupNorm.apply(x, num_groups, weight, bias, eps, codec, context, origin)[0]


class GroupNorm(Layer, nn.GroupNorm):
    """nn.GroupNorm that saves its normalised input [N, C, *axes] as `codec` says."""

    kind, functional = "maps", ("group_norm",)

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input, self.weight, self.bias):
            return self.stock(input)
        keeping = {"codec": self.codec, "context": self.context, "origin": self.origin}
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **keeping)
