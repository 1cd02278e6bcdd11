"""Dropout with a mask of one bit per element: registered operations and public functions."""

import torch
from torch import Tensor

from actpress.kernels.common import check, launch
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.dropout.reference import (
    dropout_backward_from_seed_reference,
    dropout_backward_reference,
    dropout_from_seed_reference,
)
from actpress.kernels.dropout.triton import (
    dropout_backward_regenerated_triton,
    dropout_backward_triton,
    dropout_triton,
)
from actpress.kernels.masks.triton import empty_packed

_dropout = launch.operation(
    "dropout",
    dropout_from_seed_reference,
    dropout_triton,
    lambda x, p, seed: (torch.empty_like(x), empty_packed(x)),
    in_order=["x"],
)
_dropout_backward = launch.operation(
    "dropout_backward",
    dropout_backward_reference,
    dropout_backward_triton,
    lambda dy, packed, p, channels_last: torch.empty_like(dy),
    in_order=["dy"],
)
_dropout_backward_regenerated = launch.operation(
    "dropout_backward_regenerated",
    dropout_backward_from_seed_reference,
    dropout_backward_regenerated_triton,
    lambda dy, p, seed, channels_last: torch.empty_like(dy),
    in_order=["dy"],
)


def dropout(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Dropout with a mask drawn from `seed`, for those who do not need the very mask that stock dropout would draw.

    x of any shape, strides and floating dtype; p, the probability of zero, met to 2^-17; seed int64 [1] on x's device, not negative.
    Returns (x * mask / (1 - p), the mask, uint8 [ceil(numel / 8)], in y's memory order): for dropout_backward, or drop the mask, keep the
    seed and take dropout_backward_regenerated. A seed gives one mask on all GPUs, another on the CPU. Raises ValueError unless 0 <= p < 1.
    """
    _check(p)
    return _dropout.op(x, p, seed, is_channels_last(x))  # on the CPU too: compiled code cannot read what the seed holds


def dropout_backward(dy: Tensor, packed: Tensor, p: float, channels_last: bool) -> Tensor:
    """dy of any strides, the packed mask and whether it lies in channels_last order -> dx = dy * mask / (1 - p)."""
    return _dropout_backward(dy, packed, p, channels_last)


def dropout_backward_regenerated(dy: Tensor, p: float, seed: Tensor, channels_last: bool) -> Tensor:
    """dx of `dropout(x, p, seed)` from nothing but the seed. dy of any strides; channels_last: whether y was. ValueError as there."""
    _check(p)
    return _dropout_backward_regenerated.op(dy, p, seed, channels_last)


def _check(p: float) -> None:
    if not 0 <= p < 1:
        check.refuse("dropout", "p", p, "0 <= p < 1")
