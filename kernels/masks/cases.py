"""Masks of one bit per element, and ReLU: cases that are proven and timed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.masks.reference import (
    pack_mask_reference,
    relu_backward_reference,
    relu_inplace_reference,
    relu_reference,
    unpack_mask_reference,
)
from actpress.kernels.masks.triton import (
    CONFIGS,
    pack_mask_triton,
    relu_backward_triton,
    relu_inplace_triton,
    relu_triton,
    unpack_mask_triton,
)


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
