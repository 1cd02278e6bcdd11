"""Activation layers (GELU, SiLU and their kin) that keep a code of their derivative instead of their input.

Stock PyTorch keeps the input x of an activation y = f(x), and the next layer keeps y: two tensors where one carries all that is
needed. Here one autograd.Function keeps what a `Derivative` says: a code made from x and, if it asks for it, y itself, the very
tensor the next layer keeps. dx = dy * f'(x) is then approximate by as much as the derivative is; forward outputs are stock's, bit by bit,
unless the Derivative was asked for a kernel that computes output and code in one read of x.

Beside PyTorch's own layers there are those of timm and transformers that compute the same functions, found by their qualified names, so
that neither library is imported. Each keeps the formula of its library, since the order of operations shows in the last bit.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import Proxy
from torch.nn import functional as F

from actpress.layers.base import Layer, probe_of, records, refuse
from actpress.layers.exact import into


class Derivative:
    """How the derivative of an activation is kept. A frozen dataclass, as codecs are.

    function: gelu (erf), gelu_tanh, silu or quick_gelu. The code of x lies in x's memory order; `encode` also says whether that is
    channels_last.
    """

    keeps_output = False  # is y kept beside the code?

    def encode(self, x: Tensor, function: str) -> tuple[Tensor, bool]:
        """x -> (uint8 code, channels_last)."""
        raise NotImplementedError

    def forward(self, x: Tensor, function: str) -> tuple[Tensor, Tensor, bool] | None:
        """(y, code, channels_last) at once, y in the order of the code; None: stock's y is to be computed, and the code by `encode`."""
        return None

    def input_grad(self, dy: Tensor, code: Tensor, y: Tensor | None, function: str, channels_last: bool) -> Tensor:
        """dx, of dy's shape and dtype. y is None unless `keeps_output`."""
        raise NotImplementedError


FORWARD = ("stock", "fused")  # what methods let choose


class Variant(NamedTuple):
    """One way to compute an activation. A variant of its function's name is the function's plain formula."""

    compute: Callable[[Tensor], Tensor]
    function: str
    inplace: Callable[[Tensor], Tensor] | None = None


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def _fast_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def _swish(x: Tensor) -> Tensor:
    return x.mul(x.sigmoid())


def _swish_inplace(x: Tensor) -> Tensor:
    return x.mul_(x.sigmoid())


VARIANTS = {
    "gelu": Variant(F.gelu, "gelu"),
    "gelu_tanh": Variant(partial(F.gelu, approximate="tanh"), "gelu_tanh"),
    "new_gelu": Variant(_new_gelu, "gelu_tanh"),
    "fast_gelu": Variant(_fast_gelu, "gelu_tanh"),
    "quick_gelu": Variant(_quick_gelu, "quick_gelu"),
    "silu": Variant(F.silu, "silu", partial(F.silu, inplace=True)),
    "swish": Variant(_swish, "silu", _swish_inplace),
}


class _Activation(Function):
    @staticmethod
    def forward(ctx, x, variant, inplace, derivative, origin):
        compute, function, compute_inplace = VARIANTS[variant]
        ctx.function, ctx.derivative, ctx.x_dtype, ctx.origin = function, derivative, x.dtype, origin
        plain = variant == function and not inplace  # other variants are formulas of libraries, kept to the bit
        fused = derivative.forward(x, function) if plain else None
        if fused is not None:
            y, code, ctx.channels_last = fused
        else:
            code, ctx.channels_last = derivative.encode(x, function)
            if inplace:
                ctx.mark_dirty(x)
            y = (compute_inplace if inplace else compute)(x)
        probe = probe_of(x)
        ctx.save_for_backward(probe, code, y if derivative.keeps_output else None)
        return y, probe

    @staticmethod
    def backward(ctx, dy, _):
        probe, code, y = ctx.saved_tensors
        with torch.no_grad():
            dx = ctx.derivative.input_grad(dy, code, y, ctx.function, ctx.channels_last).to(ctx.x_dtype)
        (dx,) = refuse(ctx.origin, probe, dy, dx)
        return dx, None, None, None, None


