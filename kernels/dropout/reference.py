"""Dropout with a mask of one bit per element: the plain PyTorch reference.

y = x * mask / (1 - p), rounded as stock dropout rounds on x's device.
"""

import torch
from torch import Tensor

from actpress.kernels.common.noise import uniform_from
from actpress.kernels.masks import pack_mask_reference, unpack_mask_reference


def dropout_reference(x: Tensor, noise: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """x of any shape, noise fp32 of its shape -> (x / (1 - p) where noise >= p, else x * 0; packed mask of the former)."""
    mask = noise >= p
    return _survivors(x, mask, p), pack_mask_reference(mask)


def dropout_backward_reference(dy: Tensor, packed: Tensor, p: float, channels_last: bool) -> Tensor:
    """dx = dy / (1 - p) where the mask is set, else dy * 0."""
    return _survivors(dy, unpack_mask_reference(packed, dy.shape, channels_last), p)


def dropout_backward_regenerated_reference(dy: Tensor, noise: Tensor, p: float) -> Tensor:
    """dx from the noise of the forward pass."""
    return _survivors(dy, noise >= p, p)


def dropout_from_seed_reference(x: Tensor, p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`dropout_reference` with noise from a seed, int64 [1]: other noise than that of the kernel."""
    return dropout_reference(x, uniform_from(seed, x), p)


def dropout_backward_from_seed_reference(dy: Tensor, p: float, seed: Tensor, channels_last: bool) -> Tensor:
    """`dropout_backward_regenerated_reference` with the noise of `dropout_from_seed_reference`; dy in y's memory order."""
    return dropout_backward_regenerated_reference(dy, uniform_from(seed, dy), p)


def _survivors(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """x * mask / (1 - p). The CPU rounds 1 / (1 - p) to x's dtype, in which stock dropout keeps its mask there; CUDA has it in fp32."""
    if x.is_cuda:
        return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - p))
    return x * mask.to(x.dtype).div_(1 - p)
