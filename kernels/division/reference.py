"""DIVISION's code of a map: its layout and the plain PyTorch reference. The formulas are in the docstring of the package."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.bits import pack, packed_bytes, unpack
from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.layout import empty, is_channels_last
from actpress.kernels.common.rounding import bf16_floor, finite, poison, saturated
from actpress.kernels.masks import unpack_mask_reference

ALIGN = ("ceil", "authors")
LFC = ("auto", "always")
_PART = 2**18  # elements that the reference takes at a time, per thread


@dataclass(frozen=True)
class Format:
    """Options of the code.

    kernel: rows and columns of a block. bits: Q of a code, 1, 2, 4 or 8. align: one of ALIGN. lfc: one of LFC; decoding ignores it.
    """

    kernel: tuple[int, int]
    bits: int
    align: str = "ceil"
    lfc: str = "always"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of blocks of a map."""
        kh, kw = self.kernel
        return (-(-height // kh), -(-width // kw)) if self.align == "ceil" else (height // kh, width // kw)


class Code(NamedTuple):
    """What is saved of a map x [N, C, H, W]."""

    lfc: Tensor  # bf16 [N, C, h, w]
    codes: Tensor  # uint8 [ceil(N * C * H * W * Q / 8)], in x's memory order
    low: Tensor  # bf16 [N, C, 1, 1]
    step: Tensor  # bf16 [N, C, 1, 1]


class Room(NamedTuple):
    """What a Code takes: shape of the means, bytes of codes, shape of low and step."""

    lfc: tuple[int, int, int, int]
    codes: int
    maps: tuple[int, int, int, int]


def room_of(shape: Sequence[int], format: Format) -> Room:
    """What the Code of a map of this shape takes."""
    n, c, h, w = shape
    return Room((n, c, *format.grid(h, w)), packed_bytes(math.prod(shape), format.bits), (n, c, 1, 1))


def code_bytes(shape: torch.Size, format: Format) -> int:
    """Bytes of the Code of a map of this shape."""
    means, codes, maps = room_of(shape, format)
    return codes + 2 * math.prod(means) + 4 * math.prod(maps)


def empty_code(x: Tensor, format: Format) -> Code:
    """An uninitialised Code of x."""
    room = room_of(x.shape, format)
    return Code(
        empty(room.lfc, torch.bfloat16, x.device, is_channels_last(x)),
        x.new_empty(room.codes, dtype=torch.uint8),
        *(x.new_empty(room.maps, dtype=torch.bfloat16) for _ in range(2)),
    )


def sampled_every(height: int) -> int:
    """lfc="auto" compares expected errors of one row of so many of a map: of every fourth, or of all in maps of fewer than 8 rows."""
    return 4 if height >= 8 else 1


def encode_reference(x: Tensor, noise: Tensor, format: Format) -> Code:
    """x [N, C, H, W] (fp64, fp32, fp16 or bf16; contiguous or channels_last), noise fp32 of x's shape -> Code."""
    if x.numel() == 0:
        return Code(*(t.zero_() for t in empty_code(x, format)))
    parts = (_encode_part(*part, format) for part in _in_parts(x, noise))
    means, codes, low, step = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Code(means, pack(codes.permute(0, 2, 3, 1) if is_channels_last(x) else codes, format.bits), low, step)


def _encode_part(x: Tensor, noise: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(means, codes, low, step) of some images, codes not packed: uint8 of x's shape."""
    x, kernel, levels = x.to(compute_dtype(x.dtype)), format.kernel, 2**format.bits - 1
    means = F.avg_pool2d(x, kernel, kernel, ceil_mode=format.align == "ceil", count_include_pad=False)
    means = means.to(torch.bfloat16)
    hfc = x - upsample(means.to(x.dtype), x.shape[2:], format)
    if format.lfc == "auto" and means.shape[2:] != (
        1,
        1,
    ):  # a single mean only shifts the map: both ways differ by rounding
        (error, step), (without, plain_step) = _expected_error(hfc, levels), _expected_error(x, levels)  # [N, C, 1, 1]
        plain = without * plain_step.square() < error * step.square()
        plain |= error.isnan() & ~without.isnan()  # means that are not finite, of an x that is
        means = means.masked_fill_(plain, 0)
        hfc = x - upsample(means.to(x.dtype), x.shape[2:], format)
    steps, low, step = _quantize(hfc, levels)
    return means, steps.add_(noise).floor_().clamp_(0, levels).to(torch.uint8), low, step


def _quantize(hfc: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """((hfc - low) / step, low, step) per map."""
    maps = hfc.contiguous()  # in channels_last order, finding a map's extremes takes a CPU ten times as long
    least, greatest = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    low = finite(bf16_floor(least + (poison(least) + poison(greatest))))
    levels = hfc.new_full((), levels)  # by a Python number, CUDA multiplies with its inverse
    minus_range = low.to(hfc.dtype) - greatest
    step = -finite(bf16_floor((minus_range + poison(minus_range)) / levels))
    inverse = torch.where(step > 0, 1 / step.to(hfc.dtype), 0)
    return (hfc - low.to(hfc.dtype)).mul_(inverse), low, step


def _expected_error(hfc: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Expected squared error of stochastic rounding in steps, summed over the sampled rows of each map; and the step.

    An element of which the fraction f of a step is rounded away has the expected squared error f (1 - f).
    """
    steps, _, step = _quantize(hfc, levels)
    fraction = steps[:, :, :: sampled_every(hfc.shape[2])].frac_()
    return fraction.sub_(fraction.square()).sum((2, 3), keepdim=True), step.to(steps.dtype)


def decode_reference(
    code: Code,
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    format: Format,
    mask: Tensor | None = None,
) -> Tensor:
    """Code -> x~ of `shape` [N, C, H, W] and `dtype`, in the memory order of the encoded tensor.

    mask: packed (kernels/masks) in that memory order; x~ is zero where it is 0.
    """
    n, c, h, w = shape
    if 0 in shape:
        return empty(shape, dtype, code.codes.device, channels_last)
    codes = unpack(code.codes, format.bits, n * c * h * w)
    codes = codes.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else codes.view(n, c, h, w)
    parts = _in_parts(codes, code.lfc, code.low, code.step)
    x = torch.cat([_decode_part(*part, dtype, format) for part in parts])
    return x if mask is None else x.masked_fill_(~unpack_mask_reference(mask, shape, channels_last), 0)


def _decode_part(codes: Tensor, lfc: Tensor, low: Tensor, step: Tensor, dtype: torch.dtype, format: Format) -> Tensor:
    compute = compute_dtype(dtype)
    x = codes.to(compute).mul_(step.to(compute)).add_(low.to(compute))
    return saturated(x.add_(upsample(lfc.to(compute), x.shape[2:], format)), dtype)


def _in_parts(x: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """x and the others, split alike into parts of some images.

    A part is so small that what is computed of it stays in a CPU's cache. On other devices, and where operations are only traced, there is
    one part.
    """
    if not x.is_cpu or torch.compiler.is_compiling() or type(x) is not Tensor:
        return [(x, *others)]
    threads = torch.get_num_threads()
    images = max(threads, 2)  # at least, in a part: sums over a map are then the same as over all images, to the bit
    parts = max(min(x.numel() // (_PART * threads), x.shape[0] // images), 1)
    return zip(*(t.tensor_split(parts) for t in (x, *others)), strict=True)


def upsample(lfc: Tensor, size: tuple[int, int], format: Format) -> Tensor:
    """Block means [N, C, h, w] spread over maps of `size` (H, W)."""
    if format.align == "authors":
        return F.interpolate(lfc, size=tuple(size), mode="nearest")
    for axis in (3, 2):  # columns first, while there are few rows
        lfc = lfc.repeat_interleave(format.kernel[axis - 2], axis).narrow(axis, 0, size[axis - 2])
    return lfc
