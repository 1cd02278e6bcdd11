"""How a tensor is split into groups of elements that share a code's parameters, and where the groups lie in memory.

grouping="group": `size` consecutive elements, in memory order, of one sample x[i]; the last group of a sample may be shorter.
grouping="channel": each map x[i, c] of a tensor [N, C, ...], in whatever order it lies in memory. Tensors [N, L, F] are tokens: their
channels are the last axis, and a group is x[i, :, f]. Tensors of fewer axes have no maps; their group is x[i].
grouping="sample": x[i].
A tensor of one axis is one sample.
"""

import math
from typing import NamedTuple

import torch

GROUPINGS = ("group", "channel", "sample")
LARGEST = 16384  # elements of a group of "group": one program can hold as many


class Partition(NamedTuple):
    """Groups in memory: `rows` rows of `length` elements.

    channels == 1: a group is `size` consecutive elements of a row; the last group of a row may be shorter.
    channels > 1: a group is every channels-th element of a row, `size` of them.
    """

    rows: int
    length: int
    size: int
    channels: int

    @property
    def per_channel(self) -> int:
        """Groups of a channel in a row."""
        return -(-self.length // (self.size * self.channels))

    @property
    def per_row(self) -> int:
        """Groups of a row."""
        return self.channels * self.per_channel

    @property
    def groups(self) -> int:
        return self.rows * self.per_row


def partition(shape: torch.Size, channels_last: bool, grouping: str, size: int) -> Partition:
    """How a tensor of this shape is split into groups. size: 1 to LARGEST, ignored unless grouping is "group"."""
    numel = math.prod(shape)
    if numel == 0:
        return Partition(0, 1, 1, 1)
    samples = shape[0] if len(shape) > 1 else 1
    length = numel // samples
    if grouping == "group":
        return Partition(samples, length, min(size, length), 1)
    if grouping == "sample" or len(shape) < 3:
        return Partition(samples, length, length, 1)
    channels = shape[2] if len(shape) == 3 else shape[1]
    if len(shape) == 3 or channels_last:
        return Partition(samples, length, length // channels, channels)
    return Partition(samples * channels, length // channels, length // channels, 1)
