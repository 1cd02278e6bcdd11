"""Max-pooling that keeps the offset of each maximum within its window: one byte per output.

Stock PyTorch keeps an int64 index per output, 8 bytes, and the input. The offset and the geometry say the same, so the gradient is exact.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.layout import dense_as, is_channels_last
from actpress.kernels.max_pool.launchers import (
    CONFIGS,
    Window,
    empty,
    empty_outputs,
    max_pool2d_backward_bytes,
    max_pool2d_backward_triton,
    max_pool2d_bytes,
    max_pool2d_triton,
    offset_dtype,
)


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


@torch.library.custom_op("actpress::max_pool2d", mutates_args=())
def _max_pool2d(x: Tensor, geometry: Sequence[int], ceil_mode: bool, channels_last: bool) -> tuple[Tensor, Tensor]:
    return max_pool2d_reference(dense_as(x, channels_last), _window(geometry), ceil_mode)


@_max_pool2d.register_fake
def _(x: Tensor, geometry: Sequence[int], ceil_mode: bool, channels_last: bool) -> tuple[Tensor, Tensor]:
    return empty_outputs(dense_as(x, channels_last), _window(geometry), ceil_mode)


launch.on_cuda(
    _max_pool2d,
    lambda x, geometry, ceil_mode, channels_last: max_pool2d_triton(
        dense_as(x, channels_last), _window(geometry), ceil_mode
    ),
)


@torch.library.custom_op("actpress::max_pool2d_backward", mutates_args=())
def _max_pool2d_backward(
    dy: Tensor, offset: Tensor, shape: Sequence[int], geometry: Sequence[int], channels_last: bool
) -> Tensor:
    return max_pool2d_backward_reference(dy, offset, shape, _window(geometry), channels_last)


@_max_pool2d_backward.register_fake
def _(dy: Tensor, offset: Tensor, shape: Sequence[int], geometry: Sequence[int], channels_last: bool) -> Tensor:
    return empty(shape, dy, channels_last)


launch.on_cuda(
    _max_pool2d_backward,
    lambda dy, offset, shape, geometry, channels_last: max_pool2d_backward_triton(
        dy, offset, shape, _window(geometry), channels_last
    ),
)


def _geometry(window: Window) -> list[int]:
    """A window as the registered operations take it."""
    return [size for pair in window for size in pair]


def _window(geometry: Sequence[int]) -> Window:
    return Window(*zip(geometry[::2], geometry[1::2], strict=True))


def max_pool2d(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] or [C, H, W], of any strides and floating dtype -> (y, offset) [N, C, h, w].

    y is what F.max_pool2d returns, in its memory format; offset says where in its window each maximum is, row-major: uint8, int32 for
    windows of more than 256 elements. Raises what F.max_pool2d raises.
    """
    if launch.on_gpu(x):
        return launch.way(_max_pool2d, x)(x, _geometry(window), ceil_mode, is_channels_last(x))
    return max_pool2d_reference(x, window, ceil_mode)


def max_pool2d_backward(
    dy: Tensor, offset: Tensor, input_shape: Sequence[int], window: Window, channels_last: bool
) -> Tensor:
    """dy [N, C, h, w] of any strides and the offsets of the forward pass -> dx of `input_shape`, channels_last or contiguous."""
    if launch.on_gpu(dy):
        return launch.way(_max_pool2d_backward, dy)(dy, offset, input_shape, _geometry(window), channels_last)
    return max_pool2d_backward_reference(dy, offset, input_shape, window, channels_last)


def cases() -> list[launch.Case]:
    """ResNet-50's max-pooling at batch 64, 64 x 64 x 112 x 112, 3x3 with stride 2 and padding 1, in both memory formats; and one whose
    window has so many elements that kernels loop over them and offsets are int32."""
    resnet, large = Window((3, 3), (2, 2), (1, 1), (1, 1)), Window((17, 17), (17, 17), (0, 0), (1, 1))

    def forward(
        window: Window, memory_format: torch.memory_format, *shape: int
    ) -> Callable[[torch.dtype, str], tuple[Tensor, Window, bool]]:
        def make(dtype: torch.dtype, device: str) -> tuple[Tensor, Window, bool]:
            x = torch.randn(shape, dtype=dtype, device=device)
            return x.to(memory_format=memory_format), window, False

        return make

    def backward(
        window: Window, memory_format: torch.memory_format, *shape: int
    ) -> Callable[[torch.dtype, str], tuple[Tensor, Tensor, tuple[int, ...], Window, bool]]:
        def make(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, tuple[int, ...], Window, bool]:
            y, offset = max_pool2d_reference(*forward(window, memory_format, *shape)(dtype, device))
            return torch.randn_like(y), offset, shape, window, memory_format == torch.channels_last

        return make

    def stock(x: Tensor, window: Window, ceil_mode: bool) -> tuple[Tensor, Tensor]:
        return F.max_pool2d(x, *window, ceil_mode, return_indices=True)

    def floor(x: Tensor, window: Window, ceil_mode: bool) -> int:
        return launch.nbytes(x, *empty_outputs(x.to("meta"), window, ceil_mode))

    def floor_backward(dy: Tensor, offset: Tensor, shape: Sequence[int], *rest: object) -> int:
        return launch.nbytes(dy, offset) + math.prod(shape) * dy.itemsize

    def both(
        suffix: str, real: tuple, tiny: tuple, configs: tuple[launch.Config, ...] = CONFIGS
    ) -> tuple[launch.Case, launch.Case]:
        return (
            launch.Case(
                f"max_pool2d{suffix}",
                forward(*real),
                max_pool2d_triton,
                max_pool2d_reference,
                max_pool2d_bytes,
                floor,
                configs,
                stock=stock,
                tiny=forward(*tiny),
            ),
            launch.Case(
                f"max_pool2d_backward{suffix}",
                backward(*real),
                max_pool2d_backward_triton,
                max_pool2d_backward_reference,
                max_pool2d_backward_bytes,
                floor_backward,
                configs,
                tolerance=2**-8,  # the reference rounds up to three times more, to bf16 too
                tiny=backward(*tiny),
            ),
        )

    nchw, nhwc = torch.contiguous_format, torch.channels_last
    return [
        *both("", (resnet, nchw, 64, 64, 112, 112), (resnet, nchw, 2, 3, 9, 8)),
        *both("_channels_last", (resnet, nhwc, 64, 64, 112, 112), (resnet, nhwc, 2, 3, 9, 8)),
        *both("_large_window", (large, nchw, 64, 128, 68, 68), (large, nchw, 1, 1, 17, 35), CONFIGS[:1]),
    ]
