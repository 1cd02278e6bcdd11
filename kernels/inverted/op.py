"""The public operations of inverted activations: CUDA tensors take the kernels, all others the references."""

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.inverted.reference import (
    forward_reference,
    input_grad_from_bits_reference,
    left_bits_reference,
)
from actpress.kernels.inverted.triton import forward_triton, input_grad_triton, left_bits_triton
from actpress.kernels.masks.triton import empty_packed

_left_bits = launch.operation(
    "inverted_left_bits",
    left_bits_reference,
    left_bits_triton,
    lambda x, function: empty_packed(x),
    in_order=["x"],
)
_forward = launch.operation(
    "inverted_forward",
    forward_reference,
    forward_triton,
    lambda x, function: (torch.empty_like(x), empty_packed(x)),
    in_order=["x"],
)
_input_grad = launch.operation(
    "inverted_input_grad",
    input_grad_from_bits_reference,
    input_grad_triton,
    lambda dy, y, packed, function, channels_last: torch.empty_like(dy),
    in_order=["dy", "y"],
)


def left_bits(x: Tensor, function: str) -> Tensor:
    """Whether each x lies left of the minimum of `function`: one bit per element, uint8 [ceil(numel / 8)].

    x has any shape, strides and floating dtype. Bits are in channels_last order if x is, in row-major order otherwise.
    """
    return _left_bits(x, function)


def forward(x: Tensor, function: str) -> tuple[Tensor, Tensor]:
    """(function(x), left_bits(x)) from one read of x. On a GPU y may differ from stock's, see `forward_triton`."""
    return _forward(x, function)


def input_grad(dy: Tensor, y: Tensor, packed: Tensor, function: str, channels_last: bool) -> Tensor:
    """dx = dy * d(y, bit), in dy's dtype.

    dy, y: any strides and floating dtypes; both or neither fp64. packed: the result of `left_bits`. function: a key of FITS.
    channels_last: whether `packed` is in channels_last order.
    """
    return _input_grad(dy, y, packed, function, channels_last)
