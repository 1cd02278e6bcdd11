"""Masks of one bit per element, and ReLU: registered operations and public functions."""

from collections.abc import Sequence

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import empty, is_channels_last
from actpress.kernels.masks.reference import (
    pack_mask_reference,
    relu_backward_reference,
    relu_inplace_reference,
    relu_reference,
    unpack_mask_reference,
)
from actpress.kernels.masks.triton import (
    empty_packed,
    pack_mask_triton,
    relu_backward_triton,
    relu_inplace_triton,
    relu_triton,
    unpack_mask_triton,
)

_pack_mask = launch.operation("pack_mask", pack_mask_reference, pack_mask_triton, empty_packed, in_order=["mask"])
_unpack_mask = launch.operation(
    "unpack_mask",
    unpack_mask_reference,
    unpack_mask_triton,
    lambda packed, shape, channels_last: empty(shape, torch.bool, packed.device, channels_last),
)
_relu = launch.operation(
    "relu", relu_reference, relu_triton, lambda x: (torch.empty_like(x), empty_packed(x)), in_order=["x"]
)
_relu_inplace = launch.operation(
    "relu_", relu_inplace_reference, relu_inplace_triton, lambda x, _: empty_packed(x), mutates=["x"]
)
_relu_backward = launch.operation(
    "relu_backward",
    relu_backward_reference,
    relu_backward_triton,
    lambda dy, packed, channels_last: torch.empty_like(dy),
    in_order=["dy"],
)


def pack_mask(mask: Tensor) -> Tensor:
    """bool of any shape and strides -> uint8 [ceil(numel / 8)], in memory order if channels_last, row-major otherwise."""
    return _pack_mask(mask)


def unpack_mask(packed: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The inverse of pack_mask: bool of `shape`, channels_last or contiguous."""
    return _unpack_mask(packed, shape, channels_last)


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape, strides and floating dtype -> (relu(x), its mask, uint8 [ceil(numel / 8)], in y's memory order)."""
    return _relu(x)


def relu_(x: Tensor) -> Tensor:
    """Change x of any shape, strides and floating dtype to relu(x) in place.

    Returns its mask, uint8 [ceil(numel / 8)], in x's memory order if x is channels_last, row-major otherwise.
    """
    return _relu_inplace(x, is_channels_last(x))


def relu_backward(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """dy of any strides, the packed mask and whether it lies in channels_last order -> dx."""
    return _relu_backward(dy, packed, channels_last)
