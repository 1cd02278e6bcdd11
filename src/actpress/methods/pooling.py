"""Pooled activations (Barley and Froening, 2024, arXiv 2409.11902): "Less Memory Means smaller GPUs".

The idea: keep the block means of every convolution's input instead of the input, 1/k^2 of its bytes.

    Conv2d input    means of k x k blocks, in the activation's dtype: 32 / k^2 bits per element in fp32
    ReLU, its kin   1 bit per element, exact       } ours: pooling conv inputs alone frees nothing, since ReLU
    MaxPool2d       8 bits per output, exact       } and max-pooling keep the same tensors dense
    AvgPool2d       nothing, exact
    BatchNorm2d     stock: its input stays dense

Weight gradients are taken against the upsampled means, which are built, one layer's at a time, only where that is cheapest
(kernels/pooling/composed.py; kernels/pooling/plan.py on a GPU): approximate and biased, their norm shrinks. Input and bias
gradients are exact.

align="authors", relu="stock" is the official code: floor-mode pooling, one pooled copy per reader, everything but convolutions stock. Its
"block 1" baseline copies every conv input.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import Tensor, nn

from actpress import layers
from actpress.codec import Codec, Context, Like
from actpress.kernels.common import check
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.pooling import ALIGN, PooledConv, conv2d_weight_grad, pool, pool_max, upsample_reference
from actpress.methods.rules import exact, exact_functions
from actpress.swap import Method, Replacement

RELU = ("mask", "stock")
REDUCE = {"mean": pool, "max": pool_max}


@dataclass(frozen=True)
class PoolingCodec(Codec):
    """Block means, or maxima, of maps [N, C, H, W]. block=1, align="ceil" is lossless: the map itself."""

    block: int
    align: str
    reduce: str = "mean"

    @property
    def shared(self) -> bool:  # the official code pools once per reader
        return self.align == "ceil"

    def nbytes(self, like: Like) -> int:
        n, c, *size = like.shape
        kernel = [min(self.block, length) for length in size]
        up = self.align == "ceil"
        blocks = [-(-length // k) if up else length // k for length, k in zip(size, kernel, strict=True)]
        return n * c * math.prod(blocks) * like.dtype.itemsize

    def is_smaller(
        self, like: Like
    ) -> bool:  # a map no larger than a block is copied all the same, as in the official code
        return self.block > 1 or self.align == "authors"

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        return (REDUCE[self.reduce](x, self.block, self.align),)

    def decode(self, kept: tuple[Tensor, ...], like: Like) -> Tensor:
        if kept[0].shape == like.shape:
            return kept[0]
        return upsample_reference(kept[0], tuple(like.shape[2:]), self.block, self.align)

    def conv2d_weight_grad(self, kept: tuple[Tensor, ...], like: Like, dy: Tensor, conv: ConvGeometry) -> Tensor:
        if kept[0].shape == like.shape:
            return super().conv2d_weight_grad(kept, like, dy, conv)
        return conv2d_weight_grad(kept[0], dy, PooledConv(conv, tuple(like.shape[2:]), self.block, self.align))


@dataclass(frozen=True)
class Pooling(Method):
    """Pooled activations.

    block: k, side of the averaged blocks, at least 1 (official: 1, 2 or 4; 1 is lossless with align="ceil").
    align: "ceil", blocks that cover the whole map; "authors", the official floor mode, one copy per reader.
    relu: "mask", ReLU and max-pooling keep bits and bytes; "stock", they stay stock as in the official code.
    stages: another block for convolutions whose name matches a pattern, e.g. {"layer1.*": 4, "conv1": 1}; the first match counts.
    reduce: "mean", each block's mean, as in the paper; "max", its greatest value, upsampled in the same way: a study without a kernel.
    Raises ValueError on other values.
    """

    closer = "a smaller block"

    block: int = 2
    align: str = "ceil"
    relu: str = "mask"
    stages: Mapping[str, int] = field(default_factory=dict, hash=False)
    reduce: str = "mean"

    def __post_init__(self):
        check.integer(self, "block", self.block, 1)
        check.one_of(self, align=ALIGN, relu=RELU, reduce=REDUCE)
        if not isinstance(self.stages, Mapping) or not all(isinstance(name, str) for name in self.stages):
            check.refuse(self, "stages", self.stages, "a dict of name pattern and block")
        for name, block in self.stages.items():
            check.integer(self, f"stages[{name!r}]", block, 1)

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        rules = {nn.Conv2d: Replacement(layers.Conv2d, PoolingCodec(self.block, self.align, self.reduce))}
        return rules | (exact(but=(nn.Dropout,)) if self.relu == "mask" else {})

    def functions(self) -> Mapping[str, Callable]:
        return exact_functions(but=(nn.Dropout,)) if self.relu == "mask" else {}

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        replacement = super().replacement(name, module)
        if replacement is None or replacement.codec is None:
            return replacement
        block = next((k for pattern, k in self.stages.items() if fnmatchcase(name, pattern)), self.block)
        return replacement._replace(codec=PoolingCodec(block, self.align, self.reduce))
