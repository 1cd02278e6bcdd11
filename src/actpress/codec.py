"""How one tensor is saved for the backward pass.

A Codec turns a tensor into what is saved (`encode`) and back (`decode`). It is a frozen dataclass: all it knows is in its fields. Weight
gradients decode first; a codec that can do without the dense tensor (pooled, block-sparse) overrides them. Activations use the same
protocol, see `Codec.derivative`.

Layers call `keep`. What holds for all codecs stands there once:

    empty tensor, or a code that would be no smaller    the tensor itself is saved (`Dense`)
    one tensor read by several layers                   encoded once, see below
    output of a ReLU, codec with `relu_mask`            the ReLU's packed mask is handed to `decode` by name

One tensor read by two layers (a block's input, read by its first convolution and its downsample) is encoded once. The code is remembered
for the tensor, weakly, and dies with the graph that saved it. What is remembered stands in tables beside the tensors (keys are weak), so
that a tensor can be saved, pickled and copied as any other.

The content of a tensor can change without a new version (x.data = ..., a numpy array that shares its memory) while an earlier graph still
holds the code. So a layer that reads a tensor for the second time gets a new code: another forward pass has begun.

Norms call `keep_normalised`. Their backward pass reads the normalised input alone, which is bounded whatever the scale of a token or
channel. Encoded as it is, a small token beside large ones would be lost in their steps, and 1 / deviation would amplify the error.

A ReLU leaves its mask by `leave_mask`: the tensor that it saves anyway, so at no bytes. The mask dies with the output if nothing saved it.
Held weakly, it would be gone in the first pass of a checkpoint but not in the second.
"""

import math
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.common.noise import uniform_from
from actpress.kernels.common.seeds import Bank, banked, seed_of


