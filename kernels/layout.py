"""Memory layout of tensors."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether x [N, C, H, W] lies in memory as NHWC. A tensor that fits both orders counts as NCHW."""
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
