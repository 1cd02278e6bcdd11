"""What all layers share: when a layer keeps something of its own, dtypes under autocast, and second derivatives.

A layer records for itself only where autograd will need it and the tensor is an ordinary one. Otherwise the stock layer runs, and what it
keeps is stock's: no gradient wanted, an empty, complex, sparse or nested tensor, one of the meta device or of inference mode, a tensor
subclass (DTensor), torch.export. So it does
under transforms that look into the graph: torch.func (grad, vmap, jacrev), forward-mode AD, torch.jit.trace. There a warning says so.

A layer compares its input's features with its weight's before its Function runs. Under torch.compile with dynamic shapes that makes the
size a number. Made so within the Function, it stops Dynamo of PyTorch 2.11, which holds the size by its name already. With dynamic=True it
stops there all the same: the size of a model's input keeps its name.

Second derivatives (create_graph=True). Gradients that are exact and linear in dy, such as dx of a convolution or of a ReLU, are made of
differentiable operations. What was made from a compressed tensor cannot be differentiated again: its dependence on that tensor is gone.
Such a gradient is handed through `refuse`, and whoever differentiates it gets an error that names the layer. To that end each autograd
Function returns, beside its output, a probe: an empty tensor by which the gradient still hangs on all inputs of the layer, at no bytes.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.fx import Proxy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from actpress.codec import Context
from actpress.kernels.common.launch import directly
from actpress.layers import applied

WAYS_OUT = "Differentiate with respect to inputs only, leave the layer out with apply(..., where=...), or call actpress.restore(model)"


class Layer:
    """Mixed in front of the stock class of every layer.

    kind, by which methods choose the codec:

        maps           inputs [N, C, *axes] of convolutions and norms of maps
        tokens         inputs [..., F] of linear layers
        token norms    normalised inputs of norms of tokens, a row each
        slopes         derivatives of smooth activations
        gelu           GELU, SiLU and their kin, which need codecs of their own
        exact          needs no codec: a mask, an offset, or nothing
    """

    kind = ""  # "" for bases
    functional: tuple[
        str, ...
    ] = ()  # names of its functional forms, which stand in the same file and are called in forward methods

    codec: Any
    context: Context
    _actpress: Any = None  # its name in the model, its method and its stock class; set by `apply`

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward; a node of its own where torch.fx traces the model."""
        proxy = next((value for value in (*args, *kwargs.values()) if isinstance(value, Proxy)), None)
        if proxy is not None:
            return proxy.tracer.create_proxy("call_module", proxy.tracer.path_of_module(self), args, kwargs)
        return super().forward(*args, **kwargs)

    @property
    def origin(self) -> str:
        """The layer's type, name and method, for messages."""
        kind = type(self).__name__
        return kind if self._actpress is None else f"{kind} {self._actpress.name!r} under {self._actpress.method}"

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(f"actpress: {self.origin} cannot be scripted; call actpress.restore(model) first")


class Mixed:
    """A mixin that `extend` puts in front of a module's class at run time; the module stays what it is but for its forward."""

    mixed: tuple[tuple[type, ...], type]  # the mixins, the outermost first, and the class below them

    def __reduce_ex__(self, protocol: int) -> tuple:  # pickle could not find the class
        mixins, below = self.mixed
        made, args, *state = super().__reduce_ex__(protocol)  # as the class below says
        args = tuple(below if arg is type(self) else arg for arg in args)
        return _extended, (made, args, mixins, applied.attributes(self)), *state


class Extended(Mixed, Layer):
    """Mixed in front of the class of a library's layer, whose own forward still runs."""


