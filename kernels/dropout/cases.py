"""Dropout with a mask of one bit per element: cases that are proven and timed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.common.noise import uniform_reference
from actpress.kernels.dropout.reference import (
    dropout_backward_reference,
    dropout_backward_regenerated_reference,
    dropout_reference,
)
from actpress.kernels.dropout.triton import (
    dropout_backward_regenerated_triton,
    dropout_backward_triton,
    dropout_triton,
)
from actpress.kernels.masks.triton import CONFIGS, grid_of


def cases() -> list[launch.Case]:
    """The hidden layer of ViT-B at batch 64: 64 x 197 x 3072."""
    p = 0.1

    def inputs(*shape: int) -> Callable[[torch.dtype, str], tuple]:
        return lambda dtype, device: (torch.randn(shape, dtype=dtype, device=device), p, seed(device))

    def inputs_regenerated(*shape: int) -> Callable[[torch.dtype, str], tuple]:
        return lambda dtype, device: (*inputs(*shape)(dtype, device), False)

    def inputs_backward(*shape: int) -> Callable[[torch.dtype, str], tuple]:
        def make(dtype: torch.dtype, device: str) -> tuple:
            packed = torch.randint(256, (packed_bytes(math.prod(shape), 1),), dtype=torch.uint8, device=device)
            return torch.randn(shape, dtype=dtype, device=device), packed, p, False

        return make

    def seed(device: str) -> Tensor:
        return torch.full((1,), 2**62 + 1, dtype=torch.int64, device=device)

    def noise(x: Tensor, seed: Tensor) -> Tensor:
        return uniform_reference(int(seed), x.numel()).view(x.shape).to(x.device)

    def dropout_of(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        return dropout_reference(x, noise(x, seed), p)

    def regenerated_of(dy: Tensor, p: float, seed: Tensor, channels_last: bool) -> Tensor:
        return dropout_backward_regenerated_reference(dy, noise(dy, seed), p)

    def stock(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
        return torch.native_dropout(x, p, True)

    def floor(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + packed_bytes(x.numel(), 1)

    def floor_regenerated(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + 8

    def seeds(x: Tensor) -> int:  # each program reads it
        return 8 * grid_of(x, CONFIGS[0])[0]

    def case(name: str, make: Callable, *rest: object, **more: object) -> launch.Case:
        return launch.Case(name, make(64, 197, 3072), *rest, CONFIGS, tiny=make(3, 5, 67), **more)

    backward = (dropout_backward_triton, dropout_backward_reference, floor, floor)
    drawn = (dropout_triton, dropout_of, lambda x, *_: floor(x) + seeds(x), floor)
    regenerated = (
        dropout_backward_regenerated_triton,
        regenerated_of,
        lambda x, *_: floor_regenerated(x) - 8 + seeds(x),
        floor_regenerated,
    )
    return [
        case("dropout", inputs, *drawn, stock=stock),
        case("dropout_backward", inputs_backward, *backward),
        case("dropout_backward_regenerated", inputs_regenerated, *regenerated),
    ]
