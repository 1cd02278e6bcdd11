"""Plain group quantisation: Q-bit codes between each group's own least and greatest value, nothing else.

The idea, common to ActNN (arXiv 2104.14129), GACT (2206.11357) and Mesa (2111.11124): the backward pass stands a coarse copy of an
activation, as long as it is right on average. It is DIVISION without its low-frequency part: what a map costs less, and whether the
block means are worth their bytes. Stock PyTorch saves 32 bits per element in fp32; we save

    inputs of convolutions and norms of maps         Q + 32 / (elements of a group) bits per element
    inputs of Linear                                 the same of tokens scaled to one size, and 16 bits a token (methods/scaled_tokens.py)
    inputs of norms of tokens (LayerNorm, RMSNorm)   4 bits, or Q if that is more, between each token's bounds
    ReLU and its kin (layers.exact), Dropout         1 bit per element, exact
    MaxPool2d                                        8 bits per output, exact
    AvgPool2d                                        nothing, exact
    Hardswish, Sigmoid, Tanh, ELU, Mish, Softplus    the derivative, 4 bits per element, or Q if that is more

Norms save their normalised input, which is all their backward pass reads. Weight gradients, and the input gradients of norms, are computed
from the decoded input and are approximate; with stochastic rounding its expectation is the input. The code itself is in
kernels/quantize. ActNN's adaptive bits and Mesa's moving averages are not here: one Q for all, each tensor's own bounds.

levels="normal" is a study: inputs of BatchNorm2d, close to normal in each channel, in Q-bit levels that are fixed for a normal
distribution (kernels/lloyd_max/), at Q + 64 / (elements of a channel of the batch) bits per element.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from actpress import layers
from actpress.codec import Codec, Context, Like
from actpress.kernels import lloyd_max
from actpress.kernels.common import check
from actpress.kernels.common.bits import BITS
from actpress.kernels.masks import relu_backward
from actpress.kernels.quantize import GROUPINGS, Code, Format, code_bytes, decode, encode
from actpress.methods.rules import all_functions, all_layers
from actpress.methods.scaled_tokens import ScaledTokens
from actpress.swap import Method, Replacement

ROUNDING = ("stochastic", "nearest")
LEVELS = ("affine", "normal")


@dataclass(frozen=True)
class QuantizeCodec(Codec):
    """Q-bit codes of tensors of any shape."""

    bits: int
    grouping: str
    size: int
    rounding: str
    relu_mask: bool = False

    @property
    def _format(self) -> Format:
        return Format(self.grouping, self.size, self.bits)

    def nbytes(self, like: Like) -> int:
        return code_bytes(like.shape, self._format)

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        source = context if self.rounding == "stochastic" else None
        return encode(x, source, self._format)

    def decode(self, kept: tuple[Tensor, ...], like: Like, mask: Tensor | None = None) -> Tensor:
        return _masked(decode(Code(*kept), *like, self._format), mask, like)


@dataclass(frozen=True)
class NormalCodec(Codec):
    """Codes of maps [N, C, H, W], normalised per channel, in fixed levels."""

    levels: tuple[float, ...]
    rounding: str
    relu_mask: bool = False
    normalised = False  # it normalises by itself

    def nbytes(self, like: Like) -> int:
        return lloyd_max.code_bytes(like.shape, self.levels)

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        noise = context.uniform_like(x) if self.rounding == "stochastic" else None
        return lloyd_max.encode_reference(x, noise, self.levels)

    def decode(self, kept: tuple[Tensor, ...], like: Like, mask: Tensor | None = None) -> Tensor:
        return _masked(lloyd_max.decode_reference(lloyd_max.Code(*kept), *like, self.levels), mask, like)


def _masked(x: Tensor, mask: Tensor | None, like: Like) -> Tensor:
    """x, zero where the packed mask, if there is one, is 0: as the gradient of a ReLU is."""
    return x if mask is None else relu_backward(x, mask, like.channels_last)


@dataclass(frozen=True)
class Quantize(Method):
    """Plain group quantisation.

    bits: Q, bits per element: 1, 2, 4 or 8.
    grouping: "group", `size` consecutive elements of a sample (ActNN, GACT); "channel", a map of a sample, or a feature of its tokens;
        "sample", all of it. In inputs of LayerNorm and RMSNorm each token is a sample.
    size: elements of a group, 1 to 16384 (ActNN, GACT: 256); other groupings leave it unused.
    rounding: "stochastic", unbiased; "nearest", biased with a smaller error.
    relu_mask: decode to exact zeros where the input is the output of a ReLU that zeroed it, by the mask which that ReLU saves anyway: no
        bytes more, unless hooks on saved tensors copy each. It matters for levels="normal" alone: affine levels hold such a zero
        exactly, as the least value of its group. Off by default: none of the papers does it. It needs eager mode: compiled code finds
        no mask and decodes plainly, as does a layer whose input was modified after the ReLU.
    levels: "affine", evenly spaced between a group's bounds; "normal", for inputs of BatchNorm2d alone, whatever `grouping` says: the
        Lloyd-Max levels of a normal distribution with each channel's mean and deviation over the batch, at 1, 2 or 4 bits.
        "stochastic" is then unbiased between the outermost levels, and clamps what lies beyond. A study: slow, without a kernel.
    Raises ValueError on other values.
    """

    closer = "more bits"

    bits: int = 2
    grouping: str = "channel"
    size: int = 256
    rounding: str = "stochastic"
    relu_mask: bool = False
    levels: str = "affine"

    def __post_init__(self):
        check.one_of(self, bits=BITS, grouping=GROUPINGS, rounding=ROUNDING, levels=LEVELS, relu_mask=(True, False))
        check.integer(self, "size", self.size, 1, 16384)
        if self.levels == "normal" and self.bits not in lloyd_max.BITS:
            allowed = ", ".join(map(str, lloyd_max.BITS))
            raise ValueError(f"Quantize: bits={self.bits!r}, allowed with levels='normal': {allowed}")

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        codec = QuantizeCodec(self.bits, self.grouping, self.size, self.rounding, self.relu_mask)
        token_norms = token_norm_codec(self.bits, self.grouping, self.size)
        rules = all_layers(codec, ScaledTokens(codec), token_norms, derivative_codec(self.bits))
        if self.levels == "normal":
            normal = NormalCodec(lloyd_max.normal_levels(self.bits), self.rounding, self.relu_mask)
            rules[nn.BatchNorm2d] = Replacement(layers.BatchNorm2d, normal)
        return rules

    def functions(self) -> Mapping[str, Callable]:
        return all_functions(derivative_codec(self.bits))


def token_norm_codec(bits: int, grouping: str = "sample", size: int = 256) -> QuantizeCodec:
    """What norms of tokens save their normalised input by, rows of a token each: 4 bits at least, to the nearest level.

    Their input gradient is not linear in it, so unbiased noise is not unbiased there. Errors add up over the many norms of a transformer.
    """
    return QuantizeCodec(max(bits, 4), grouping, size, "nearest")


def derivative_codec(bits: int) -> QuantizeCodec:
    """What smooth activations save their derivatives by: 4 bits at least, to the nearest level."""
    return QuantizeCodec(max(bits, 4), "group", 256, "nearest")
