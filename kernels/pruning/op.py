"""The public operations of block-sparse pruning: CUDA tensors take the kernels, all others the references."""

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.pruning.reference import (
    Blocks,
    Grid,
    as_matrix,
    compute_dtype,
    decode_reference,
    encode_reference,
    weight_grad_reference,
)
from actpress.kernels.pruning.triton import decode_triton, encode_by_kernels
from actpress.kernels.pruning.triton_product import weight_grad_triton


@torch.library.custom_op("actpress::prune_encode", mutates_args=())
def _encode(x: Tensor, height: int, width: int, kept: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x_RC = as_matrix(x)
    values, index = encode_reference(x_RC, Grid(*x_RC.shape, height, width), kept, noise)
    return values.contiguous(), index


@_encode.register_fake
def _(x: Tensor, height: int, width: int, kept: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(kept, height, width), x.new_empty(kept, dtype=torch.int32)


launch.on_cuda(_encode, encode_by_kernels)


@torch.library.custom_op("actpress::prune_decode", mutates_args=())
def _decode(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    return decode_reference(Blocks(values, index), Grid(rows, columns, *values.shape[1:])).contiguous()


@_decode.register_fake
def _(values: Tensor, index: Tensor, rows: int, columns: int) -> Tensor:
    return values.new_empty(rows, columns)


launch.on_cuda(_decode, decode_triton)


def encode(x: Tensor, grid: Grid, kept: int, noise: Tensor | None = None) -> Blocks:
    """x [..., C] of any strides and floating dtype -> its `kept` blocks: the highest scores, or, given noise [1] in [0, 1), a sample.

    grid: block_grid(x.shape, block).
    """
    if launch.on_gpu(x):
        return Blocks(*launch.way(_encode, x)(x, grid.height, grid.width, kept, noise))
    return encode_reference(x.reshape(grid.rows, grid.columns), grid, kept, noise)


def decode(blocks: Blocks, grid: Grid) -> Tensor:
    """Blocks -> x~ [R, C], zero where no block is kept."""
    if launch.on_gpu(blocks.values):
        return launch.way(_decode, blocks.values)(*blocks, grid.rows, grid.columns)
    return decode_reference(blocks, grid)


@torch.library.custom_op("actpress::prune_weight_grad", mutates_args=())
def _weight_grad(values: Tensor, index: Tensor, dy: Tensor, columns: int) -> Tensor:
    dy_RO = as_matrix(dy)
    return weight_grad_reference(Blocks(values, index), dy_RO, Grid(len(dy_RO), columns, *values.shape[1:]))


@_weight_grad.register_fake
def _(values: Tensor, index: Tensor, dy: Tensor, columns: int) -> Tensor:
    return dy.new_empty(dy.shape[-1], columns, dtype=compute_dtype(dy.dtype))


launch.on_cuda(_weight_grad, weight_grad_triton)


def weight_grad(blocks: Blocks, dy: Tensor, grid: Grid) -> Tensor:
    """dW = dY^T x~ [O, C] from the kept blocks and dy [..., O] of any strides. fp32 sums and result, fp64 for fp64."""
    if launch.on_gpu(blocks.values):
        return launch.way(_weight_grad, blocks.values)(*blocks, dy, grid.columns)
    return weight_grad_reference(blocks, as_matrix(dy), grid)
