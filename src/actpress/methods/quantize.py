"""Plain group quantisation: Q-bit codes between each group's own least and greatest value, nothing else.

The idea, common to ActNN (arXiv 2104.14129), GACT (2206.11357) and Mesa (2111.11124): the backward pass stands a coarse copy of an
activation, as long as it is right on average. It is DIVISION without its low-frequency part: what a map costs less, and whether the
block means are worth their bytes. Stock PyTorch keeps 32 bits per element in fp32; we keep

    Conv2d, BatchNorm2d, Linear, LayerNorm inputs    Q + 32 / (elements of a group) bits per element
    ReLU (module or F.relu), Dropout                 1 bit per element, exact
    MaxPool2d                                        8 bits per output, exact
    AvgPool2d                                        nothing, exact

Weight gradients, and the input gradients of norms, are computed from the decoded input and are approximate; with stochastic rounding its
expectation is the input. The code itself is in kernels/quantize.py. ActNN's adaptive bits and Mesa's moving averages are not here: one Q
for all, each tensor's own bounds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from actpress import layers
from actpress.codec import Codec, Context, Like
from actpress.kernels.bits import BITS
from actpress.kernels.quantize import GROUPINGS, Code, code_bytes, decode, encode
from actpress.swap import Method, Replacement

ROUNDING = ("stochastic", "nearest")


@dataclass(frozen=True)
class QuantizeCodec(Codec):
    """Q-bit codes of tensors of any shape; dense where the code would be no smaller."""

    bits: int
    grouping: str
    size: int
    rounding: str

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        if x.numel() == 0 or code_bytes(x.shape, self.grouping, self.size, self.bits) >= x.numel() * x.itemsize:
            return (x,)
        source = context if self.rounding == "stochastic" else None
        return encode(x, source, self.grouping, self.size, self.bits)

    def decode(self, kept: tuple[Tensor, ...], like: Like) -> Tensor:
        return kept[0] if len(kept) == 1 else decode(Code(*kept), *like, self.grouping, self.size, self.bits)


@dataclass(frozen=True)
class Quantize(Method):
    """Plain group quantisation.

    bits: Q, bits per element: 1, 2, 4 or 8.
    grouping: "group", `size` consecutive elements of a sample (ActNN, GACT); "channel", a map of a sample; "sample", all of it.
    size: elements of a group, 1 to 16384 (ActNN, GACT: 256); other groupings leave it unused.
    rounding: "stochastic", unbiased; "nearest", biased with a smaller error.
    Raises ValueError on other values.
    """

    bits: int = 2
    grouping: str = "channel"
    size: int = 256
    rounding: str = "stochastic"

    def __post_init__(self):
        for name, allowed in (("bits", BITS), ("grouping", GROUPINGS), ("rounding", ROUNDING)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Quantize: {name}={getattr(self, name)!r}, allowed: {', '.join(map(str, allowed))}")
        if not isinstance(self.size, int) or not 1 <= self.size <= 16384:
            raise ValueError(f"Quantize: size={self.size!r}, allowed: integers from 1 to 16384")

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        codec = QuantizeCodec(self.bits, self.grouping, self.size, self.rounding)
        coded = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.LayerNorm)
        exact = (nn.ReLU, nn.Dropout, nn.MaxPool2d, nn.AvgPool2d)
        rules = {layer: Replacement(getattr(layers, layer.__name__), codec) for layer in coded}
        return rules | {layer: Replacement(getattr(layers, layer.__name__)) for layer in exact}

    def functions(self) -> Mapping[str, Callable]:
        return {"relu": layers.relu, "relu_": layers.relu_}
