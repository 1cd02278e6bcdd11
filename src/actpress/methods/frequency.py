"""Frequencies: which part of an activation map does the backward pass need? A study of DIVISION's premise, not a method of its own.

DIVISION (arXiv 2208.04187) keeps block means in bf16, the low frequencies, and the rest in Q bits, the high ones. Here either part can be
left out, and the block means replaced by a true low-pass filter, a DCT, of as many coefficients:

    parts="both"    x~ = low + Q-bit high    Q + 16 / k^2 bits per element
    parts="low"     x~ = low                 16 / k^2
    parts="high"    x~ = Q-bit high          Q; the low part is subtracted before coding and forgotten

Inputs of Conv2d and BatchNorm2d; ReLU, Dropout and pooling layers as in DIVISION. Plain PyTorch operations only, no kernels: slow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from actpress.codec import Codec, Context, Like
from actpress.kernels import quantize
from actpress.kernels.common import check
from actpress.kernels.common.bits import BITS
from actpress.kernels.common.layout import dense_as, is_channels_last
from actpress.kernels.common.rounding import saturated
from actpress.kernels.frequency import TRANSFORMS, back_reference, low_bytes, low_reference
from actpress.methods.rules import exact, exact_functions, with_codec
from actpress.swap import Method, Replacement

PARTS = ("both", "low", "high")


@dataclass(frozen=True)
class FrequencyCodec(Codec):
    """Low and high part of maps [N, C, H, W]."""

    block: int
    bits: int
    parts: str
    transform: str

    @property
    def _format(self) -> quantize.Format:
        return quantize.Format("channel", 1, self.bits)

    def nbytes(self, like: Like) -> int:
        low = low_bytes(like.shape, self.block) if self.parts != "high" else 0
        return low + (quantize.code_bytes(like.shape, self._format) if self.parts != "low" else 0)

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        maps = x.float()
        low = low_reference(maps, self.block, self.transform)
        kept = (low,) if self.parts != "high" else ()
        if self.parts != "low":
            rest = maps - back_reference(low, tuple(x.shape[2:]), self.block, self.transform, maps.dtype)
            rest = dense_as(rest, is_channels_last(x))  # as `decode` will be told, whatever strides x has
            kept = (*kept, *quantize.encode_reference(rest, context.uniform_like(rest), self._format))
        return kept

    def decode(self, kept: tuple[Tensor, ...], like: Like) -> Tensor:
        parts = []
        if self.parts != "high":
            low, *kept = kept
            parts.append(back_reference(low, tuple(like.shape[2:]), self.block, self.transform, torch.float32))
        if self.parts != "low":
            code = quantize.Code(*kept)
            parts.append(quantize.decode_reference(code, like.shape, torch.float32, like.channels_last, self._format))
        memory_format = torch.channels_last if like.channels_last else torch.contiguous_format
        return saturated(sum(parts), like.dtype).contiguous(memory_format=memory_format)


@dataclass(frozen=True)
class Frequency(Method):
    """The low and the high frequencies of maps, together or apart.

    block: k, as in Division: 1/k of the frequencies of each axis are low. bits: Q of the high part: 1, 2, 4 or 8.
    parts: "both", "low" or "high", what backward gets to see. transform: "mean", block means, or "dct".
    Raises ValueError on other values.
    """

    closer = "more bits"

    block: int = 8
    bits: int = 2
    parts: str = "both"
    transform: str = "mean"

    def __post_init__(self):
        check.integer(self, "block", self.block, 1)
        check.one_of(self, bits=BITS, parts=PARTS, transform=TRANSFORMS)

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        codec = FrequencyCodec(self.block, self.bits, self.parts, self.transform)
        return with_codec((nn.Conv2d, nn.BatchNorm2d), codec) | exact()

    def functions(self) -> Mapping[str, Callable]:
        return exact_functions()