def extend(module: nn.Module, mixin: type[Mixed]) -> None:
    """Change the module's class to one that has `mixin` in front of it. Its forward keeps the signature, which libraries read."""
    cls = type(module)
    mixins, below = cls.mixed if isinstance(module, Mixed) else ((), cls)

    @functools.wraps(cls.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return mixin.forward(self, *args, **kwargs)

    names = {"__module__": below.__module__, "__qualname__": below.__qualname__, "forward": forward}
    mixins = (mixin, *mixins)
    module.__class__ = type(below.__name__, (*mixins, below), {**names, "mixed": (mixins, below)})


def _extended(
    made: Callable[..., nn.Module], args: tuple, mixins: tuple[type[Mixed], ...], attributes: dict[str, Any]
) -> nn.Module:
    module = made(*args)
    vars(module).update(attributes)
    for mixin in reversed(mixins):
        extend(module, mixin)
    return module


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd will record an operation on these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def records(x: Any, *tensors: Tensor | None) -> bool:
    """Whether a layer keeps something of its own for its input x: some of `tensors` needs a gradient, and x is an ordinary tensor."""
    if not isinstance(x, Tensor) or not needs_grad(*tensors):
        return False
    compiling = torch.compiler.is_compiling()
    # Read as a variable: Dynamo takes is_exporting() for True, in PyTorch 2.11, and no compiled layer would record.
    if torch.compiler._is_exporting_flag or (not compiling and _transformed()):
        return False
    ordinary = x.layout == torch.strided and x.is_floating_point() and not x.is_nested and x.numel() > 0
    if compiling or not ordinary:
        return ordinary
    return not (is_traceable_wrapper_subclass(x) or x.device.type == "meta" or x.is_inference())


def _transformed() -> bool:
    """Returns whether a transform runs that cannot look into our autograd Functions. Warns if so."""
    transform = _running_transform()
    if transform is None:
        return False
    warnings.warn(
        f"actpress: under {transform} layers keep what stock PyTorch keeps: gradients are exact, no memory is saved",
        stacklevel=4,
    )
    return True


def _running_transform() -> str | None:
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    return "torch.jit.trace" if torch._C._get_tracing_state() is not None else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast, if it is on, runs a matrix product or convolution of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def shape_only(like: Tensor, shape: torch.Size, channels_last: bool = False) -> Tensor:
    """A tensor of `shape` without memory of its own, for backward ops that read only the shape of an argument.

    channels_last: the memory order of the argument that it stands for. cuDNN's backward brings dy into that order first: an argument that
    lay in another one would cost two copies of dy, there and back.
    """
    if not (channels_last and directly(like)):
        return like.new_empty(()).expand(shape)
    x = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    x.untyped_storage().resize_(0)  # strides that overlap nowhere, as those of an expanded tensor do
    return x


def probe_of(x: Tensor) -> Tensor:
    """The second output of a layer's Function, see the module's docstring."""
    return x.new_empty(0)


def own(y: Tensor) -> Tensor:
    """Returns y, which a stock operation just made, as a tensor that may be changed in place.

    Some operations return a view of a tensor that nobody else holds: F.linear of [N, L, F], F.conv1d. Autograd forbids changing a view
    in place if the Function has more than one output, such as a probe.
    """
    if not torch.compiler.is_compiling() and not y._is_view():  # a traced tensor cannot tell
        return y
    return torch.ops.aten._unsafe_view(y, y.shape)


def differentiating_twice() -> bool:
    """Returns whether the gradients that a backward computes now will be differentiated again (create_graph=True)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Refuse(Function):
    """Hands gradients on; their own derivative is an error."""

    @staticmethod
    def forward(ctx, origin, probe, dy, *grads):
        ctx.origin = origin
        return tuple(grad.detach().view_as(grad) for grad in grads)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"actpress: {ctx.origin} made this gradient from a compressed tensor, so it cannot be differentiated again "
            f"(create_graph=True: gradient penalty, Hessian). {WAYS_OUT}."
        )


def refuse(origin: str, probe: Tensor, dy: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """`grads`, computed without a graph; differentiating them again, with respect to anything they depend on, raises RuntimeError.

    That is what the layer's inputs depend on, by way of the probe, and what dy depends on, such as the weights of later layers.
    """
    if not differentiating_twice():
        return grads
    given = [grad for grad in grads if grad is not None]
    refused = iter(_Refuse.apply(origin, probe, dy, *given) if given else ())
    return tuple(None if grad is None else next(refused) for grad in grads)


class _Linear(Function):
    """A linear map of dy that is its own adjoint, such as a mask: differentiable as often as one likes."""

    @staticmethod
    def forward(ctx, dy, run, code, *options):
        ctx.run, ctx.options = run, options
        ctx.save_for_backward(code)
        return run(dy, code, *options)

    @staticmethod
    def backward(ctx, ddx):
        (code,) = ctx.saved_tensors
        return self_adjoint(ctx.run, ddx, code, *ctx.options), None, None, *(None for _ in ctx.options)


def self_adjoint(run: Callable[..., Tensor], dy: Tensor, code: Tensor, *options: Any) -> Tensor:
    """run(dy, code, *options), differentiable in dy; run multiplies each element by a factor that code and options give."""
    if differentiating_twice():
        return _Linear.apply(dy, run, code, *options)
    return run(dy, code, *options)
