"""The public operations of Few-Bit activations: CUDA tensors take the kernels, all others the references."""

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import dense_as
from actpress.kernels.few_bit.reference import encode_reference, forward_reference, input_grad_reference
from actpress.kernels.few_bit.triton import empty_code, encode_triton, forward_triton, input_grad_triton


def _input_grad_in_order(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    """`input_grad_reference`, in the memory order that the kernel returns."""
    return dense_as(input_grad_reference(dy, code, function, bits, channels_last), channels_last)


_encode = launch.operation(
    "few_bit_encode",
    encode_reference,
    encode_triton,
    lambda x, function, bits: empty_code(x, bits),
    in_order=["x"],
)
_forward = launch.operation(
    "few_bit_forward",
    forward_reference,
    forward_triton,
    lambda x, function, bits: (torch.empty_like(x), empty_code(x, bits)),
    in_order=["x"],
)
_input_grad = launch.operation(
    "few_bit_input_grad",
    _input_grad_in_order,
    input_grad_triton,
    lambda dy, code, function, bits, channels_last: torch.empty_like(dy),
    in_order=["dy"],
)


def encode(x: Tensor, function: str, bits: int) -> Tensor:
    """The code of x of any shape, strides and floating dtype: uint8 [code_bytes].

    It is in channels_last order if x is, in row-major order otherwise.
    """
    return _encode(x, function, bits)


def forward(x: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    """(function(x), encode(x)) from one read of x. On a GPU y may differ from stock's, see inverted.triton.forward_triton."""
    return _forward(x, function, bits)


def input_grad(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    """dx = dy * levels[code], in dy's dtype. dy has any strides and floating dtype.

    channels_last: whether the code is in channels_last order. dx is in the order of the code on a GPU, contiguous on a CPU.
    """
    run = _input_grad if launch.on_gpu(dy) else input_grad_reference
    return run(dy, code, function, bits, channels_last)
