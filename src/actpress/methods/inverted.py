"""Inverted activations (Novikov and Oseledets, 2024, arXiv 2407.15545): the derivative from the output and one bit.

The idea: stock PyTorch saves the input x of y = GELU(x), and the linear layer that follows keeps y. But y and one bit, on which side
of the function's minimum x lies, determine x. So

    GELU (erf, tanh), SiLU, QuickGELU    own output y, shared with the next layer, + 1 bit per element

and a block Linear-GELU-Linear keeps 1.031 hidden tensors in fp32 (1.0625 in bf16) instead of 2. dx = dy * f'(f^-1(y, bit)) is approximate,
in bf16 and fp16 hardly more than rounding y costs in any case (configs/tables/inverted_error.yaml); everything else is exact.

It saves only where the next layer keeps that very tensor. With dropout between, a frozen next layer or a codec on it, y is saved for the
activation alone and the bit comes on top: `apply` leaves a one-time check that warns and names such places. Nor does it save where
another layer keeps x. In-place changes of y by the next operation (an in-place dropout) raise PyTorch's error in the backward pass.

Prior art: Tempo (NeurIPS 2022), in-place GELU from its output and a mask.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from actpress.codec import Codec, Like
from actpress.kernels import inverted
from actpress.kernels.common import check, launch
from actpress.kernels.common.bits import packed_bytes
from actpress.layers import activation
from actpress.methods.rules import ActivationMethod


@dataclass(frozen=True)
class FromOutput(Codec):
    """One bit per element of an activation's input, and its output.

    fused: on a GPU, compute both in one read of the input. decoder: one of inverted.DECODERS.
    """

    fused: bool = False
    decoder: str = "fine"
    derivative = False
    keeps_output = True

    def nbytes(self, like: Like) -> int:
        return packed_bytes(math.prod(like.shape), 1)

    def encode_activation(self, x: Tensor, function: str) -> tuple[Tensor, ...]:
        return (inverted.left_bits(x, function),)

    def forward_activation(self, x: Tensor, function: str) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        if not (self.fused and launch.on_gpu(x)):
            return None
        y, bits = inverted.forward(x, function)
        return y, (bits,)

    def activation_grad(self, kept: tuple[Tensor, ...], like: Like, dy: Tensor, y: Tensor, function: str) -> Tensor:
        return inverted.input_grad(dy, y, *kept, inverted.decoded_by(function, self.decoder), like.channels_last)


@dataclass(frozen=True)
class Inverted(ActivationMethod):
    """Inverted activations.

    forward: "stock", the output is that of stock PyTorch, and another pass over the input makes the bit; "fused", on a GPU one pass makes
        both: one read of the input less, but the output may differ from stock's in the last bit. What is saved is the same. On a CPU, for
        in-place layers and for other libraries' own formulas both are "stock".
    decoder: "fine", the derivative from its output to within 2e-6 in exact arithmetic; "medium" to within 6e-4, "coarse" to within
        1.5e-3, with fewer instructions. In bf16 the rounding of the output costs more than either (configs/tables/inverted_ablation.yaml).
    Raises ValueError on other values.
    """

    forward: str = "stock"
    decoder: str = "fine"

    def __post_init__(self):
        check.one_of(self, forward=activation.FORWARD, decoder=inverted.DECODERS)

    @property
    def codec(self) -> FromOutput:
        return FromOutput(fused=self.forward == "fused", decoder=self.decoder)
