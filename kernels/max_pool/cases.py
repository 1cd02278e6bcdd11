"""Max-pooling that saves the offset of each maximum: cases that are proven and timed, and the bytes that they move."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.max_pool.reference import (
    Window,
    empty_outputs,
    max_pool2d_backward_reference,
    max_pool2d_reference,
)
from actpress.kernels.max_pool.triton import (
    CONFIGS,
    backward_tiling,
    forward_tiling,
    max_pool2d_backward_triton,
    max_pool2d_triton,
    visits_of,
)


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


def _lines_read(count: int, lines: int, tile: int, size: int, met: Callable[[Tensor], Tensor]) -> int:
    """Lines (rows or columns) of the input that are read over `count` maps; a line that two tiles read counts twice.

    A map has `lines` lines of outputs, `tile` of them a tile, and `size` lines of inputs. met(line [n, 1]) -> the lines of inputs that
    these outputs need [n, m], some of which may not exist.
    """
    line = torch.arange(count * lines, device="cpu")[:, None]
    other = met(line % lines)
    read = line // tile * (count * size) + line // lines * size + other
    return read[(other >= 0) & (other < size)].unique().numel()


def max_pool2d_bytes(x: Tensor, window: Window, ceil_mode: bool, config: launch.Config = CONFIGS[0]) -> int:
    """Bytes that max_pool2d_triton moves: pixels that windows of two tiles cover are read twice."""
    y, offset = empty_outputs(x.to("meta"), window, ceil_mode)
    tiling = forward_tiling(x, *y.shape[-2:], config)

    def met(axis: int) -> Callable[[Tensor], Tensor]:
        k, s, p, d = (pair[axis] for pair in window)
        return lambda line: line * s - p + d * torch.arange(k, device="cpu")

    rows = _lines_read(tiling.maps, tiling.height, tiling.tile[0], x.shape[-2], met(0))
    columns = _lines_read(1, tiling.width, tiling.tile[1], x.shape[-1], met(1))
    return rows * columns * tiling.channels * x.itemsize + launch.nbytes(y, offset)


def max_pool2d_backward_bytes(
    dy: Tensor,
    offset: Tensor,
    shape: Sequence[int],
    window: Window,
    channels_last: bool,
    config: launch.Config = CONFIGS[0],
) -> int:
    """Bytes that max_pool2d_backward_triton moves: windows that cover pixels of two tiles are read twice."""
    tiling = backward_tiling(shape, window, channels_last, dy.itemsize, config)
    windows = [range(first, first + count) for first, count in zip(*visits_of(window), strict=True)]
    k, s, p, d = (pair[0] for pair in window)
    covering = [v for v in windows[0] if any(a + p - v * s in range(0, k * d, d) for a in range(s))]
    per_cell = window.stride[1] // tiling.tile[2]
    rows = _lines_read(
        tiling.maps, tiling.height, tiling.tile[0], dy.shape[-2], lambda row: row + torch.tensor(covering)
    )
    columns = _lines_read(
        1, tiling.width, tiling.tile[1], dy.shape[-1], lambda cell: cell // per_cell + torch.tensor(list(windows[1]))
    )
    return rows * columns * tiling.channels * (dy.itemsize + offset.itemsize) + math.prod(shape) * dy.itemsize
