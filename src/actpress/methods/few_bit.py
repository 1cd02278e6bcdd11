"""Few-Bit activations (Novikov et al., ICML 2023, arXiv 2202.00441): the derivative rounded to one of 2^bits values.

The idea: the backward pass of y = GELU(x) reads only f'(x), a number between about -.13 and 1.13. Stock PyTorch saves x for it, 32 bits
per element in fp32. We save

    GELU (erf, tanh), SiLU, QuickGELU    1 to 4 bits per element

dx = dy * (best constant for the interval x lies in) is approximate and biased; everything else is exact. Unlike inverted activations
this needs nothing of the next layer: dropout or frozen weights may follow.

The 2-bit relatives ReGELU2 and ReSiLU2 (ICML 2024, arXiv 2406.16282) fit the function instead of its derivative.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from actpress.codec import Codec, Like
from actpress.kernels import few_bit
from actpress.kernels.common import check, launch
from actpress.layers import activation
from actpress.methods.rules import ActivationMethod


@dataclass(frozen=True)
class Interval(Codec):
    """In which of 2^bits intervals an activation's input lies.

    fused: on a GPU, compute the output and the code in one read of the input.
    """

    bits: int
    fused: bool = False
    derivative = False

    def nbytes(self, like: Like) -> int:
        return few_bit.code_bytes(math.prod(like.shape), self.bits)

    def encode_activation(self, x: Tensor, function: str) -> tuple[Tensor, ...]:
        return (few_bit.encode(x, function, self.bits),)

    def forward_activation(self, x: Tensor, function: str) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        if not (self.fused and launch.on_gpu(x)):
            return None
        y, code = few_bit.forward(x, function, self.bits)
        return y, (code,)

    def activation_grad(self, kept: tuple[Tensor, ...], like: Like, dy: Tensor, y: None, function: str) -> Tensor:
        return few_bit.input_grad(dy, *kept, function, self.bits, like.channels_last)


@dataclass(frozen=True)
class FewBit(ActivationMethod):
    """Few-Bit activations.

    bits: 1, 2, 3 or 4 bits per element (the paper's main setting: 3).
    forward: "stock", the output is that of stock PyTorch, and another pass over the input makes the code; "fused", on a GPU one pass makes
        both: one read of the input less, but the output may differ from stock's in the last bit. What is saved is the same. On a CPU, for
        in-place layers and for other libraries' own formulas both are "stock".
    Raises ValueError on other values.
    """

    closer = "more bits"

    bits: int = 3
    forward: str = "stock"

    def __post_init__(self):
        check.one_of(self, bits=few_bit.BITS, forward=activation.FORWARD)

    @property
    def codec(self) -> Interval:
        return Interval(self.bits, fused=self.forward == "fused")