class Like(NamedTuple):
    """What a decoded tensor must look like."""

    shape: torch.Size
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> "Like":
        return cls(x.shape, x.dtype, is_channels_last(x))

    @property
    def nbytes(self) -> int:
        """Bytes of the dense tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


class Context:
    """What codecs may depend on beside their fields and the tensor, one object per applied model: the stream of noise for
    stochastic codecs, and the epoch.

    The stream is seeded from `torch.initial_seed()` when the method is applied and counts its own draws, on all devices together.
    PyTorch's generators are never touched, so dropout and data order are those of the stock model. Under torch.compile the noise comes
    from PyTorch's own (compiled) generator.
    """

    def __init__(self, seed: int):
        self.seed = seed % 2**63
        self.draws = 0
        self.epoch = 0  # set by swap.set_epoch
        self._banks: dict[torch.device, Bank] = {}
        self._added: dict[str, dict[int, int]] = {}  # see Bank.added: of devices whose bank is not made yet

    def uniform_like(self, x: Tensor) -> Tensor:
        """fp32 noise in [0, 1) of x's shape, device and memory format."""
        if torch.compiler.is_compiling():
            return torch.empty_like(x, dtype=torch.float32, requires_grad=False).uniform_()
        with _drawing:
            self.draws += 1
            seed = seed_of(self.seed, self.draws)
        return uniform_from(seed, x)

    def seed_for(self, x: Tensor) -> Tensor:
        """int64 [1] on x's device, not negative: a seed for kernels that make their own noise. Its content moves on, see seeds.py."""
        if torch.compiler.is_compiling():
            return torch.randint(2**63 - 1, (1,), device=x.device)
        with _drawing:  # threads may share a context: the replicas of nn.DataParallel do
            self.draws += 1
            if banked(x):
                return self._bank(x.device).draw(self.draws)
            seed = seed_of(self.seed, self.draws)
        return torch.full((1,), seed, dtype=torch.int64, device=x.device)

    def state(self) -> dict[str, Any]:
        """The position in the stream and the epoch, as plain numbers and dicts. Waits for the device where CUDA graphs draw noise."""
        added = self._added | {str(device): bank.added() for device, bank in self._banks.items()}
        added = {device: more for device, more in added.items() if more}
        return {"seed": self.seed, "draws": self.draws, "epoch": self.epoch, **({"added": added} if added else {})}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. CUDA graphs that were captured before go on too."""
        self.seed, self.draws, self.epoch = (
            state.get(name, getattr(self, name)) for name in ("seed", "draws", "epoch")
        )
        self._added = {device: dict(more) for device, more in state.get("added", {}).items()}
        for device, bank in self._banks.items():
            bank.move_to(self.seed, self.draws + 1, self._added.pop(str(device), {}))

    def __getstate__(self) -> dict[str, Any]:  # a copy makes banks of its own
        return self.state()

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__init__(state["seed"])
        self.load_state(state)

    def _bank(self, device: torch.device) -> Bank:
        bank = self._banks.get(device)
        if bank is None:
            bank = self._banks[device] = Bank(self.seed, self.draws, device, self._added.pop(str(device), None))
        return bank


_drawing = threading.Lock()


class Codec:
    """Base of all codecs. `kept` is the tuple of tensors that `encode` returned."""

    shared = True  # may layers that read the same tensor share one code?
    normalised = True  # do norms hand it their normalised input? False: their input as it is
    relu_mask = False  # does `decode` take the packed mask of the ReLU whose output was encoded, as `mask`?
    weight_grad_dtype: torch.dtype | None = (
        None  # of the weight gradient's product; None: the dtype in which the layer computes
    )
    # Do activations hand it their derivative f'(x), to be encoded like any tensor? False: their input; encode_activation and
    # activation_grad are the codec's own then.
    derivative = True
    keeps_output = False  # do activations save their output beside the code?

    def nbytes(self, like: Like) -> int:
        """Bytes that `encode` returns for a tensor like this, masks of ReLUs left out."""
        raise NotImplementedError

    def is_smaller(self, like: Like) -> bool:
        """Whether a tensor like this is encoded. Otherwise it is saved as it is."""
        return self.nbytes(like) < like.nbytes

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def decode(self, kept: tuple[Tensor, ...], like: Like) -> Tensor:
        raise NotImplementedError

    def linear_weight_grad(self, kept: tuple[Tensor, ...], like: Like, dy: Tensor) -> Tensor:
        """dW [out, in] of y = x W^T from dy [..., out]."""
        x, dtype = self.decode(kept, like), self.weight_grad_dtype
        if dtype is not None:
            x, dy = x.to(dtype), dy.to(dtype)
        return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])

    def conv2d_weight_grad(self, kept: tuple[Tensor, ...], like: Like, dy: Tensor, conv: ConvGeometry) -> Tensor:
        """dW of conv.weight_shape from dy [N, O, H', W']."""
        x, dtype = self.decode(kept, like), self.weight_grad_dtype
        if dtype is not None:
            x, dy = x.to(dtype), dy.to(dtype)
        weight = dy.new_empty(()).expand(conv.weight_shape)  # only its shape is read
        return convolution_backward(dy, x, weight, conv, (False, True, False))[1]

    def encode_activation(self, x: Tensor, function: str) -> tuple[Tensor, ...]:
        """Of a codec with derivative=False: what is saved of an activation's input x. function: gelu, gelu_tanh, silu or quick_gelu."""
        raise NotImplementedError

    def forward_activation(self, x: Tensor, function: str) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """(y, what is saved) in one pass over x, y in the memory order of the code; None: the layer computes y by itself."""
        return None

    def activation_grad(
        self, kept: tuple[Tensor, ...], like: Like, dy: Tensor, y: Tensor | None, function: str
    ) -> Tensor:
        """dx = dy f'(x), of dy's shape and dtype. y, the output, is None unless `keeps_output`."""
        return dy * self.decode(kept, like)


@dataclass(frozen=True)
class Dense(Codec):
    """Saves the tensor as it is: what stock PyTorch does."""

    normalised = False

    def nbytes(self, like: Like) -> int:
        return like.nbytes

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        return (x,)

    def decode(self, kept: tuple[Tensor, ...], like: Like) -> Tensor:
        return kept[0]


