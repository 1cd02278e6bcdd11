"""DIVISION's code of a map: block means in bf16 (low frequency) and the Q-bit rest (high frequency).

    lfc  = bf16(mean of each block)                     [N, C, h, w]
    hfc  = x - upsample(lfc)                            taken against the rounded means: rounding them costs nothing
    low, step = min(hfc), (max(hfc) - min(hfc)) / (2^Q - 1)    per map (n, c), bf16 [N, C, 1, 1]
    code = floor((hfc - low) / step + noise)            noise uniform in [0, 1): unbiased stochastic rounding
    x~   = low + step * code + upsample(lfc)

Bits per element: Q + 16 * blocks / (H * W) + 32 / (H * W).

lfc="always" subtracts the block means in every map, as above. lfc="auto" leaves them out (stores zeros) in the maps that are coded more
exactly without: maps after a ReLU, where a mean that differs from block to block turns exact zeros, which one code would hold without
error, into values that have to be rounded. Which is better is known exactly, since the expected squared error of stochastic rounding is.
The layout and its bytes, and decoding, are the same.

Source: arXiv 2208.04187 and its official code, with three repairs. `low` is rounded down and `step` up to bf16 *before*
the codes are made, so every code lies in [0, 2^Q - 1] and decoding uses the very numbers encoding used (the official code
rounds them afterwards, a bias, and lets a code of 2^Q spill into its neighbour). We keep the step, not its inverse, so
a constant map needs no epsilon.

align="ceil": the last block of a row or column may be smaller and holds the mean of what it covers; pixel i belongs to block i // k.
align="authors": the official floor mode. Whole blocks only, so the pixels past the last one are in no mean, and nearest-neighbour
resizing spreads the means over the map, which misplaces them when k does not divide the size.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .bits import pack, packed_bytes, unpack
from .layout import is_channels_last

ALIGN = ("ceil", "authors")
LFC = ("auto", "always")


class Code(NamedTuple):
    """What is kept of a map x [N, C, H, W]."""

    lfc: Tensor  # bf16 [N, C, h, w]
    codes: Tensor  # uint8 [ceil(N * C * H * W * Q / 8)], in x's memory order
    low: Tensor  # bf16 [N, C, 1, 1]
    step: Tensor  # bf16 [N, C, 1, 1]


def blocks(size: int, kernel: int, align: str) -> int:
    """Number of blocks of `kernel` elements along an axis of `size`."""
    return -(-size // kernel) if align == "ceil" else size // kernel


def code_bytes(shape: torch.Size, kernel: tuple[int, int], bits: int, align: str) -> int:
    """Bytes of the Code of a map of this shape."""
    n, c, h, w = shape
    means = blocks(h, kernel[0], align) * blocks(w, kernel[1], align)
    return packed_bytes(n * c * h * w, bits) + n * c * (2 * means + 4)


def encode_reference(
    x: Tensor, noise: Tensor, kernel: tuple[int, int], bits: int, align: str, lfc: str = "always"
) -> Code:
    """x [N, C, H, W] (fp64, fp32, fp16 or bf16; contiguous or channels_last), noise fp32 of x's shape -> Code."""
    x = x.to(_compute_dtype(x.dtype))
    means = F.avg_pool2d(x, kernel, kernel, ceil_mode=align == "ceil", count_include_pad=False).to(torch.bfloat16)
    levels = 2**bits - 1
    steps, low, step = _quantise(x - _upsample(means.to(x.dtype), x.shape[2:], kernel, align), levels)
    if lfc == "auto" and means.shape[2:] != (
        1,
        1,
    ):  # a single mean only shifts the map: both ways differ by rounding alone
        plain_steps, plain_low, plain_step = _quantise(x, levels)
        plain = _expected_error(plain_steps, plain_step) < _expected_error(steps, step)  # [N, C, 1, 1]
        means = means.masked_fill(plain, 0)
        steps, low, step = (
            torch.where(plain, ours, theirs)
            for ours, theirs in ((plain_steps, steps), (plain_low, low), (plain_step, step))
        )
    codes = steps.add_(noise).floor_().clamp_(0, levels).to(torch.uint8)
    if is_channels_last(x):
        codes = codes.permute(0, 2, 3, 1)
    return Code(means, pack(codes, bits), low, step)


def _quantise(hfc: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """((hfc - low) / step, low, step) per map."""
    low = _bf16_floor(hfc.amin((2, 3), keepdim=True))
    step = -_bf16_floor((low.to(hfc.dtype) - hfc.amax((2, 3), keepdim=True)) / levels)
    inverse = torch.where(step > 0, 1 / step.to(hfc.dtype), 0)
    return (hfc - low.to(hfc.dtype)).mul_(inverse), low, step


def _expected_error(steps: Tensor, step: Tensor) -> Tensor:
    """Expected squared error of stochastic rounding, summed over each map: step^2 f (1 - f), f the fraction that is rounded away."""
    fraction = steps.frac()
    return (fraction - fraction.square()).sum((2, 3), keepdim=True).mul_(step.to(steps.dtype).square())


def decode_reference(
    code: Code,
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    kernel: tuple[int, int],
    bits: int,
    align: str,
) -> Tensor:
    """Code -> x~ of `shape` [N, C, H, W] and `dtype`, in the memory format of the encoded tensor."""
    n, c, h, w = shape
    compute = _compute_dtype(dtype)
    codes = unpack(code.codes, bits, n * c * h * w).to(compute)
    x = codes.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else codes.view(n, c, h, w)
    x = x.mul_(code.step.to(compute)).add_(code.low.to(compute))
    return x.add_(_upsample(code.lfc.to(compute), (h, w), kernel, align)).to(dtype)


def _upsample(lfc: Tensor, size: tuple[int, int], kernel: tuple[int, int], align: str) -> Tensor:
    if align == "authors":
        return F.interpolate(lfc, size=tuple(size), mode="nearest")
    for axis, (length, k) in enumerate(zip(size, kernel, strict=True), start=2):
        if k > 1:
            block = torch.arange(length, device=lfc.device) // k
            lfc = lfc.index_select(axis, block)
    return lfc


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _bf16_floor(x: Tensor) -> Tensor:
    """The largest bf16 not above x."""
    bits = x.float().view(torch.int32)
    bits = torch.where(bits < 0, bits + 0xFFFF, bits)  # negative: away from zero
    return (bits & -0x10000).view(torch.float32).to(torch.bfloat16)
