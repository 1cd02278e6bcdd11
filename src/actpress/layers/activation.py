"""Activation layers that save a code of their derivative instead of their input.

Stock PyTorch saves the input x of an activation y = f(x) for dx = dy f'(x); the next layer saves y. Here one autograd.Function saves
what the codec says:

    derivative = True     f'(x), encoded like any tensor: it lies in a narrow interval. Where the code would be no smaller, what stock
                          PyTorch saves is saved: the output of sigmoid and tanh, which a gate saves as well, the input of the others
    derivative = False    a code that the codec makes of x itself, and y if it asks for it, the very tensor the next layer saves

dx is approximate by as much as the derivative is. Forward outputs are stock's, bit by bit, unless the codec computes output and code in one
pass (`Codec.forward_activation`).

The modules of timm and transformers that compute the same functions are found by their qualified names: neither library is imported.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx import Proxy

from actpress.codec import Codec, Context, Dense, Kept, Like, encoded
from actpress.layers.base import Layer, own, probe_of, records, refuse
from actpress.layers.exact import into
from actpress.layers.formulas import FORMULAS, Formula

FORWARD = ("stock", "fused")  # who computes the output: what methods let choose


class _Activation(Function):
    @staticmethod
    def forward(ctx, x, name, options, inplace, overwritten, codec, context, origin):
        """inplace: y is written into x here. overwritten: x will not hold its values in the backward pass."""
        formula = FORMULAS[name]
        plain = name == formula.function and not inplace  # a library's formula is computed as it is written
        fused = codec.forward_activation(x, formula.function) if plain and not codec.derivative else None
        ctx.dense = False
        if fused is not None:
            y, saved = fused
            ctx.kept = Kept(codec, Like.of(x))
        elif codec.derivative:
            y = formula.compute(x, *options)
            ctx.kept, saved, ctx.dense = _keep_slope(formula, options, x, y, overwritten, codec, context)
        else:  # before x is overwritten
            ctx.kept, saved = Kept(codec, Like.of(x)), codec.encode_activation(x, formula.function)
            if inplace:
                ctx.mark_dirty(x)
            y = formula.inplace(x) if inplace else formula.compute(x, *options)
        ctx.name, ctx.options, ctx.x_dtype, ctx.origin = name, options, x.dtype, origin
        probe = probe_of(x)
        ctx.save_for_backward(probe, y if codec.keeps_output else None, *saved)
        return (y if inplace else own(y)), probe

    @staticmethod
    def backward(ctx, dy, _):
        probe, y, *saved = ctx.saved_tensors
        formula = FORMULAS[ctx.name]
        with torch.no_grad():
            if ctx.dense:
                dx = dy * formula.slope(saved[0], *ctx.options)
            else:
                dx = ctx.kept.codec.activation_grad(tuple(saved), ctx.kept.like, dy, y, formula.function)
            dx = dx.to(ctx.x_dtype)
        (dx,) = refuse(ctx.origin, probe, dy, dx)
        return dx, None, None, None, None, None, None, None


def _keep_slope(
    formula: Formula, options: tuple, x: Tensor, y: Tensor, overwritten: bool, codec: Codec, context: Context | None
) -> tuple[Kept, tuple[Tensor, ...], bool]:
    """(kept, saved, whether the input or output is saved instead of the derivative)."""
    source = y if formula.of_output else x
    kept, saved = encoded(codec, formula.slope(source.detach(), *options), context)
    if isinstance(kept.codec, Dense) and (formula.of_output or not overwritten):
        return kept, (source,), True
    return kept, saved, False


def activate(
    x: Tensor,
    name: str,
    codec: Codec,
    context: Context | None = None,
    options: tuple[float, ...] = (),
    inplace: bool = False,
    origin: str | None = None,
) -> Tensor:
    """FORMULAS[name] of x with these options, saving for backward what `codec` says; nothing where no gradient is needed."""
    formula = FORMULAS[name]
    if not records(x, x):
        if inplace and formula.inplace is not None:
            return formula.inplace(x)
        return into(x, formula.compute(x, *options), inplace)
    origin = origin or f"{name}() under {type(codec).__name__}"
    # compiled code decides on its own buffers; a Function with a probe may not change a view in place
    here = inplace and formula.inplace is not None and not codec.derivative
    if here and not torch.compiler.is_compiling() and not x._is_view():
        return _Activation.apply(x, name, options, True, True, codec, context, origin)[0]
    return into(x, _Activation.apply(x, name, options, False, inplace, codec, context, origin)[0], inplace)


def gelu(
    input: Tensor,
    approximate: str = "none",
    *,
    codec: Codec,
    context: Context | None = None,
    origin: str | None = None,
) -> Tensor:
    """F.gelu that saves what `codec` says. Raises ValueError for an unknown approximation."""
    allowed = {"none": "gelu", "tanh": "gelu_tanh"}
    if approximate not in allowed:
        raise ValueError(f"gelu: approximate={approximate!r}, allowed: {', '.join(allowed)}")
    return activate(input, allowed[approximate], codec, context, origin=origin)


def silu(input, inplace=False, *, codec, context=None, origin=None) -> Tensor:
    """F.silu that saves what `codec` says."""
    return activate(input, "silu", codec, context, (), inplace, origin)


def hardswish(input, inplace=False, *, codec, context=None, origin=None) -> Tensor:
    """F.hardswish that saves what `codec` says."""
    return activate(input, "hardswish", codec, context, (), inplace, origin)


def mish(input, inplace=False, *, codec, context=None, origin=None) -> Tensor:
    """F.mish that saves what `codec` says."""
    return activate(input, "mish", codec, context, (), inplace, origin)


def elu(input, alpha=1.0, inplace=False, *, codec, context=None, origin=None) -> Tensor:
    """F.elu that saves what `codec` says."""
    return activate(input, "elu", codec, context, (alpha,), inplace, origin)


def softplus(input, beta=1.0, threshold=20.0, *, codec, context=None, origin=None) -> Tensor:
    """F.softplus that saves what `codec` says."""
    return activate(input, "softplus", codec, context, (beta, threshold), False, origin)


def sigmoid(input, *, codec, context=None, origin=None) -> Tensor:
    """torch.sigmoid that saves what `codec` says."""
    return activate(input, "sigmoid", codec, context, origin=origin)


def tanh(input, *, codec, context=None, origin=None) -> Tensor:
    """torch.tanh that saves what `codec` says."""
    return activate(input, "tanh", codec, context, origin=origin)


def sigmoid_(input, *, codec, context=None, origin=None) -> Tensor:
    """In-place sigmoid."""
    return activate(input, "sigmoid", codec, context, (), True, origin)


def tanh_(input, *, codec, context=None, origin=None) -> Tensor:
    """In-place tanh."""
    return activate(input, "tanh", codec, context, (), True, origin)


def elu_(input, alpha=1.0, *, codec, context=None, origin=None) -> Tensor:
    """In-place elu."""
    return activate(input, "elu", codec, context, (alpha,), True, origin)


class _ActivationLayer(Layer):
    """An activation of PyTorch that saves what `codec` says."""

    kind = "slopes"
    options: tuple[str, ...] = ()  # attributes of the stock layer that its formula takes

    def forward(self, input: Tensor) -> Tensor:
        if not records(input, input):
            return self.stock(input)
        options = tuple(getattr(self, option) for option in self.options)
        inplace = getattr(self, "inplace", False)
        return activate(input, self.formula, self.codec, self.context, options, inplace, self.origin)

    @property
    def formula(self) -> str:
        return type(self).__name__.lower()


class GELU(_ActivationLayer, nn.GELU):
    kind, functional = "gelu", ("gelu",)

    @property
    def formula(self) -> str:
        return {"none": "gelu", "tanh": "gelu_tanh"}[self.approximate]


class SiLU(_ActivationLayer, nn.SiLU):
    kind, functional = "gelu", ("silu",)


class Hardswish(_ActivationLayer, nn.Hardswish):
    functional = ("hardswish",)


class Mish(_ActivationLayer, nn.Mish):
    functional = ("mish",)


class ELU(_ActivationLayer, nn.ELU):
    functional = ("elu", "elu_")
    options = ("alpha",)


class Softplus(_ActivationLayer, nn.Softplus):
    functional = ("softplus",)
    options = ("beta", "threshold")


class Sigmoid(_ActivationLayer, nn.Sigmoid):
    functional = ("sigmoid", "sigmoid_")


class Tanh(_ActivationLayer, nn.Tanh):
    functional = ("tanh", "tanh_")


class LibraryActivation(Layer, nn.Module):
    """Base of what takes the place of other libraries' activation modules; those have neither parameters nor buffers."""

    formula: str

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        (x,) = (*args, *kwargs.values())  # libraries name it differently
        if isinstance(x, Proxy):
            return self.stock(x)
        inplace = FORMULAS[self.formula].inplace is not None and getattr(self, "inplace", False)
        return activate(x, self.formula, self.codec, self.context, (), inplace, self.origin)


class ErfGELU(LibraryActivation):
    formula = "gelu"


class TanhGELU(LibraryActivation):
    formula = "gelu_tanh"


class NewGELU(LibraryActivation):
    formula = "new_gelu"


class FastGELU(LibraryActivation):
    formula = "fast_gelu"


class QuickGELU(LibraryActivation):
    formula = "quick_gelu"


class LibrarySiLU(LibraryActivation):
    formula = "silu"


class Swish(LibraryActivation):
    formula = "swish"


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
