"""Inputs of linear layers: tokens of one size each, and how large they were.

A token is small beside others in attention's output, behind a convolution, or where a class token starts near zero. Between bounds that
it shares with large tokens it would be lost, and its share of the weight gradient x^T dy with it: whatever normalises the token later makes
its dy as much larger as the token is smaller. So tokens are divided by their root mean square before they are coded, at 16 bits a token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actpress.codec import Codec, Context, Like
from actpress.kernels.rounding import saturated


@dataclass(frozen=True)
class ScaledTokens(Codec):
    """Tokens [N, L, F], each divided by its root mean square (bf16 [N, L, 1]), as `codec` keeps them; dense where that would be no smaller.

    A token whose root mean square is zero, too small or not finite stays as it is.
    """

    codec: Codec

    @property
    def shared(self) -> bool:
        return self.codec.shared

    @property
    def relu_mask(self) -> bool:
        return self.codec.relu_mask

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm / x.shape[-1] ** 0.5).to(torch.bfloat16)
        usable = scale.isfinite() & (scale >= torch.finfo(scale.dtype).tiny)
        scale = torch.where(usable, scale, torch.ones_like(scale))
        kept = (scale, *self.codec.encode((x / scale).to(x.dtype), context))
        return (x,) if len(kept) == 2 or _bytes(*kept) >= _bytes(x) else kept

    def decode(self, kept: tuple[Tensor, ...], like: Like) -> Tensor:
        if len(kept) == 1:
            return kept[0]
        scale, *codes = kept
        return saturated(self.codec.decode(tuple(codes), like) * scale, like.dtype)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)  # Tensor.nbytes does not take symbolic sizes
