"""Memory order of tensors: contiguous or channels_last."""

from collections.abc import Sequence

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, H, W] lies in memory as NHWC. A tensor that fits both orders counts as NCHW."""
    # torch.vmap, by which is_grads_batched works, cannot be asked for a memory format
    return x.dim() == 4 and not x.is_contiguous() and x.permute(0, 2, 3, 1).is_contiguous()


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, otherwise a contiguous copy: for kernels that run over memory in order."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def dense_as(x: Tensor, channels_last: bool) -> Tensor:
    """x in the given memory order; a copy where it lies in another."""
    return x.contiguous(memory_format=memory_format(channels_last))


def memory_format(channels_last: bool) -> torch.memory_format:
    """torch.channels_last or torch.contiguous_format."""
    return torch.channels_last if channels_last else torch.contiguous_format


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """An uninitialised tensor in one of the two memory orders."""
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=memory_format(channels_last))