def activate(
    x: Tensor, variant: str, derivative: Derivative, inplace: bool = False, origin: str | None = None
) -> Tensor:
    """VARIANTS[variant] of x, keeping for backward what `derivative` says; nothing where no gradient is needed."""
    if not records(x, x):
        return (VARIANTS[variant].inplace if inplace else VARIANTS[variant].compute)(x)
    origin = origin or f"{variant}() under {type(derivative).__name__}"
    # compiled code decides on its own buffers; a Function with a probe may not change a view in place
    if torch.compiler.is_compiling() or (inplace and x._is_view()):
        return into(x, _Activation.apply(x, variant, False, derivative, origin)[0], inplace)
    return _Activation.apply(x, variant, inplace, derivative, origin)[0]


def gelu(input: Tensor, approximate: str = "none", *, derivative: Derivative, origin: str | None = None) -> Tensor:
    """F.gelu that keeps what `derivative` says. Raises ValueError for an unknown approximation."""
    allowed = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in allowed:
        raise ValueError(f"gelu: approximate={approximate!r}, allowed: {', '.join(allowed)}")
    return activate(input, allowed[approximate], derivative, origin=origin)


def silu(input: Tensor, inplace: bool = False, *, derivative: Derivative, origin: str | None = None) -> Tensor:
    """F.silu that keeps what `derivative` says."""
    return activate(input, "silu", derivative, inplace, origin)


class GELU(Layer, nn.GELU):
    """nn.GELU, erf or tanh, that keeps what `codec` says."""

    codec: Derivative

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        return gelu(input, self.approximate, derivative=self.codec, origin=self.origin)


class SiLU(Layer, nn.SiLU):
    """nn.SiLU that keeps what `codec` says."""

    codec: Derivative

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        return silu(input, self.inplace, derivative=self.codec, origin=self.origin)


class LibraryActivation(Layer, nn.Module):
    """Base of what takes the place of other libraries' activation modules; those have neither parameters nor buffers."""

    codec: Derivative
    variant: str

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # libraries name it differently
        inplace = VARIANTS[self.variant].inplace is not None and getattr(self, "inplace", False)
        if isinstance(x, Proxy):
            return self.stock(x)
        return activate(x, self.variant, self.codec, inplace, self.origin)


class ErfGELU(LibraryActivation):
    variant = "gelu"


class TanhGELU(LibraryActivation):
    variant = "gelu_tanh"


class NewGELU(LibraryActivation):
    variant = "new_gelu"


class FastGELU(LibraryActivation):
    variant = "fast_gelu"


class QuickGELU(LibraryActivation):
    variant = "quick_gelu"


class LibrarySiLU(LibraryActivation):
    variant = "silu"


class Swish(LibraryActivation):
    variant = "swish"


REPLACEMENTS: dict[str, type[nn.Module]] = {  # qualified name of a type -> what takes its place
    "torch.nn.modules.activation.GELU": GELU,
    "torch.nn.modules.activation.SiLU": SiLU,
    "timm.layers.activations.GELU": ErfGELU,
    "timm.layers.activations.GELUTanh": TanhGELU,
    "timm.layers.activations.QuickGELU": QuickGELU,
    "timm.layers.activations.Swish": Swish,
    "transformers.activations.GELUActivation": ErfGELU,
    "transformers.activations.GELUTanh": TanhGELU,
    "transformers.activations.PytorchGELUTanh": TanhGELU,  # its name before transformers 5
    "transformers.activations.NewGELUActivation": NewGELU,
    "transformers.activations.FastGELUActivation": FastGELU,
    "transformers.activations.QuickGELUActivation": QuickGELU,
    "transformers.activations.SiLUActivation": LibrarySiLU,
}


def layer_for(module: nn.Module) -> type[nn.Module] | None:
    """The layer that takes the place of an activation module of PyTorch, timm or transformers; None for any other module.

    Exact types only. transformers' modules that were asked for a Python formula (gelu_python) stay as they are.
    """
    cls = type(module)
    if inspect.ismethod(getattr(module, "act", None)):
        return None
    return REPLACEMENTS.get(f"{cls.__module__}.{cls.__qualname__}")