DENSE = Dense()


class Kept(NamedTuple):
    """How a tensor was saved: what the backward pass needs beside the saved tensors. It holds no tensor and is stored on ctx.

    saved, in its methods: the tensors that `keep` returned, as the backward pass gets them back.
    """

    codec: Codec  # Dense where the code would be no smaller
    like: Like
    masked: bool = False  # is the last saved tensor the packed mask of a ReLU?

    def decode(self, saved: tuple[Tensor, ...]) -> Tensor:
        if self.masked:
            return self.codec.decode(saved[:-1], self.like, mask=saved[-1])
        return self.codec.decode(saved, self.like)

    def linear_weight_grad(self, saved: tuple[Tensor, ...], dy: Tensor) -> Tensor:
        """See Codec.linear_weight_grad. Codecs that take masks decode first."""
        if self.masked:
            return DENSE.linear_weight_grad((self.decode(saved),), self.like, dy)
        return self.codec.linear_weight_grad(saved, self.like, dy)

    def conv2d_weight_grad(self, saved: tuple[Tensor, ...], dy: Tensor, conv: ConvGeometry) -> Tensor:
        """See Codec.conv2d_weight_grad."""
        if self.masked:
            return DENSE.conv2d_weight_grad((self.decode(saved),), self.like, dy, conv)
        return self.codec.conv2d_weight_grad(saved, self.like, dy, conv)


def convolution_backward(dy: Tensor, x: Tensor, weight: Tensor, conv: ConvGeometry, mask: tuple[bool, bool, bool]):
    """(dx, dw, db) of a 1-d to 3-d convolution, None where the mask is False. Of a tensor not needed only the shape is read."""
    no_output_padding = [0] * len(conv.stride)
    return torch.ops.aten.convolution_backward(
        dy, x, weight, [dy.shape[1]], conv.stride, conv.padding, conv.dilation, False, no_output_padding, conv.groups, mask
    )  # fmt: skip


class _Code(NamedTuple):
    """What is remembered of a tensor that was encoded."""

    key: tuple  # codec, dtype, version, shape
    memory: StorageWeakRef  # the tensor's
    readers: set[tuple[int, str]]  # layers that got this code
    kept: Kept
    saved: list[TensorWeakRef]


_codes = WeakTensorKeyDictionary()  # x -> _Code
_masks = WeakTensorKeyDictionary()  # output of a ReLU -> (packed mask, version, channels_last, memory)


def keep(
    codec: Codec, x: Tensor, context: Context, dtype: torch.dtype, shape: torch.Size, origin: str
) -> tuple[Kept, tuple[Tensor, ...]]:
    """Returns (kept, saved): x, cast to `dtype` and viewed as `shape`, as `codec` saves it.

    origin: the layer that reads x, see Layer.origin. Layers that read the same x, unmodified, share the saved tensors while these live; a
    layer's second read makes new ones.
    """
    if torch.compiler.is_compiling() or not codec.shared:
        return _keep(codec, x, context, dtype, shape)
    key, memory, reader = (codec, dtype, x._version, shape), StorageWeakRef(x.untyped_storage()), (id(context), origin)
    known = _codes.get(x)
    if known is not None and (known.key, known.memory) == (key, memory) and reader not in known.readers:
        saved = tuple(reference() for reference in known.saved)
        if all(tensor is not None for tensor in saved):
            known.readers.add(reader)
            return known.kept, saved
    kept, saved = _keep(codec, x, context, dtype, shape)
    _codes[x] = _Code(key, memory, {reader}, kept, [TensorWeakRef(tensor) for tensor in saved])
    return kept, saved


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which autocast is off on x's device. torch.autocast takes a host 10 us."""
    device = x.device.type
    if torch.compiler.is_compiling():
        return torch.autocast(device, enabled=False)
    return _AutocastOff(device) if torch.is_autocast_enabled(device) else nullcontext()


