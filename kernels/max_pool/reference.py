"""Max-pooling that saves the offset of each maximum within its window: geometry, layout and the plain PyTorch reference."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.layout import dense_as, empty, is_channels_last


class Window(NamedTuple):
    """Geometry of 2-d pooling, each a pair (rows, columns)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def offset_dtype(window: Window) -> torch.dtype:
    """uint8, int32 for windows of more than 256 elements."""
    return torch.uint8 if window.kernel[0] * window.kernel[1] <= 256 else torch.int32


def max_pool2d_reference(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] or [C, H, W] -> (the maxima [N, C, h, w], their offsets, see window_offset_reference).

    As in PyTorch the first maximum wins, in row-major order, and the last NaN if there is one; padding never does.
    """
    y, index = F.max_pool2d(x, *window, ceil_mode, return_indices=True)
    return y, window_offset_reference(index, x.shape[-1], window)


def max_pool2d_backward_reference(
    dy: Tensor, offset: Tensor, shape: Sequence[int], window: Window, channels_last: bool
) -> Tensor:
    """dy and offset [N, C, h, w] -> dx of `shape`: each pixel gets the sum of dy over the windows whose maximum it was."""
    index = window_index_reference(offset, shape[-1], window)
    x = dy.new_empty(()).expand(shape)  # only its shape is read
    whole = tuple(
        (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, padding, dilation in zip(shape[-2:], *window, strict=True)
    )
    ceil_mode = tuple(offset.shape[-2:]) != whole
    return dense_as(torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *window, ceil_mode, index), channels_last)


def window_offset_reference(index: Tensor, width: int, window: Window) -> Tensor:
    """Index of each maximum in its input map (int64 [N, C, h, w], row * width + column) -> offset in its window,
    uint8 (int32 for windows of more than 256 elements)."""
    top, left = _window_corner(index, window)
    row = (index // width - top) // window.dilation[0]
    column = (index % width - left) // window.dilation[1]
    offset = row * window.kernel[1] + column
    return offset.to(offset_dtype(window))


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


def empty_outputs(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised (y, offset) in the memory order of x, of the shape that PyTorch gives them. What PyTorch refuses raises its error."""
    return outputs_of_shape(x, shape_of(x.shape, window, ceil_mode), window)


def outputs_of_shape(x: Tensor, shape: torch.Size, window: Window) -> tuple[Tensor, Tensor]:
    """Uninitialised (y, offset) of `shape`, in the memory order of x."""
    y = empty(shape, x.dtype, x.device, is_channels_last(x))
    return y, torch.empty_like(y, dtype=offset_dtype(window))


def shape_of(shape: Sequence[int], window: Window, ceil_mode: bool) -> torch.Size:
    """Shape of the maxima of x of `shape`."""
    return F.max_pool2d(torch.empty(shape, device="meta"), *window, ceil_mode).shape
