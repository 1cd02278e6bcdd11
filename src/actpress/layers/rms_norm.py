"""RMS norms: y = (offset + weight) x / rms(x) over the last axes; the normalised input is saved as the codec says, as in norm.py.

Libraries write the formula out in operations, with and without an offset. `rms_formula` finds out which, by running the module.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from actpress.codec import Codec, Context, keep_normalised
from actpress.layers.base import Extended, Layer, own, probe_of, records, refuse
from actpress.layers.norm import upcast


class _RMSNorm(Function):
    """y = (offset + weight) x / rms(x) over the last `axes` axes, as `compute` rounds it."""

    @staticmethod
    def forward(ctx, x, weight, axes, eps, offset, compute, codec, context, origin):
        y = compute(x)
        ctx.origin, ctx.offset, ctx.x_dtype = origin, offset, x.dtype
        rows = torch.Size((math.prod(x.shape[: x.dim() - axes]), math.prod(x.shape[x.dim() - axes :])))
        x_wide = upcast(x).reshape(rows)
        rstd = (x_wide.square().mean(1, keepdim=True) + eps).rsqrt()
        ctx.kept, saved, ctx.normalised = keep_normalised(codec, x, lambda: x_wide * rstd, context, rows, origin)
        probe = probe_of(x)
        ctx.save_for_backward(weight, rstd, probe, *saved)
        return own(y), probe

    @staticmethod
    def backward(ctx, dy, _):
        weight, rstd, probe, *saved = ctx.saved_tensors
        dx = dw = None
        with torch.no_grad():
            xhat = ctx.kept.decode(tuple(saved)).to(rstd.dtype)
            if not ctx.normalised:
                xhat = xhat * rstd
            g = dy.reshape(xhat.shape).to(rstd.dtype)
            if ctx.needs_input_grad[1]:
                dw = (g * xhat).sum(0).view(weight.shape).to(weight.dtype)
            if ctx.needs_input_grad[0]:
                g = g if weight is None else g * (weight.flatten().to(rstd.dtype) + ctx.offset)
                dx = torch.addcmul(g, xhat, (g * xhat).mean(1, keepdim=True), value=-1)  # g may share dy's memory
                dx = dx.mul_(rstd).reshape(dy.shape).to(ctx.x_dtype)
        dx, dw = refuse(ctx.origin, probe, dy, dx, dw)
        return dx, dw, None, None, None, None, None, None, None


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    codec: Codec,
    context: Context,
    origin: str = "rms_norm()",
) -> Tensor:
    """F.rms_norm that saves its input [..., *normalized_shape], normalised, as `codec` says."""

    def compute(x: Tensor) -> Tensor:
        return F.rms_norm(x, tuple(normalized_shape), weight, eps)

    if not records(input, input, weight):
        return compute(input)
    least = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps if eps is None else eps  # as PyTorch
    return _RMSNorm.apply(input, weight, len(normalized_shape), least, 0.0, compute, codec, context, origin)[0]


class RMSNorm(Layer, nn.RMSNorm):
    """nn.RMSNorm that saves its normalised input [..., *normalized_shape] as `codec` says."""

    kind, functional = "token norms", ("rms_norm",)

    def forward(self, x: Tensor) -> Tensor:
        if not records(x, x, self.weight):
            return self.stock(x)
        keeping = {"codec": self.codec, "context": self.context, "origin": self.origin}
        return rms_norm(x, self.normalized_shape, self.weight, self.eps, **keeping)


class LibraryRMSNorm(Extended):
    """Another library's RMS norm over the last axis: its own forward, and what it keeps as `codec` says."""

    library: tuple[float, float]  # (eps, offset), see rms_formula

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if len(args) + len(kwargs) != 1 or not records(x, x, self.weight) or x.shape[-1:] != self.weight.shape:
            return self.stock(*args, **kwargs)
        eps, offset = self.library
        arguments = (x, self.weight, 1, eps, offset, self.stock, self.codec, self.context, self.origin)
        return _RMSNorm.apply(*arguments)[0]


def rms_formula(module: nn.Module) -> tuple[float, float] | None:
    """(eps, offset) if the module computes (offset + weight) x / sqrt(mean x^2 + eps) over the last axis, offset 0 or 1; None if not.

    Found by running its forward: classes of one name differ in their formulas, and modules of one class in their settings. The weights are
    random, the features from tiny to large, one alone, in training and in evaluation.
    """
    weight, eps = getattr(module, "weight", None), _epsilon(module)
    tensors = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    if tensors != ["weight"] or weight.dim() != 1 or eps is None or next(module.children(), None) is not None:
        return None
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        w, x = torch.randn(weight.shape, device="cpu"), torch.randn(6, *weight.shape, device="cpu")
        x *= torch.tensor([math.sqrt(eps), 0.01, 0.1, 1, 100, 0], device="cpu").unsqueeze(1)
        x[5, 0] = 1
        normal = x * (x.square().mean(1, keepdim=True) + eps).rsqrt()
        outputs = _outputs(module, w, (x, x.unflatten(0, (2, 3))))
        for offset in (0.0, 1.0):
            expected = normal * (w + offset)
            if outputs and all(torch.allclose(y, expected, rtol=1e-4, atol=1e-6) for y in outputs):
                return eps, offset
    return None


def _epsilon(module: nn.Module) -> float | None:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((eps for eps in found if isinstance(eps, float)), None)


def _outputs(module: nn.Module, weight: Tensor, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What the module, had it this weight, makes of inputs [..., features], as rows; nothing if it fails or changes a shape."""
    twin = copy.copy(module)
    twin.__dict__["_parameters"] = {"weight": nn.Parameter(weight)}
    outputs = []
    for training, x in itertools.product((True, False), inputs):
        twin.training = training
        try:
            y = type(module).forward(twin, x)
        except (AttributeError, TypeError, RuntimeError, ValueError, LookupError, AssertionError):
            return []  # it needs something else than such an input
        if not isinstance(y, Tensor) or y.shape != x.shape:
            return []
        outputs.append(y.flatten(0, -2).float())
    return outputs
