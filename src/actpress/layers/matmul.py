"""Linear layers. dx and the bias gradient are exact; the weight gradient is computed from what the codec kept of x.

Shapes: dy_O ends in the output features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from actpress.codec import Codec, Context, keep, tokens_shape, without_autocast
from actpress.layers.base import Layer, compute_dtype, own, probe_of, records, refuse


class _Linear(Function):
    """y = x W^T + b with weight [out, in], or with weight [in, out] if `transposed`."""

    @staticmethod
    def forward(ctx, x, weight, bias, transposed, codec, context, origin):
        ctx.dtype, ctx.x_dtype, ctx.transposed, ctx.origin = compute_dtype(x), x.dtype, transposed, origin
        ctx.kept, saved = keep(codec, x, context, ctx.dtype, tokens_shape(x.shape), origin)
        probe = probe_of(x)
        ctx.save_for_backward(weight, probe, *saved)
        y = torch.addmm(bias, x, weight) if transposed else F.linear(x, weight, bias)
        return own(y), probe

    @staticmethod
    def backward(ctx, dy_O, _):
        weight, probe, *saved = ctx.saved_tensors
        dx = dw = db = None
        with without_autocast(dy_O):
            if ctx.needs_input_grad[0]:
                w = weight.T if ctx.transposed else weight
                dx = (dy_O @ w.to(ctx.dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                with torch.no_grad():
                    dy = dy_O.reshape(*ctx.kept.like.shape[:-1], dy_O.shape[-1])
                    dw = ctx.kept.linear_weight_grad(tuple(saved), dy).to(weight.dtype)
                (dw,) = refuse(ctx.origin, probe, dy_O, dw.T if ctx.transposed else dw)
            if ctx.needs_input_grad[2]:
                db = dy_O.reshape(-1, dy_O.shape[-1]).sum(0).to(weight.dtype)
        return dx, dw, db, None, None, None, None


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    codec: Codec,
    context: Context,
    origin: str = "linear()",
) -> Tensor:
    """F.linear that saves its input [..., in] as `codec` says."""
    if not records(input, weight) or input.shape[-1:] != weight.shape[-1:]:  # PyTorch's own error
        return F.linear(input, weight, bias)
    return _Linear.apply(input, weight, bias, False, codec, context, origin)[0]


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, codec: Codec, context: Context, origin: str = "addmm()", **scales: Any
) -> Tensor:
    """torch.addmm that keeps mat1 [tokens, in] as `codec` says where mat2 [in, out] is a parameter and `input` its bias [out]."""
    if scales or not isinstance(mat2, nn.Parameter) or input.dim() != 1 or not records(mat1, mat2):
        return torch.addmm(input, mat1, mat2, **scales)
    if mat1.shape[-1:] != mat2.shape[:1]:  # PyTorch's own error
        return torch.addmm(input, mat1, mat2)
    return _Linear.apply(mat1, mat2, input, True, codec, context, origin)[0]


class Linear(Layer, nn.Linear):
    """nn.Linear that saves its input x [..., in] as `codec` says."""

    kind, functional = "tokens", ("linear",)

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, self.weight):
            return self.stock(input)
        return linear(input, self.weight, self.bias, codec=self.codec, context=self.context, origin=self.origin)
