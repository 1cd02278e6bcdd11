"""Block-sparse pruning: the blocks of a matrix with the largest mean |x|, and the weight gradient from them. See reference.py."""

from actpress.kernels.pruning.op import decode, encode, weight_grad
from actpress.kernels.pruning.reference import SELECT, Blocks, Grid, block_grid, code_bytes, kept_blocks

__all__ = [
    "SELECT",
    "Blocks",
    "Grid",
    "block_grid",
    "code_bytes",
    "decode",
    "encode",
    "kept_blocks",
    "weight_grad",
]