class _AutocastOff(AbstractContextManager):
    """Within torch.autocast."""

    def __init__(self, device: str):
        self.device = device

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.device, False)

    def __exit__(self, *exception: object) -> None:
        torch.set_autocast_enabled(self.device, True)


def encoded(codec: Codec, x: Tensor, context: Context | None) -> tuple[Kept, tuple[Tensor, ...]]:
    """(kept, saved): x as it is, unshared. Codecs compute without autocast, which would run products in another dtype."""
    like = Like.of(x)
    if x.numel() == 0 or not codec.is_smaller(like):
        return Kept(DENSE, like), (x,)
    with without_autocast(x):
        return Kept(codec, like), codec.encode(x, context)


def keep_normalised(
    codec: Codec, x: Tensor, normalise: Callable[[], Tensor], context: Context, shape: torch.Size, origin: str
) -> tuple[Kept, tuple[Tensor, ...], bool]:
    """What a norm saves of its input x: (kept, saved, whether that is the normalised input, as `shape`, or x, as `shape`).

    normalise: makes the normalised input, of x's shape; called only if the codec wants it. x itself is saved where the code would be no
    smaller.
    """
    if codec.normalised:
        if codec.is_smaller(Like(shape, x.dtype, False)):
            return *encoded(codec, normalise().to(x.dtype).reshape(shape), context), True
        codec = DENSE
    return *keep(codec, x, context, x.dtype, shape, origin), False


def maps_shape(shape: torch.Size) -> torch.Size:
    """The shape [N, C, H, W] in which codecs see the input of a 1-d to 3-d layer.

    [N, C] is a row for each sample, [N, C, L] a row for each channel; the frames of [N, C, D, H, W] lie below each other.
    """
    if len(shape) == 2:
        return torch.Size((shape[0], 1, 1, shape[1]))
    if len(shape) == 3:
        return torch.Size((*shape[:2], 1, shape[2]))
    return torch.Size((*shape[:2], math.prod(shape[2:-1]), shape[-1]))


def tokens_shape(shape: torch.Size) -> torch.Size:
    """How inputs [..., F] of linear layers are viewed as tokens [N, L, F]; rows [L, F] are the tokens of one sample."""
    samples = shape[0] if len(shape) > 2 else 1
    return torch.Size((samples, math.prod(shape[:-1]) // max(samples, 1), shape[-1]))


def leave_mask(y: Tensor, packed: Tensor, inplace: bool) -> None:
    """Called by a ReLU, in the forward of its autograd.Function, with its output and packed mask: notes the mask of y."""
    if not torch.compiler.is_compiling():
        version = y._version + inplace  # autograd will count mark_dirty as one more change
        _masks[y] = (packed, version, is_channels_last(y), StorageWeakRef(y.untyped_storage()))


def mask_of(y: Tensor) -> Tensor | None:
    """The packed mask that a ReLU left for its output y, whatever happened to y since; None if there is none."""
    return _masks[y][0] if y in _masks else None


def _keep(
    codec: Codec, x: Tensor, context: Context, dtype: torch.dtype, shape: torch.Size
) -> tuple[Kept, tuple[Tensor, ...]]:
    cast = x.detach().to(dtype)
    kept, saved = encoded(codec, cast if cast.shape == shape else cast.reshape(shape), context)
    if kept.codec.relu_mask:
        mask = _mask_of(x, kept.like.channels_last)
        kept, saved = kept._replace(masked=bool(mask)), (*saved, *mask)
    return kept, saved


def _mask_of(x: Tensor, channels_last: bool) -> tuple[Tensor, ...]:
    """The packed mask of the ReLU whose unmodified output x is; nothing where there is none, or none in this memory order."""
    if torch.compiler.is_compiling() or x not in _masks:
        return ()
    packed, *left = _masks[x]
    return (packed,) if left == [x._version, channels_last, StorageWeakRef(x.untyped_storage())] else ()
