"""What element-wise and pooling layers need to remember: a bit per element, or an offset within a window.

ReLU and Dropout: one bit says whether the gradient passes. Max-pooling: stock PyTorch keeps an int64 index per output (8 bytes)
and the dense input; the offset of the maximum within its window says the same in one byte.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import launch
from .bits import pack, pack8, packed_bytes, unpack, unpack8
from .launch import tl, triton
from .layout import dense, dense_as, is_channels_last


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


def relu_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape -> (relu(x), packed mask of what is above zero). NaN passes forward, not backward, as in PyTorch."""
    y = x.relu()
    return y, pack_mask_reference(y > 0)


def relu_backward_reference(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """dx = dy where the mask is set, else 0."""
    return dy.masked_fill(~unpack_mask_reference(packed, dy.shape, channels_last), 0)


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


CONFIGS: tuple[launch.Config, ...] = (
    {"GROUPS": 256, "num_warps": 4},
    {"GROUPS": 128, "num_warps": 4},
    {"GROUPS": 512, "num_warps": 8},
)


@triton.jit
def _relu_kernel(x_ptr, y_ptr, packed_ptr, count, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]  # [GROUPS, 8]
    x = tl.load(x_ptr + element, mask=element < count, other=0.0)
    tl.store(y_ptr + element, tl.where(x <= 0, 0.0, x), mask=element < count)  # NaN stays
    packed = tl.reshape(pack8((x > 0).to(tl.int32), 1), [GROUPS])
    tl.store(packed_ptr + group, packed, mask=group * 8 < count)


@triton.jit
def _relu_backward_kernel(dy_ptr, packed_ptr, dx_ptr, count, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    element = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    packed = tl.load(packed_ptr + group, mask=group * 8 < count, other=0)
    dy = tl.load(dy_ptr + element, mask=element < count, other=0.0)
    dx = tl.where(unpack8(packed[:, None], 1) != 0, dy, 0.0)
    tl.store(dx_ptr + element, dx, mask=element < count)


def relu_triton(x: Tensor, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`relu_reference` in one pass; equal bit for bit."""
    x = dense(x)
    y, packed = torch.empty_like(x), x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)
    grid = (triton.cdiv(x.numel(), 8 * config["GROUPS"]),)
    launch.run(_relu_kernel, grid, x, y, packed, x.numel(), **config)
    return y, packed


def relu_backward_triton(dy: Tensor, packed: Tensor, channels_last: bool, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`relu_backward_reference` in one pass; equal bit for bit."""
    dy = dense_as(dy, channels_last)
    dx = torch.empty_like(dy)
    grid = (triton.cdiv(dy.numel(), 8 * config["GROUPS"]),)
    launch.run(_relu_backward_kernel, grid, dy, packed, dx, dy.numel(), **config)
    return dx


@torch.library.custom_op("actpress::relu", mutates_args=())
def _relu(x: Tensor) -> tuple[Tensor, Tensor]:
    return relu_reference(x)


@_relu.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(x)), x.new_empty(packed_bytes(x.numel(), 1), dtype=torch.uint8)


launch.on_cuda(_relu, relu_triton)


@torch.library.custom_op("actpress::relu_backward", mutates_args=())
def _relu_backward(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    return relu_backward_reference(dy, packed, channels_last)


@_relu_backward.register_fake
def _(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_relu_backward, relu_backward_triton)


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape, strides and floating dtype -> (relu(x), its mask, uint8 [ceil(numel / 8)], in y's memory order)."""
    return _relu(x) if launch.on_gpu(x) else relu_reference(x)


def relu_backward(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """dy of any strides, the packed mask and whether it lies in channels_last order -> dx."""
    return (
        _relu_backward(dy, packed, channels_last)
        if launch.on_gpu(dy)
        else relu_backward_reference(dy, packed, channels_last)
    )


def cases() -> list[launch.Case]:
    """A ResNet-50 activation at batch 64: 64 x 256 x 56 x 56."""

    def make(dtype: torch.dtype, device: str) -> tuple[Tensor]:
        return (torch.randn(64, 256, 56, 56, dtype=dtype, device=device),)

    def make_backward(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, bool]:
        (dy,) = make(dtype, device)
        return dy, torch.randint(256, (packed_bytes(dy.numel(), 1),), dtype=torch.uint8, device=device), False

    def bytes_of(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + packed_bytes(x.numel(), 1)

    return [
        launch.Case("relu", make, relu_triton, relu_reference, bytes_of, bytes_of, CONFIGS, stock=torch.relu),
        launch.Case(
            "relu_backward", make_backward, relu_backward_triton, relu_backward_reference, bytes_of, bytes_of, CONFIGS
        ),
    ]
