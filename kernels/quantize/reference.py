"""Group quantization: the code's layout and the plain PyTorch reference. The formulas are in the docstring of the package."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import check
from actpress.kernels.common.bits import BITS, pack, packed_bytes, unpack
from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.groups import GROUPINGS, LARGEST, Partition, partition
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.common.rounding import bf16_ceil, bf16_floor, finite, poison, saturated


@dataclass(frozen=True)
class Format:
    """Options of the code.

    grouping: one of GROUPINGS, see kernels/common/groups.py. size: elements of a group of grouping="group", 1 to LARGEST; other groupings
    ignore it. bits: Q of a code, 1, 2, 4 or 8.
    """

    grouping: str = "group"
    size: int = 256
    bits: int = 2

    def check(self) -> None:
        """Raise ValueError for other values than those above. Registered operations do not: their numbers may be symbolic."""
        check.choice("quantize", "grouping", self.grouping, GROUPINGS)
        check.integer("quantize", "size", self.size, 1, LARGEST)
        check.choice("quantize", "bits", self.bits, BITS)

    def groups(self, shape: torch.Size, channels_last: bool) -> Partition:
        """How a tensor of this shape is split into groups."""
        return partition(shape, channels_last, self.grouping, self.size)


class Code(NamedTuple):
    """What is saved of x."""

    codes: Tensor  # uint8 [ceil(numel * Q / 8)], in x's memory order
    low: Tensor  # bf16 [groups], sample by sample
    step: Tensor  # bf16 [groups]


def code_bytes(shape: torch.Size, format: Format) -> int:
    """Bytes of the Code of a tensor of this shape."""
    return packed_bytes(math.prod(shape), format.bits) + 4 * format.groups(shape, False).groups


def empty_code(x: Tensor, format: Format) -> Code:
    """An uninitialised Code of x."""
    groups = format.groups(x.shape, is_channels_last(x)).groups
    codes = x.new_empty(packed_bytes(x.numel(), format.bits), dtype=torch.uint8)
    return Code(codes, *(x.new_empty(groups, dtype=torch.bfloat16) for _ in range(2)))


def encode_reference(x: Tensor, noise: Tensor | None, format: Format) -> Code:
    """x (any shape; fp64, fp32, fp16 or bf16), noise fp32 of x's shape, or None for the nearest -> Code."""
    channels_last, levels = is_channels_last(x), 2**format.bits - 1
    where = format.groups(x.shape, channels_last)
    values = _grouped(in_memory_order(x, channels_last).to(compute_dtype(x.dtype)), where)
    by_group = values.transpose(2, 3).contiguous()  # neighbours in memory: several times as fast on a CPU
    low, high = (extreme.unsqueeze(2) for extreme in (by_group.amin(3), by_group.amax(3)))
    low = finite(bf16_floor(low + (poison(low) + poison(high))))
    steps_of_range = torch.full_like(high, levels)  # a tensor: by a number, CUDA multiplies with the number's inverse
    size_of_range = high - low.to(values.dtype)
    step = finite(bf16_ceil((size_of_range + poison(size_of_range)) / steps_of_range))
    least = torch.finfo(step.dtype).tiny  # the inverse of a smaller one may not be finite
    inverse = torch.where(step >= least, 1 / step.to(values.dtype), 0)
    steps = _ungrouped((values - low).mul_(inverse), where)
    steps += 0.5 if noise is None else in_memory_order(noise, channels_last)
    codes = steps.floor_().clamp_(0, levels).nan_to_num_(levels).to(torch.uint8)
    return Code(pack(codes, format.bits), low.flatten(), step.flatten())


def decode_reference(code: Code, shape: torch.Size, dtype: torch.dtype, channels_last: bool, format: Format) -> Tensor:
    """Code -> x~ of `shape` and `dtype`, in the memory order of the encoded tensor."""
    where = format.groups(shape, channels_last)
    compute = compute_dtype(dtype)
    values = _grouped(unpack(code.codes, format.bits, math.prod(shape)).to(compute), where)
    low, step = (t.to(compute).view(where.rows, where.per_channel, 1, where.channels) for t in (code.low, code.step))
    x = _ungrouped(saturated(values.mul_(step).add_(low), dtype), where)
    if channels_last:
        n, c, h, w = shape
        return x.view(n, h, w, c).permute(0, 3, 1, 2)
    return x.view(shape)


def in_memory_order(x: Tensor, channels_last: bool) -> Tensor:
    """Elements of x [numel] in the order in which they lie in memory, a view where x is dense."""
    return (x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1)


def _grouped(flat: Tensor, where: Partition) -> Tensor:
    """[numel] -> [rows, groups of a channel, size, channels]; short groups are padded with their last element."""
    if where.length % where.size:
        flat = F.pad(flat.view(1, where.rows, where.length), (0, -where.length % where.size), mode="replicate")
    return flat.view(where.rows, where.per_channel, where.size, where.channels)


def _ungrouped(values: Tensor, where: Partition) -> Tensor:
    """The inverse of _grouped."""
    return values.view(where.rows, where.per_row * where.size)[:, : where.length].reshape(-1)
