"""The public operations of Few-Bit activations: CUDA tensors take the kernels, all others the references."""

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import dense, dense_as, is_channels_last
from actpress.kernels.few_bit.reference import encode_reference, forward_reference, input_grad_reference
from actpress.kernels.few_bit.triton import _new_code, encode_triton, forward_triton, input_grad_triton


@torch.library.custom_op("actpress::few_bit_encode", mutates_args=())
def _encode(x: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return encode_reference(dense_as(x, channels_last), function, bits)[0]


@_encode.register_fake
def _(x: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return _new_code(x, bits)


launch.on_cuda(
    _encode, lambda x, function, bits, channels_last: encode_triton(dense_as(x, channels_last), function, bits)
)


@torch.library.custom_op("actpress::few_bit_forward", mutates_args=())
def _forward(x: Tensor, function: str, bits: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    return forward_reference(dense_as(x, channels_last), function, bits)


@_forward.register_fake
def _(x: Tensor, function: str, bits: int, channels_last: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_as(x, channels_last)), _new_code(x, bits)


launch.on_cuda(
    _forward, lambda x, function, bits, channels_last: forward_triton(dense_as(x, channels_last), function, bits)
)


@torch.library.custom_op("actpress::few_bit_input_grad", mutates_args=())
def _input_grad(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return dense_as(input_grad_reference(dy, code, function, bits, channels_last), channels_last)


@_input_grad.register_fake
def _(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_input_grad, input_grad_triton)


def encode(x: Tensor, function: str, bits: int) -> Tensor:
    """x of any shape, strides and floating dtype -> its code, uint8 [code_bytes], in the order of dense(x): channels_last where x
    is."""
    if launch.on_gpu(x):
        return launch.way(_encode, x)(x, function, bits, is_channels_last(x))
    return encode_reference(dense(x), function, bits)[0]


def forward(x: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    """(function(x), encode(x)) from one read of x. On a GPU y may differ from stock's, see inverted.forward_triton."""
    if launch.on_gpu(x):
        return launch.way(_forward, x)(x, function, bits, is_channels_last(x))
    return forward_reference(x, function, bits)


def input_grad(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    """dx = dy * levels[code]: dy of any strides and floating dtype, the code and whether it lies in channels_last order."""
    run = launch.way(_input_grad, dy) if launch.on_gpu(dy) else input_grad_reference
    return run(dy, code, function, bits, channels_last)
