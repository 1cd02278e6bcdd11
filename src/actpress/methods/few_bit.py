"""Few-Bit activations (Novikov et al., ICML 2023, arXiv 2202.00441): the derivative rounded to one of 2^bits values.

The idea: the backward pass of y = GELU(x) reads only f'(x), a number between about -.13 and 1.13. Stock PyTorch keeps x for it, 32 bits
per element in fp32. We keep

    GELU (erf, tanh), SiLU, QuickGELU    1 to 4 bits per element

dx = dy * (best constant for the interval x lies in) is approximate and biased; everything else is exact. Unlike inverted activations
this needs nothing of the next layer: dropout or frozen weights may follow.

The 2-bit relatives ReGELU2 and ReSiLU2 (ICML 2024, arXiv 2406.16282) fit the function instead of its derivative.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from actpress import activations
from actpress.activations import Derivative
from actpress.kernels.few_bit import BITS, encode_reference, input_grad_reference
from actpress.swap import Method, Replacement


@dataclass(frozen=True)
class Interval(Derivative):
    """In which of 2^bits intervals the input lies."""

    bits: int

    def encode(self, x: Tensor, function: str) -> tuple[Tensor, bool]:
        return encode_reference(x, function, self.bits)

    def input_grad(self, dy: Tensor, code: Tensor, y: None, function: str, channels_last: bool) -> Tensor:
        return input_grad_reference(dy, code, function, self.bits, channels_last)


@dataclass(frozen=True)
class FewBit(Method):
    """Few-Bit activations.

    bits: 1, 2, 3 or 4 bits per element (the paper's main setting: 3). Raises ValueError on other values.
    """

    bits: int = 3

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"FewBit: bits={self.bits!r}, allowed: {', '.join(map(str, BITS))}")

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        codec = Interval(self.bits)
        return {nn.GELU: Replacement(activations.GELU, codec), nn.SiLU: Replacement(activations.SiLU, codec)}

    def functions(self) -> Mapping[str, Callable]:
        return {n: partial(getattr(activations, n), derivative=Interval(self.bits)) for n in ("gelu", "silu")}

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        layer = activations.layer_for(module)
        return None if layer is None else Replacement(layer, Interval(self.bits))
