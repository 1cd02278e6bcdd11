"""Block-sparse activation pruning (Barley and Froening, 2023, arXiv 2311.16883): "Compressing the Backward Pass".

The idea: most of a linear layer's input hardly moves its weight gradient. Stock PyTorch saves the input of every Linear whole, we
keep the blocks of it with the largest mean |x| and forget the rest:

    Linear input    (1 - sparsity) * (itemsize + 4 / (bh * bw)) bytes per element: .81 instead of 4 in fp32 at 80% and 8x8
    all others      stock

Forward, dX = dY W and db are exact. dW = dY^T x~ is approximate, x~ being the kept blocks alone: it is computed from them and costs
(1 - sparsity) of the dense product. select="topk" keeps the largest blocks as they are, a biased dW with a small error; select="sample"
draws blocks with probability p ~ mean |x| and keeps block / p: E[dW] is exact, its variance is larger. The code is in kernels/pruning/.

Choices of ours, where the paper's body was not available: the score (mean |x|), one number of blocks per tensor and step (so bytes are
fixed), int32 positions, blocks cut to tensors smaller than they are, and a tensor whose code would be no smaller stays dense. As in
the training script: one sparsity for all Linear layers, head and patch embedding dense, nothing pruned before `start_epoch`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from actpress import layers
from actpress.codec import Codec, Context, Like
from actpress.kernels.common import check
from actpress.kernels.pruning import (
    SELECT,
    Blocks,
    block_grid,
    code_bytes,
    decode,
    encode,
    kept_blocks,
    weight_grad,
)
from actpress.swap import Method, Replacement

HEAD = ("head", "head.*", "heads.*", "head_dist", "fc", "classifier", "classifier.*")
PATCH_EMBEDDING = ("stem", "stem.*", "patch_embed", "patch_embed.*")


@dataclass(frozen=True)
class BlockPruningCodec(Codec):
    """The highest-scored, or sampled, blocks of inputs [..., F], seen as a matrix with a row for each token. Dense at sparsity 0."""

    sparsity: float
    block: tuple[int, int]
    select: str

    def nbytes(self, like: Like) -> int:
        return code_bytes(block_grid(like.shape, self.block), self.sparsity, like.dtype.itemsize)

    def is_smaller(self, like: Like) -> bool:
        return self.sparsity > 0 and super().is_smaller(like)

    def encode(self, x: Tensor, context: Context) -> tuple[Tensor, ...]:
        grid = block_grid(x.shape, self.block)
        noise = context.uniform_like(x.new_empty(1)) if self.select == "sample" else None
        return encode(x, grid, kept_blocks(grid, self.sparsity), noise)

    def decode(self, kept: tuple[Tensor, ...], like: Like) -> Tensor:
        return decode(Blocks(*kept), block_grid(like.shape, self.block)).reshape(like.shape)

    def linear_weight_grad(self, kept: tuple[Tensor, ...], like: Like, dy: Tensor) -> Tensor:
        return weight_grad(Blocks(*kept), dy, block_grid(like.shape, self.block))


@dataclass(frozen=True)
class BlockPruning(Method):
    """Block-sparse pruning of Linear inputs.

    sparsity: share of the blocks that is dropped, 0 <= sparsity < 1; 0 is lossless and keeps the tensor itself.
    block: (tokens, features) of a block; (1, F) with F at least the layer's width prunes whole tokens.
    select: "topk", the largest blocks; "sample", the unbiased variant.
    start_epoch: first epoch, counted from 0, that prunes; dense before it. The training loop says which it is (swap.set_epoch).
    skip: names of modules that stay dense, patterns with * and ?; by default those of head and patch embedding. A model that is one
        Linear has the name "".
    Raises ValueError on other values. Lists are taken for tuples.
    """

    closer = "a lower sparsity"

    sparsity: float = 0.8
    block: tuple[int, int] = (8, 8)
    select: str = "topk"
    start_epoch: int = 0
    skip: tuple[str, ...] = (*HEAD, *PATCH_EMBEDDING)

    def __post_init__(self):
        for name in ("block", "skip"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        checks = {
            "sparsity": (_is_number(self.sparsity) and 0 <= self.sparsity < 1, "0 <= sparsity < 1"),
            "block": (
                isinstance(self.block, tuple)
                and len(self.block) == 2
                and all(check.is_integer(k, 1) for k in self.block),
                "two integers from 1",
            ),
            "select": (self.select in SELECT, ", ".join(SELECT)),
            "start_epoch": (check.is_integer(self.start_epoch, 0), "integers from 0"),
            "skip": (
                isinstance(self.skip, tuple) and all(isinstance(pattern, str) for pattern in self.skip),
                "a list of name patterns",
            ),
        }
        for name, (valid, allowed) in checks.items():
            if not valid:
                check.refuse(self, name, getattr(self, name), allowed)

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        codec = BlockPruningCodec(float(self.sparsity), self.block, self.select)
        return {nn.Linear: Replacement(layers.Linear, codec, self.start_epoch)}

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        dense = any(fnmatchcase(name, pattern) for pattern in self.skip)
        return None if dense else super().replacement(name, module)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
