"""Fixed levels for normally distributed maps: Q-bit codes of (x - mean) / deviation, per channel over the batch.

    z = (x - mean) / deviation          mean and deviation over N, H, W of each channel, fp32 [C]
    code                                the level nearest to z; or, stochastically, one of the two around z, so that the expected level is z
    x~ = mean + deviation * levels[code]

The levels minimise the expected squared error of the nearest level for a standard normal z. Each is the mean of the z that are nearest to
it (Lloyd-Max). The outermost levels are .80, 1.51 and 2.73 deviations for 1, 2 and 4 bits. Stochastic rounding is unbiased between them;
values beyond them become the outermost level.

Bits per element: Q + 64 / (N * H * W). Q is log2(len(levels)). A channel that holds a NaN or an infinity decodes to NaN throughout. Decoded
values beyond the finite range of x's dtype, 65504 in fp16, become its largest number.

Sources: Max, "Quantizing for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM", 1982. A study in plain PyTorch: slow,
no kernel.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common.bits import pack, packed_bytes, unpack
from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.common.rounding import poison, saturated

BITS = (1, 2, 4)
Levels = tuple[float, ...]  # 2^Q, ascending


class Code(NamedTuple):
    """What is saved of a map x [N, C, H, W]."""

    codes: Tensor  # uint8 [ceil(N * C * H * W * Q / 8)], in x's memory order
    mean: Tensor  # fp32 [C]
    deviation: Tensor  # fp32 [C]


@cache
def normal_levels(bits: int) -> Levels:
    """The 2^bits Lloyd-Max levels of a standard normal, ascending, to about 1e-10."""
    levels = [4 * (i + 0.5) / 2**bits - 2 for i in range(2**bits)]
    change = math.inf
    while change > 1e-13:
        borders = [-math.inf, *_midpoints(levels), math.inf]
        better = [_normal_mean(a, b) for a, b in pairwise(borders)]
        change = max(abs(new - old) for new, old in zip(better, levels, strict=True))
        levels = better
    return tuple(levels)


def _midpoints(levels: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in pairwise(levels)]


def _normal_mean(a: float, b: float) -> float:
    """Mean of a standard normal between a and b."""
    density = math.exp(-(a**2) / 2) - math.exp(-(b**2) / 2)
    return density * math.sqrt(2 / math.pi) / (math.erf(b / math.sqrt(2)) - math.erf(a / math.sqrt(2)))


def code_bytes(shape: torch.Size, levels: Levels) -> int:
    """Bytes of the Code of a map of this shape."""
    return packed_bytes(math.prod(shape), _bits(levels)) + 8 * shape[1]


def encode_reference(x_NCHW: Tensor, noise: Tensor | None, levels: Levels) -> Code:
    """x (fp64, fp32, fp16 or bf16) -> Code. noise: uniform in [0, 1), of x's shape; None rounds to the nearest level."""
    x = x_NCHW.to(compute_dtype(x_NCHW.dtype))
    deviation, mean = (t.float() for t in torch.std_mean(x, (0, 2, 3), correction=0))
    deviation += poison(deviation)
    inverse = torch.where(deviation > 0, 1 / deviation.to(x.dtype), deviation.to(x.dtype))  # 0, and NaN, stay
    z = (x - _per_channel(mean, x.dtype)) * inverse.view(-1, 1, 1)
    if noise is None:
        codes = _count_up_to(z, _midpoints(levels))
    else:
        table = torch.tensor(levels, dtype=x.dtype, device=x.device)
        codes = _count_up_to(z, levels[1:-1])
        below, above = table[codes.int()], table[codes.int() + 1]
        codes += noise < (z - below) / (above - below)
    in_memory_order = codes.permute(0, 2, 3, 1) if is_channels_last(x_NCHW) else codes
    return Code(pack(in_memory_order, _bits(levels)), mean, deviation)


def decode_reference(code: Code, shape: torch.Size, dtype: torch.dtype, channels_last: bool, levels: Levels) -> Tensor:
    """Code -> x~ of `shape` [N, C, H, W] and `dtype`, in the memory format of the encoded tensor."""
    n, c, h, w = shape
    compute = compute_dtype(dtype)
    table = torch.tensor(levels, dtype=compute, device=code.codes.device)
    z = table[unpack(code.codes, _bits(levels), math.prod(shape)).int()]
    z = z.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else z.view(n, c, h, w)
    return saturated(z.mul_(_per_channel(code.deviation, compute)).add_(_per_channel(code.mean, compute)), dtype)


def _bits(levels: Levels) -> int:
    return len(levels).bit_length() - 1


def _count_up_to(z: Tensor, borders: Sequence[float]) -> Tensor:
    """The number of borders that are not above z, uint8."""
    count = torch.zeros_like(z, dtype=torch.uint8)
    for border in borders:
        count += z >= border
    return count


def _per_channel(t_C: Tensor, dtype: torch.dtype) -> Tensor:
    return t_C.to(dtype).view(-1, 1, 1)
