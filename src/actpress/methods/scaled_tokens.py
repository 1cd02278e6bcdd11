"""Inputs of linear layers are encoded as tokens of one size, and the size of each token is saved beside them.

A small token is lost in a code whose bounds it shares with large ones. Its error then dominates the weight gradient x^T dy, for a norm
behind the layer makes dy larger by as much as the token is smaller. A class token is often small beside the patches. So each token is
divided by its root mean square before it is encoded, and multiplied by it after decoding. The root mean square takes 16 bits a token.

Source: none, this is ours.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from actpress.codec import Codec, Context, Like
from actpress.kernels.common.rounding import saturated


@dataclass(frozen=True)
class ScaledTokens(Codec):
    """Keeps tokens [N, L, F] as `codec` keeps them once each is divided by its root mean square (bf16 [N, L, 1]).

    A token stays as it is where its root mean square is zero, below 2^-126 or not finite.
    """

    codec: Codec  # of tokens, such as QuantizeCodec

    @property
    def shared(self) -> bool:
        return self.codec.shared

    @property
    def relu_mask(self) -> bool:
        return self.codec.relu_mask

    def nbytes(self, like: Like) -> int:
        return self.codec.nbytes(like) + 2 * math.prod(like.shape[:-1])

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        scale = (norm / x.shape[-1] ** 0.5).to(torch.bfloat16)
        usable = scale.isfinite() & (scale >= torch.finfo(scale.dtype).tiny)
        scale = torch.where(usable, scale, torch.ones_like(scale))
        return (scale, *self.codec.encode((x / scale).to(x.dtype), context))

    def decode(self, kept: tuple[Tensor, ...], like: Like, mask: Tensor | None = None) -> Tensor:
        scale, *codes = kept
        named = {} if mask is None else {"mask": mask}
        return saturated(self.codec.decode(tuple(codes), like, **named) * scale, like.dtype)
