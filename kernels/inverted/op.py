"""The public operations of inverted activations: CUDA tensors take the kernels, all others the references."""

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.common.layout import dense_as, is_channels_last
from actpress.kernels.inverted.reference import (
    forward_reference,
    input_grad_from_bits_reference,
    left_bits_reference,
)
from actpress.kernels.inverted.triton import forward_triton, input_grad_triton, left_bits_triton


@torch.library.custom_op("actpress::inverted_left_bits", mutates_args=())
def _left_bits(x: Tensor, function: str, channels_last: bool) -> Tensor:
    return left_bits_reference(dense_as(x, channels_last), function)


@_left_bits.register_fake
def _(x: Tensor, function: str, channels_last: bool) -> Tensor:
    return x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)


launch.on_cuda(_left_bits, lambda x, function, channels_last: left_bits_triton(dense_as(x, channels_last), function))


@torch.library.custom_op("actpress::inverted_forward", mutates_args=())
def _forward(x: Tensor, function: str, channels_last: bool) -> tuple[Tensor, Tensor]:
    return forward_reference(dense_as(x, channels_last), function)


@_forward.register_fake
def _(x: Tensor, function: str, channels_last: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_as(x, channels_last)), x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)


launch.on_cuda(_forward, lambda x, function, channels_last: forward_triton(dense_as(x, channels_last), function))


@torch.library.custom_op("actpress::inverted_input_grad", mutates_args=())
def _input_grad(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    dy, y = dense_as(dy, channels_last), dense_as(y, channels_last)
    return input_grad_from_bits_reference(dy, y, packed, function, channels_last)


@_input_grad.register_fake
def _(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_input_grad, input_grad_triton)


def left_bits(x: Tensor, function: str) -> Tensor:
    """x of any shape, strides and floating dtype -> is it left of the minimum of `function`? One bit per element, uint8 [ceil(numel / 8)],
    in the order of dense(x): channels_last where x is."""
    if launch.on_gpu(x):
        return launch.way(_left_bits, x)(x, function, is_channels_last(x))
    return left_bits_reference(x, function)


def forward(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """(function(x), left_bits(x)) from one read of x. On a GPU y may differ from stock's, see `forward_triton`."""
    if launch.on_gpu(x):
        return launch.way(_forward, x)(x, function, is_channels_last(x))
    return forward_reference(x, function)


def input_grad(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    """dx = dy * d(y, bit), in dy's dtype. dy, y: any strides and floating dtypes, of which both or neither fp64; packed: what `left_bits`
    found, and whether it lies in channels_last order."""
    run = launch.way(_input_grad, dy) if launch.on_gpu(dy) else input_grad_from_bits_reference
    return run(dy, y, packed, function, channels_last)
