"""One bit per element: masks, and ReLU, which needs no more for its gradient.

Stock PyTorch keeps the output of ReLU, 4 bytes per element in fp32; whether it is above zero takes 1/8 byte and is exact.

A packed mask lies in the memory order of its tensor where that is channels_last, in row-major order otherwise; whoever unpacks it says
which (`channels_last`). The registered operations are told when packing too: compiled code may hand them a tensor in another memory
format than the traced one, which the decision was taken from.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import pack, pack8, packed_bytes, unpack
from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.layout import dense, dense_as, is_channels_last


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
    """x of any shape -> (relu(x), packed mask of what is above zero). NaN passes forward; PyTorch would let its gradient pass too."""
    y = x.relu()
    return y, pack_mask_reference(y > 0)


def relu_inplace_reference(x: Tensor, channels_last: bool) -> Tensor:
    """x becomes relu(x); returns the packed mask, in channels_last order or not."""
    return pack_mask_reference(dense_as(x.relu_() > 0, channels_last))


def relu_backward_reference(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """dx = dy where the mask is set, else 0. PyTorch's own gradient of ReLU on a CPU is ten times as fast as `torch.where` on a mask."""
    mask = unpack_mask_reference(packed, dy.shape, channels_last)
    return torch.ops.aten.threshold_backward(dy, mask.to(dy.dtype), 0)


CONFIGS: tuple[launch.Config, ...] = (
    {"GROUPS": 256, "num_warps": 4},
    {"GROUPS": 128, "num_warps": 4},
    {"GROUPS": 512, "num_warps": 8},
)


@triton.jit
def tile(count, GROUPS: tl.constexpr):
    """This program's share of `count` elements: (its first group of eight, its elements [8 * GROUPS] counted from there, which of them
    exist, its groups [GROUPS], which exist). Only the first is 64-bit."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    left = tl.minimum(count - first * 8, GROUPS * 8).to(tl.int32)
    element, group = tl.arange(0, GROUPS * 8), tl.arange(0, GROUPS)
    return first, element, element < left, group, group < (left + 7) // 8


@triton.jit
def load_mask(packed_ptr, element, exists):
    """The bits of these elements as int32 0 or 1. Each thread loads the bytes it needs: those of neighbours come from the same line."""
    packed = tl.load(packed_ptr + element // 8, mask=exists, other=0)
    return (packed.to(tl.int32) >> (element % 8)) & 1


@triton.jit
def _pack(bits, GROUPS: tl.constexpr):
    """0 or 1, [8 * GROUPS] -> uint8 [GROUPS]."""
    return tl.reshape(pack8(tl.reshape(bits.to(tl.int32), [GROUPS, 8]), 1), [GROUPS])


@triton.jit
def _pack_mask_kernel(mask_ptr, packed_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, group, group_exists = tile(count, GROUPS)
    mask = tl.load(mask_ptr + first * 8 + element, mask=exists, other=0)
    tl.store(packed_ptr + first + group, _pack(mask, GROUPS), mask=group_exists)


@triton.jit
def _unpack_mask_kernel(packed_ptr, mask_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, _, _ = tile(count, GROUPS)
    mask = load_mask(packed_ptr + first, element, exists)
    tl.store(mask_ptr + first * 8 + element, mask.to(tl.uint8), mask=exists)


@triton.jit
def _relu_kernel(x_ptr, y_ptr, packed_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, group, group_exists = tile(count, GROUPS)
    x = tl.load(x_ptr + first * 8 + element, mask=exists, other=0.0)
    tl.store(y_ptr + first * 8 + element, tl.where(x <= 0, 0.0, x), mask=exists)  # NaN stays
    tl.store(packed_ptr + first + group, _pack(x > 0, GROUPS), mask=group_exists)


@triton.jit
def _relu_backward_kernel(dy_ptr, packed_ptr, dx_ptr, count, GROUPS: tl.constexpr):
    first, element, exists, _, _ = tile(count, GROUPS)
    keep = load_mask(packed_ptr + first, element, exists)
    dy = tl.load(dy_ptr + first * 8 + element, mask=exists, other=0.0)
    tl.store(dx_ptr + first * 8 + element, tl.where(keep != 0, dy, 0.0), mask=exists)


def grid_of(x: Tensor, config: launch.Config) -> tuple[int]:
    """One program for each `tile` of x."""
    return (-(-x.numel() // (8 * config["GROUPS"])),)


def empty_packed(x: Tensor) -> Tensor:
    """Room for the packed mask of x."""
    return torch.empty(packed_bytes(x.numel(), 1), dtype=torch.uint8, device=x.device)


def _empty_mask(packed: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=torch.bool, device=packed.device, memory_format=memory_format)


def pack_mask_triton(mask: Tensor, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`pack_mask_reference` in one pass; equal bit for bit."""
    mask = dense(mask)
    packed = empty_packed(mask)
    launch.run(_pack_mask_kernel, grid_of(mask, config), mask.view(torch.uint8), packed, mask.numel(), **config)
    return packed


