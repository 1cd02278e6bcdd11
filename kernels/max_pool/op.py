"""Max-pooling that saves the offset of each maximum: registered operations and public functions."""

from collections.abc import Sequence

from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import empty
from actpress.kernels.max_pool.reference import (
    Window,
    empty_outputs,
    max_pool2d_backward_reference,
    max_pool2d_reference,
)
from actpress.kernels.max_pool.triton import max_pool2d_backward_triton, max_pool2d_triton


def _geometry(window: Window) -> list[int]:
    """A window as the registered operations take it: rows and columns in turn."""
    return [size for pair in window for size in pair]


def _window(geometry: Sequence[int]) -> Window:
    return Window(*zip(geometry[::2], geometry[1::2], strict=True))


def _forward(x: Tensor, geometry: Sequence[int], ceil_mode: bool) -> tuple[Tensor, Tensor]:
    return max_pool2d_reference(x, _window(geometry), ceil_mode)


def _backward(dy: Tensor, offset: Tensor, shape: Sequence[int], geometry: Sequence[int], channels_last: bool) -> Tensor:
    return max_pool2d_backward_reference(dy, offset, shape, _window(geometry), channels_last)


_max_pool2d = launch.operation(
    "max_pool2d",
    _forward,
    lambda x, geometry, ceil_mode: max_pool2d_triton(x, _window(geometry), ceil_mode),
    lambda x, geometry, ceil_mode: empty_outputs(x, _window(geometry), ceil_mode),
    in_order=["x"],
)
_max_pool2d_backward = launch.operation(
    "max_pool2d_backward",
    _backward,
    lambda dy, offset, shape, geometry, channels_last: max_pool2d_backward_triton(
        dy, offset, shape, _window(geometry), channels_last
    ),
    lambda dy, offset, shape, geometry, channels_last: empty(shape, dy.dtype, dy.device, channels_last),
)


def max_pool2d(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] or [C, H, W], of any strides and floating dtype -> (y, offset) [N, C, h, w].

    y is what F.max_pool2d returns, in its memory format; offset says where in its window each maximum is, row-major: uint8, int32 for
    windows of more than 256 elements. Raises what F.max_pool2d raises.
    """
    if launch.on_gpu(x):
        return _max_pool2d(x, _geometry(window), ceil_mode)
    return max_pool2d_reference(x, window, ceil_mode)


def max_pool2d_backward(
    dy: Tensor, offset: Tensor, input_shape: Sequence[int], window: Window, channels_last: bool
) -> Tensor:
    """dy [N, C, h, w] of any strides and the offsets of the forward pass -> dx of `input_shape`, channels_last or contiguous."""
    if launch.on_gpu(dy):
        return _max_pool2d_backward(dy, offset, input_shape, _geometry(window), channels_last)
    return max_pool2d_backward_reference(dy, offset, input_shape, window, channels_last)
