"""Masks of one bit per element, and ReLU: the layout and the plain PyTorch reference.

A packed mask lies in the memory order of its tensor: channels_last or row-major. Whoever unpacks it says which (`channels_last`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from actpress.kernels.common.bits import pack, unpack
from actpress.kernels.common.layout import dense_as, is_channels_last


def pack_mask_reference(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(numel / 8)], in the tensor's memory order."""
    return pack(mask.permute(0, 2, 3, 1) if is_channels_last(mask) else mask, bits=1)


def unpack_mask_reference(packed: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The inverse: bool of `shape`, in the memory format of the packed mask."""
    mask = unpack(packed, 1, math.prod(shape)) != 0  # a view as bool does not compile for the CPU in torch 2.14
    if channels_last:
        n, c, h, w = shape
        return mask.view(n, h, w, c).permute(0, 3, 1, 2)
    return mask.view(shape)


def relu_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape -> (relu(x), packed mask of x > 0). NaN passes forward; its gradient is zero, where PyTorch would let it pass."""
    y = x.relu()
    return y, pack_mask_reference(y > 0)


def relu_inplace_reference(x: Tensor, channels_last: bool) -> Tensor:
    """x becomes relu(x); returns the packed mask, in channels_last order or not."""
    return pack_mask_reference(dense_as(x.relu_() > 0, channels_last))


def relu_backward_reference(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """dx = dy where the mask is set, else 0. On a CPU, PyTorch's gradient of ReLU is ten times as fast as `torch.where`."""
    mask = unpack_mask_reference(packed, dy.shape, channels_last)
    return torch.ops.aten.threshold_backward(dy, mask.to(dy.dtype), 0)