def unpack_mask_triton(
    packed: Tensor, shape: Sequence[int], channels_last: bool, config: launch.Config = CONFIGS[0]
) -> Tensor:
    """`unpack_mask_reference` in one pass; equal bit for bit."""
    mask = _empty_mask(packed, shape, channels_last)
    launch.run(_unpack_mask_kernel, grid_of(mask, config), packed, mask.view(torch.uint8), mask.numel(), **config)
    return mask


def relu_triton(x: Tensor, config: launch.Config = CONFIGS[0]) -> tuple[Tensor, Tensor]:
    """`relu_reference` in one pass; equal bit for bit."""
    x = dense(x)
    y, packed = torch.empty_like(x), empty_packed(x)
    launch.run(_relu_kernel, grid_of(x, config), x, y, packed, x.numel(), **config)
    return y, packed


def relu_inplace_triton(x: Tensor, channels_last: bool, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`relu_inplace_reference` in one pass; equal bit for bit. Other strides than `channels_last` says take a copy there and back."""
    y, packed = dense_as(x, channels_last), empty_packed(x)
    launch.run(_relu_kernel, grid_of(x, config), y, y, packed, x.numel(), **config)
    if y is not x:
        x.copy_(y)
    return packed


def relu_backward_triton(dy: Tensor, packed: Tensor, channels_last: bool, config: launch.Config = CONFIGS[0]) -> Tensor:
    """`relu_backward_reference` in one pass; equal bit for bit."""
    dy = dense_as(dy, channels_last)
    dx = torch.empty_like(dy)
    launch.run(_relu_backward_kernel, grid_of(dy, config), dy, packed, dx, dy.numel(), **config)
    return dx


@torch.library.custom_op("actpress::pack_mask", mutates_args=())
def _pack_mask(mask: Tensor, channels_last: bool) -> Tensor:
    return pack_mask_reference(dense_as(mask, channels_last))


@_pack_mask.register_fake
def _(mask: Tensor, channels_last: bool) -> Tensor:
    return empty_packed(mask)


launch.on_cuda(_pack_mask, lambda mask, channels_last: pack_mask_triton(dense_as(mask, channels_last)))


@torch.library.custom_op("actpress::unpack_mask", mutates_args=())
def _unpack_mask(packed: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return unpack_mask_reference(packed, shape, channels_last)


@_unpack_mask.register_fake
def _(packed: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    return _empty_mask(packed, shape, channels_last)


launch.on_cuda(_unpack_mask, unpack_mask_triton)


@torch.library.custom_op("actpress::relu", mutates_args=())
def _relu(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    return relu_reference(dense_as(x, channels_last))


@_relu.register_fake
def _(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense_as(x, channels_last)), empty_packed(x)


launch.on_cuda(_relu, lambda x, channels_last: relu_triton(dense_as(x, channels_last)))


@torch.library.custom_op("actpress::relu_", mutates_args=("x",))
def _relu_inplace(x: Tensor, channels_last: bool) -> Tensor:
    return relu_inplace_reference(x, channels_last)


@_relu_inplace.register_fake
def _(x: Tensor, channels_last: bool) -> Tensor:
    return empty_packed(x)


launch.on_cuda(_relu_inplace, relu_inplace_triton)


@torch.library.custom_op("actpress::relu_backward", mutates_args=())
def _relu_backward(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    return relu_backward_reference(dense_as(dy, channels_last), packed, channels_last)


@_relu_backward.register_fake
def _(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    return torch.empty_like(dense_as(dy, channels_last))


launch.on_cuda(_relu_backward, relu_backward_triton)


def pack_mask(mask: Tensor) -> Tensor:
    """bool of any shape and strides -> uint8 [ceil(numel / 8)], in memory order if channels_last, row-major otherwise."""
    if launch.on_gpu(mask):
        return launch.way(_pack_mask, mask)(mask, is_channels_last(mask))
    return pack_mask_reference(mask)


def unpack_mask(packed: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The inverse of pack_mask: bool of `shape`, channels_last or contiguous."""
    run = launch.way(_unpack_mask, packed) if launch.on_gpu(packed) else unpack_mask_reference
    return run(packed, shape, channels_last)


def relu(x: Tensor) -> tuple[Tensor, Tensor]:
    """x of any shape, strides and floating dtype -> (relu(x), its mask, uint8 [ceil(numel / 8)], in y's memory order)."""
    return launch.way(_relu, x)(x, is_channels_last(x)) if launch.on_gpu(x) else relu_reference(x)


def relu_(x: Tensor) -> Tensor:
    """x of any shape, strides and floating dtype becomes relu(x); returns its mask, uint8 [ceil(numel / 8)], in x's memory order if
    x is channels_last, row-major otherwise."""
    run = launch.way(_relu_inplace, x) if launch.on_gpu(x) else relu_inplace_reference
    packed = run(x, is_channels_last(x))
    if run is relu_inplace_triton and not x.is_inference():
        torch.autograd.graph.increment_version(x)  # as an operation that changes x does
    return packed


def relu_backward(dy: Tensor, packed: Tensor, channels_last: bool) -> Tensor:
    """dy of any strides, the packed mask and whether it lies in channels_last order -> dx."""
    run = launch.way(_relu_backward, dy) if launch.on_gpu(dy) else relu_backward_reference
    return run(dy, packed, channels_last)


def cases() -> list[launch.Case]:
    """ReLU on a ResNet-50 activation at batch 64, 64 x 256 x 56 x 56; a mask of the hidden layer of ViT-B at batch 256."""

    def inputs(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensor]]:
        return lambda dtype, device: (torch.randn(shape, dtype=dtype, device=device),)

    def inputs_inplace(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensor, bool]]:
        return lambda dtype, device: (torch.randn(shape, dtype=dtype, device=device), False)

    def inputs_backward(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensor, Tensor, bool]]:
        return lambda dtype, device: (torch.randn(shape, dtype=dtype, device=device), bytes_for(shape, device), False)

    def mask(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensor]]:
        return lambda dtype, device: (torch.randint(2, shape, device=device).to(dtype),)

    def packed(*shape: int) -> Callable[[torch.dtype, str], tuple[Tensor, tuple[int, ...], bool]]:
        return lambda dtype, device: (bytes_for(shape, device), shape, False)

    def bytes_for(shape: tuple[int, ...], device: str) -> Tensor:
        return torch.randint(256, (packed_bytes(math.prod(shape), 1),), dtype=torch.uint8, device=device)

    def moved(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + packed_bytes(x.numel(), 1)

    def moved_mask(mask: Tensor) -> int:
        return mask.numel() + packed_bytes(mask.numel(), 1)

    def moved_packed(packed: Tensor, shape: tuple[int, ...], channels_last: bool) -> int:
        return launch.nbytes(packed) + math.prod(shape)

    def case(name: str, make: Callable, kernel: Callable, reference: Callable, bytes_: Callable, **more) -> launch.Case:
        tiny = make(3, 5, 7, 9)
        return launch.Case(name, make(*more.pop("size")), kernel, reference, bytes_, bytes_, CONFIGS, tiny=tiny, **more)

    resnet, vit, bools = (64, 256, 56, 56), (256, 197, 3072), (torch.bool,)
    return [
        case("relu", inputs, relu_triton, relu_reference, moved, size=resnet, stock=torch.relu),
        case(
            "relu_",
            inputs_inplace,
            relu_inplace_triton,
            relu_inplace_reference,
            moved,
            size=resnet,
            stock=lambda x, _: x.relu_(),
        ),
        case("relu_backward", inputs_backward, relu_backward_triton, relu_backward_reference, moved, size=resnet),
        case("pack_mask", mask, pack_mask_triton, pack_mask_reference, moved_mask, size=vit, dtypes=bools),
        case("unpack_mask", packed, unpack_mask_triton, unpack_mask_reference, moved_packed, size=vit, dtypes=bools),
    ]
