"""What element-wise and pooling layers need to remember: a bit per element, or an offset within a window.

ReLU and Dropout: one bit says whether the gradient passes. Max-pooling: stock PyTorch keeps an int64 index per output (8 bytes)
and the dense input; the offset of the maximum within its window says the same in one byte.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .bits import pack, unpack
from .layout import is_channels_last


def pack_mask_reference(mask: Tensor) -> Tensor:
    """bool of any shape -> uint8 [ceil(numel / 8)], in the tensor's memory order."""
    return pack(mask.permute(0, 2, 3, 1) if is_channels_last(mask) else mask, bits=1)


def unpack_mask_reference(packed: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The inverse: bool of `shape`, in the memory format of the packed mask."""
    mask = unpack(packed, 1, shape.numel()) != 0  # a view as bool does not compile for the CPU in torch 2.14
    if channels_last:
        n, c, h, w = shape
        return mask.view(n, h, w, c).permute(0, 3, 1, 2)
    return mask.view(shape)


class Window(NamedTuple):
    """Geometry of 2-d pooling, each a pair (rows, columns)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def window_offset_reference(index: Tensor, width: int, window: Window) -> Tensor:
    """Index of each maximum in its input map (int64 [N, C, h, w], row * width + column) -> offset in its window,
    uint8 (int32 for windows of more than 256 elements)."""
    top, left = _window_corner(index, window)
    row = (index // width - top) // window.dilation[0]
    column = (index % width - left) // window.dilation[1]
    offset = row * window.kernel[1] + column
    return offset.to(torch.uint8 if window.kernel[0] * window.kernel[1] <= 256 else torch.int32)


def window_index_reference(offset: Tensor, width: int, window: Window) -> Tensor:
    """The inverse: offset [N, C, h, w] -> int64 index in the input map."""
    offset = offset.long()
    top, left = _window_corner(offset, window)
    return (
        (top + offset // window.kernel[1] * window.dilation[0]) * width
        + left
        + offset % window.kernel[1] * window.dilation[1]
    )


def _window_corner(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Row [h, 1] and column [1, w] of the first input pixel of each window."""
    top = torch.arange(x.shape[-2], device=x.device)[:, None] * window.stride[0] - window.padding[0]
    left = torch.arange(x.shape[-1], device=x.device)[None, :] * window.stride[1] - window.padding[1]
    return top, left
