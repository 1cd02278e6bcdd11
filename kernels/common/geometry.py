"""Geometry of a convolution, as kernels and codecs take it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ConvGeometry:
    """What the weight gradient of a convolution with zero padding needs to know beside its tensors.

    weight_shape: [O, I / groups, kh, kw], or one axis for each of a 1-d or 3-d convolution in place of the last two.
    stride, padding, dilation: one number for each of these axes, (rows, columns) in 2-d.
    groups: divides I and O.
    An input of n elements along an axis gives (n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 outputs along it.
    """

    weight_shape: torch.Size
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
