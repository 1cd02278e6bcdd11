"""The public operations of block-sparse pruning: CUDA tensors take the kernels, all others the references."""

from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.pruning.reference import (
    Blocks,
    Grid,
    as_matrix,
    decode_reference,
    encode_reference,
    weight_grad_reference,
)
from actpress.kernels.pruning.triton import decode_triton, empty_blocks, encode_by_kernels
from actpress.kernels.pruning.triton_product import weight_grad_triton


# The bodies of the registered operations take plain numbers and return contiguous tensors, as the kernels do.
def _encode_body(x: Tensor, height: int, width: int, kept: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x_RC = as_matrix(x)
    values, index = encode_reference(x_RC, Grid(*x_RC.shape, height, width), kept, noise)
    return values.contiguous(), index


def _decode_body(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    return decode_reference(Blocks(values, index), Grid(rows, columns, *values.shape[1:])).contiguous()


def _weight_grad_body(values: Tensor, index: Tensor, dy: Tensor, columns: int) -> Tensor:
    dy_RO = as_matrix(dy)
    return weight_grad_reference(Blocks(values, index), dy_RO, Grid(dy_RO.shape[0], columns, *values.shape[1:]))


_encode = launch.operation(
    "prune_encode",
    _encode_body,
    encode_by_kernels,
    lambda x, height, width, kept, noise=None: empty_blocks(x, height, width, kept),
)
_decode = launch.operation(
    "prune_decode",
    _decode_body,
    decode_triton,
    lambda values, index, rows, columns: values.new_empty(rows, columns),
)
_weight_grad = launch.operation(
    "prune_weight_grad",
    _weight_grad_body,
    weight_grad_triton,
    lambda values, index, dy, columns: dy.new_empty(dy.shape[-1], columns, dtype=compute_dtype(dy.dtype)),
)


def encode(x: Tensor, grid: Grid, kept: int, noise: Tensor | None = None) -> Blocks:
    """The `kept` blocks of x [..., C] of any strides and floating dtype.

    grid: block_grid(x.shape, block). noise: None selects the blocks with the highest scores; [1] in [0, 1) draws a sample.
    """
    if launch.on_gpu(x):
        return Blocks(*_encode(x, grid.height, grid.width, kept, noise))
    return encode_reference(as_matrix(x), grid, kept, noise)


def decode(blocks: Blocks, grid: Grid) -> Tensor:
    """x~ [R, C] from its kept blocks, zero elsewhere."""
    if launch.on_gpu(blocks.values):
        return _decode(*blocks, grid.rows, grid.columns)
    return decode_reference(blocks, grid)


def weight_grad(blocks: Blocks, dy: Tensor, grid: Grid) -> Tensor:
    """dW = dY^T x~ [O, C] from the kept blocks and dy [..., O] of any strides. fp32 sums and result, fp64 for fp64."""
    return _weight_grad(*blocks, dy, grid.columns)
