"""Smooth activations beside GELU and SiLU: the derivative in few bits instead of the input or output.

    Hardswish, Sigmoid, Tanh, ELU, Mish, Softplus    dx = dy f'(x), f'(x) as the codec keeps it

f' lies in a narrow interval and is coded to the nearest level, so that no noise is amplified from layer to layer. Where the code would be
no smaller, what stock PyTorch keeps is kept: the output of sigmoid and tanh, which a gate keeps as well, the input of the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from actpress.codec import Codec, Like, encoded
from actpress.kernels.common.layout import is_channels_last
from actpress.layers.base import Layer, own, probe_of, records, refuse
from actpress.layers.exact import into


class Curve(NamedTuple):
    """A function and its derivative, as a function of its input, or of its output if `of_output`."""

    compute: Callable[..., Tensor]
    slope: Callable[..., Tensor]
    of_output: bool = False


def _hardswish_slope(x: Tensor) -> Tensor:
    return torch.where(x <= -3, 0.0, torch.where(x < 3, x / 3 + 0.5, 1.0)).to(x.dtype)


def _mish_slope(x: Tensor) -> Tensor:
    t = F.softplus(x).tanh()
    return t + x * x.sigmoid() * (1 - t * t)


def _elu_slope(x: Tensor, alpha: float) -> Tensor:
    return torch.where(x > 0, 1.0, alpha * x.exp()).to(x.dtype)


def _softplus_slope(x: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(beta * x > threshold, 1.0, torch.sigmoid(beta * x)).to(x.dtype)


CURVES = {
    "hardswish": Curve(F.hardswish, _hardswish_slope),
    "mish": Curve(F.mish, _mish_slope),
    "elu": Curve(F.elu, _elu_slope),
    "softplus": Curve(F.softplus, _softplus_slope),
    "sigmoid": Curve(torch.sigmoid, lambda y: y * (1 - y), of_output=True),
    "tanh": Curve(torch.tanh, lambda y: 1 - y * y, of_output=True),
}


class _Curved(Function):
    @staticmethod
    def forward(ctx, x, name, options, inplace, codec, origin):
        curve = CURVES[name]
        y = curve.compute(x, *options)
        source = y if curve.of_output else x
        slope = curve.slope(source.detach(), *options)
        ctx.like, kept = Like(slope.shape, slope.dtype, is_channels_last(slope)), encoded(codec, slope, None)
        ctx.dense = kept[0] is slope and (curve.of_output or not inplace)  # an input that is overwritten cannot be kept
        ctx.codec, ctx.origin, ctx.name, ctx.options = codec, origin, name, options
        probe = probe_of(x)
        ctx.save_for_backward(probe, *((source,) if ctx.dense else kept))
        return own(y), probe

    @staticmethod
    def backward(ctx, dy, _):
        probe, *kept = ctx.saved_tensors
        with torch.no_grad():
            if ctx.dense:
                slope = CURVES[ctx.name].slope(kept[0], *ctx.options)
            else:
                slope = ctx.codec.decode(tuple(kept), ctx.like)
            dx = dy * slope
        (dx,) = refuse(ctx.origin, probe, dy, dx)
        return dx, None, None, None, None, None


def _curved(
    x: Tensor, name: str, options: tuple[float, ...], inplace: bool, codec: Codec, origin: str | None
) -> Tensor:
    if not records(x, x):
        return into(x, CURVES[name].compute(x, *options), inplace)
    return into(x, _Curved.apply(x, name, options, inplace, codec, origin or f"{name}()")[0], inplace)


def hardswish(input: Tensor, inplace: bool = False, *, codec: Codec, origin: str | None = None) -> Tensor:
    """F.hardswish that keeps its derivative as `codec` says."""
    return _curved(input, "hardswish", (), inplace, codec, origin)


def mish(input: Tensor, inplace: bool = False, *, codec: Codec, origin: str | None = None) -> Tensor:
    """F.mish that keeps its derivative as `codec` says."""
    return _curved(input, "mish", (), inplace, codec, origin)


def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False, *, codec: Codec, origin: str | None = None) -> Tensor:
    """F.elu that keeps its derivative as `codec` says."""
    return _curved(input, "elu", (alpha,), inplace, codec, origin)


def softplus(
    input: Tensor, beta: float = 1.0, threshold: float = 20.0, *, codec: Codec, origin: str | None = None
) -> Tensor:
    """F.softplus that keeps its derivative as `codec` says."""
    return _curved(input, "softplus", (beta, threshold), False, codec, origin)


def sigmoid(input: Tensor, *, codec: Codec, origin: str | None = None) -> Tensor:
    """torch.sigmoid that keeps its derivative as `codec` says."""
    return _curved(input, "sigmoid", (), False, codec, origin)


def tanh(input: Tensor, *, codec: Codec, origin: str | None = None) -> Tensor:
    """torch.tanh that keeps its derivative as `codec` says."""
    return _curved(input, "tanh", (), False, codec, origin)


def sigmoid_(input: Tensor, *, codec: Codec) -> Tensor:
    """In-place sigmoid."""
    return _curved(input, "sigmoid", (), True, codec, "sigmoid_()")


def tanh_(input: Tensor, *, codec: Codec) -> Tensor:
    """In-place tanh."""
    return _curved(input, "tanh", (), True, codec, "tanh_()")


def elu_(input: Tensor, alpha: float = 1.0, *, codec: Codec) -> Tensor:
    """In-place elu."""
    return _curved(input, "elu", (alpha,), True, codec, "elu_()")


class _CurvedLayer(Layer):
    """An activation that keeps its derivative as `codec` says."""

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        name = type(self).__name__.lower()
        options = tuple(getattr(self, option) for option in self.options)
        return _curved(input, name, options, getattr(self, "inplace", False), self.codec, self.origin)

    options: tuple[str, ...] = ()


class Hardswish(_CurvedLayer, nn.Hardswish):
    pass


class Mish(_CurvedLayer, nn.Mish):
    pass


class ELU(_CurvedLayer, nn.ELU):
    options = ("alpha",)


class Softplus(_CurvedLayer, nn.Softplus):
    options = ("beta", "threshold")


class Sigmoid(_CurvedLayer, nn.Sigmoid):
    pass


class Tanh(_CurvedLayer, nn.Tanh):
    pass
