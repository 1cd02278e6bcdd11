"""DIVISION (Wang et al., ICML 2023, arXiv 2208.04187): low frequencies in bf16, the rest in Q bits.

The idea: the backward pass mainly uses the low-frequency part of an activation map, memory goes to the high-frequency part.
Stock PyTorch saves the input of every convolution and batch norm and the output of every ReLU, 32 bits per element each in
fp32. We save

    inputs of convolutions, BatchNorm, GroupNorm     block means + Q-bit rest, about Q + .26 bits per element at 56x56
    Linear inputs                                    the same over tokens, see below
    LayerNorm, RMSNorm inputs                        4 bits, or Q if that is more, between each token's bounds
    ReLU and its kin (layers.exact), Dropout         1 bit per element, exact
    MaxPool2d                                        8 bits per output, exact
    AvgPool2d                                        nothing, exact (stock saves its input)
    Hardswish, Sigmoid, Tanh, ELU, Mish, Softplus    the derivative, 4 bits per element, or Q if that is more

Three things differ from the official code by default, at the same bytes: blocks cover the whole map (align), the means are left out of
maps that are encoded more exactly without them, those after a ReLU above all (lfc), and norms save their normalised input, which is all
their backward pass reads.

Weight gradients, and the input gradient of batch norm, are computed from the decoded input x~ and are approximate; E[x~] = x, since
rounding is stochastic. Input gradients of convolutions and linears, bias gradients and masks are exact. The code itself is in
kernels/division.

Linear inputs [..., L, F] are not in the official CNN code. As in its T5 sibling, means run over blocks of tokens; bounds are those of each
feature of a sample (there: of a sample), so that a few features of large values do not widen those of the others. Tokens are scaled to one
size before, so that large ones do not widen their bounds (methods/scaled_tokens.py). Inputs of LayerNorm and RMSNorm have bounds of
their own for each token, and no means: 1 / deviation would amplify what a small token lost in the steps of large ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from actpress.codec import Codec, Context, Like
from actpress.kernels.common import check
from actpress.kernels.common.bits import BITS
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.division import ALIGN, LFC, Code, Format, code_bytes, decode, encode
from actpress.methods.quantize import derivative_codec, token_norm_codec
from actpress.methods.rules import all_functions, all_layers, exact, exact_functions, with_codec
from actpress.methods.scaled_tokens import ScaledTokens
from actpress.swap import Method, Replacement


@dataclass(frozen=True)
class DivisionCodec(Codec):
    """Block means and Q-bit rest of maps [N, C, H, W], or of tokens [N, L, F] seen as maps [N, F, L, 1]: a row for each feature."""

    block: int
    bits: int
    align: str
    lfc: str
    layout: Literal["maps", "tokens"] = "maps"
    relu_mask: bool = False

    @property
    def shared(self) -> bool:  # the official code keeps one copy per reader
        return self.align == "ceil"

    @property
    def normalised(self) -> bool:  # the official code takes inputs of batch norms as they are
        return self.align == "ceil"

    def nbytes(self, like: Like) -> int:
        shape = self._maps_shape(like.shape)
        return code_bytes(shape, self._format(shape))

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        maps = self._as_maps(x)
        return encode(maps, context, self._format(maps.shape))

    def decode(self, kept: tuple[Tensor, ...], like: Like, mask: Tensor | None = None) -> Tensor:
        shape, channels_last = like.shape, like.channels_last
        if self.layout == "tokens":
            maps = self._as_maps(torch.empty(shape, device="meta"))
            shape, channels_last = maps.shape, is_channels_last(maps)
        maps = decode(Code(*kept), shape, like.dtype, channels_last, self._format(shape), mask)
        return maps.squeeze(3).transpose(1, 2) if self.layout == "tokens" else maps

    def _maps_shape(self, shape: torch.Size) -> torch.Size:
        return torch.Size((shape[0], shape[2], shape[1], 1)) if self.layout == "tokens" else shape

    def _as_maps(self, x: Tensor) -> Tensor:
        return x.contiguous().transpose(1, 2).unsqueeze(3) if self.layout == "tokens" else x

    def _format(self, shape: torch.Size) -> Format:
        return Format(self._kernel(shape), self.bits, self.align, self.lfc)

    def _kernel(self, shape: torch.Size) -> tuple[int, int]:
        height, width = shape[2:]
        if self.align == "authors":  # square; official code, by height alone, fails on narrow maps
            return (min(self.block, height, width),) * 2
        if 1 in (height, width):  # rows: blocks of as many elements
            return (min(self.block**2, height), min(self.block**2, width))
        return (min(self.block, height), min(self.block, width))


@dataclass(frozen=True)
class Division(Method):
    """DIVISION.

    block: side of the averaged blocks, at least 1 (official: 8).
    bits: Q, bits per element of the rest: 1, 2, 4 or 8 (official: 2 for CNNs, 4 for T5).
    align: "ceil", blocks that cover the whole map, and one code for a tensor read by several layers; "authors", the layout
        of the official CNN code: floor-mode blocks, block means in every map, one code per reader, inputs of BatchNorm2d as they are
        (their means are subtracted, which is as close), everything but Conv2d, BatchNorm2d and exact layers left dense.
    lfc: "auto", block means are left out of the maps that are encoded more exactly without them; "always", they are subtracted in every
        map, as align="authors" always does. The bytes are the same.
    relu_mask: decode to exact zeros where the input is the output of a ReLU that zeroed it, by the mask which that ReLU saves anyway: no
        bytes more, unless hooks on saved tensors copy each. It matters in maps whose block means are subtracted; the others hold such
        zeros exactly. Off by default: neither the paper nor its code does it. It needs eager mode: compiled code finds no mask and
        decodes plainly, as does a layer whose input was modified after the ReLU.
    Raises ValueError on other values.
    """

    closer = "more bits"

    block: int = 8
    bits: int = 2
    align: str = "ceil"
    lfc: str = "auto"
    relu_mask: bool = False

    def __post_init__(self):
        check.integer(self, "block", self.block, 1)
        check.one_of(self, bits=BITS, align=ALIGN, lfc=LFC, relu_mask=(True, False))

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        if self.align == "authors":
            maps = DivisionCodec(self.block, self.bits, "authors", "always", relu_mask=self.relu_mask)
            return with_codec((nn.Conv2d, nn.BatchNorm2d), maps) | exact()
        maps = DivisionCodec(self.block, self.bits, self.align, self.lfc, relu_mask=self.relu_mask)
        tokens = DivisionCodec(self.block, self.bits, self.align, self.lfc, "tokens", self.relu_mask)
        return all_layers(maps, ScaledTokens(tokens), token_norm_codec(self.bits), derivative_codec(self.bits))

    def functions(self) -> Mapping[str, Callable]:
        return exact_functions() if self.align == "authors" else all_functions(derivative_codec(self.bits))
