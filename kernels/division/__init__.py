"""DIVISION's code of a map: block means in bf16 (low frequency) and the Q-bit rest (high frequency).

    lfc  = bf16(mean of each block)                     [N, C, h, w]
    hfc  = x - upsample(lfc)                            taken against the rounded means: rounding them costs nothing
    low, step = min(hfc), (max(hfc) - min(hfc)) / (2^Q - 1)    per map (n, c), bf16 [N, C, 1, 1]
    code = floor((hfc - low) / step + noise)            noise uniform in [0, 1): stochastic rounding, unbiased up to kernels/common/noise.py
    x~   = low + step * code + upsample(lfc)

Bits per element: Q + 16 * blocks / (H * W) + 32 / (H * W).

lfc="always" subtracts the block means in every map, as above. lfc="auto" leaves them out (stores zeros) in the maps that are coded more
exactly without: maps after a ReLU, where a mean that differs from block to block turns exact zeros, which one code would hold without
error, into values that have to be rounded. The expected squared error of stochastic rounding is known exactly; both ways are compared by
its sum over every fourth row of a map, rows 0, 4, 8, ..., or over all rows of a map of fewer than eight. Against a comparison of all
rows a few maps in a hundred take the other way, mostly where both are about as good. The layout and its bytes, and decoding, are the same.

Source: arXiv 2208.04187 and its official code, with three repairs. `low` is rounded down and `step` up to bf16 *before*
the codes are made, so every code lies in [0, 2^Q - 1] and decoding uses the very numbers encoding used (the official code
rounds them afterwards, a bias, and lets a code of 2^Q spill into its neighbour). We keep the step, not its inverse, so
a constant map needs no epsilon.

A map that holds a NaN or an infinity decodes to NaN throughout, as does one whose range, or, unless lfc="auto" can leave the means out, the
sum of one of its blocks exceeds fp32. What decodes beyond the finite range of x's dtype, 65504 in fp16, becomes its largest number.

align="ceil": the last block of a row or column may be smaller and holds the mean of what it covers; pixel i belongs to block i // k.
align="authors": the official floor mode. Whole blocks only, so the pixels past the last one are in no mean, and nearest-neighbour
resizing spreads the means over the map, which misplaces them when k does not divide the size.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.bits import pack, packed_bytes, unpack
from actpress.kernels.common.launch import triton
from actpress.kernels.common.layout import dense_as, is_channels_last
from actpress.kernels.common.noise import Source, noise_bits, uniform_from, uniform_reference
from actpress.kernels.common.rounding import bf16_floor, finite, poison, saturated
from actpress.kernels.division import codes, tiles
from actpress.kernels.division.plan import (
    DECODE_CONFIGS,
    ENCODE_CONFIGS,
    Way,
    blocks,
    in_order,
    sampled_every,
    shape_of,
    way_of,
)
from actpress.kernels.masks import unpack_mask_reference

ALIGN = ("ceil", "authors")
LFC = ("auto", "always")
_PART = 2**18  # elements that the reference takes at a time, per thread
L2 = 24 * 2**20  # bytes of x that a GPU's last cache keeps from one kernel to the next: half of an H100's


class Code(NamedTuple):
    """What is kept of a map x [N, C, H, W]."""

    lfc: Tensor  # bf16 [N, C, h, w]
    codes: Tensor  # uint8 [ceil(N * C * H * W * Q / 8)], in x's memory order
    low: Tensor  # bf16 [N, C, 1, 1]
    step: Tensor  # bf16 [N, C, 1, 1]


def code_bytes(shape: torch.Size, kernel: tuple[int, int], bits: int, align: str) -> int:
    """Bytes of the Code of a map of this shape."""
    n, c, h, w = shape
    means = blocks(h, kernel[0], align) * blocks(w, kernel[1], align)
    return packed_bytes(n * c * h * w, bits) + n * c * (2 * means + 4)


def encode_reference(
    x: Tensor, noise: Tensor, kernel: tuple[int, int], bits: int, align: str, lfc: str = "always"
) -> Code:
    """x [N, C, H, W] (fp64, fp32, fp16 or bf16; contiguous or channels_last), noise fp32 of x's shape -> Code."""
    if x.numel() == 0:
        return Code(*(t.zero_() for t in _empty_code(x, kernel, bits, align)))
    parts = (_encode_part(*part, kernel, 2**bits - 1, align, lfc) for part in _in_parts(x, noise))
    means, codes, low, step = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Code(means, pack(codes.permute(0, 2, 3, 1) if is_channels_last(x) else codes, bits), low, step)


def _encode_part(
    x: Tensor, noise: Tensor, kernel: tuple[int, int], levels: int, align: str, lfc: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(means, codes, low, step) of some images, codes not packed: uint8 of x's shape."""
    x = x.to(_compute_dtype(x.dtype))
    means = F.avg_pool2d(x, kernel, kernel, ceil_mode=align == "ceil", count_include_pad=False).to(torch.bfloat16)
    hfc = x - _upsample(means.to(x.dtype), x.shape[2:], kernel, align)
    if lfc == "auto" and means.shape[2:] != (1, 1):  # a single mean only shifts the map: both ways differ by rounding
        (error, step), (without, plain_step) = _expected_error(hfc, levels), _expected_error(x, levels)  # [N, C, 1, 1]
        plain = without * plain_step.square() < error * step.square()
        plain |= error.isnan() & ~without.isnan()  # means that are not finite, of an x that is
        means = means.masked_fill_(plain, 0)
        hfc = x - _upsample(means.to(x.dtype), x.shape[2:], kernel, align)
    steps, low, step = _quantise(hfc, levels)
    return means, steps.add_(noise).floor_().clamp_(0, levels).to(torch.uint8), low, step


def _quantise(hfc: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
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
    """Expected squared error of stochastic rounding, summed over the sampled rows of each map, f (1 - f) in steps, f the fraction that is
    rounded away; and the step."""
    steps, _, step = _quantise(hfc, levels)
    fraction = steps[:, :, :: sampled_every(hfc.shape[2])].frac_()
    return fraction.sub_(fraction.square()).sum((2, 3), keepdim=True), step.to(steps.dtype)


def decode_reference(
    code: Code,
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    kernel: tuple[int, int],
    bits: int,
    align: str,
    mask: Tensor | None = None,
) -> Tensor:
    """Code -> x~ of `shape` [N, C, H, W] and `dtype`, in the memory format of the encoded tensor. Zero where `mask`, packed in that
    memory's order (masks.py), is 0."""
    n, c, h, w = shape
    if 0 in shape:
        return _empty(shape, dtype, channels_last, code.codes.device)
    codes = unpack(code.codes, bits, n * c * h * w)
    codes = codes.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else codes.view(n, c, h, w)
    parts = _in_parts(codes, code.lfc, code.low, code.step)
    x = torch.cat([_decode_part(*part, dtype, kernel, align) for part in parts])
    return x if mask is None else x.masked_fill_(~unpack_mask_reference(mask, shape, channels_last), 0)


def _decode_part(
    codes: Tensor, lfc: Tensor, low: Tensor, step: Tensor, dtype: torch.dtype, kernel: tuple[int, int], align: str
) -> Tensor:
    compute = _compute_dtype(dtype)
    x = codes.to(compute).mul_(step.to(compute)).add_(low.to(compute))
    return saturated(x.add_(_upsample(lfc.to(compute), x.shape[2:], kernel, align)), dtype)


def _in_parts(x: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """x and the others cut alike into parts of some images, so small that what is computed of a part stays in a CPU's cache; on other
    devices, and where operations are only traced, one part."""
    if not x.is_cpu or torch.compiler.is_compiling() or type(x) is not Tensor:
        return [(x, *others)]
    threads = torch.get_num_threads()
    images = max(threads, 2)  # at least, in a part: sums over a map are then the same as over all images, to the bit
    parts = max(min(x.numel() // (_PART * threads), x.shape[0] // images), 1)
    return zip(*(t.tensor_split(parts) for t in (x, *others)), strict=True)


def _upsample(lfc: Tensor, size: tuple[int, int], kernel: tuple[int, int], align: str) -> Tensor:
    if align == "authors":
        return F.interpolate(lfc, size=tuple(size), mode="nearest")
    for axis in (3, 2):  # columns first, while there are few rows
        lfc = lfc.repeat_interleave(kernel[axis - 2], axis).narrow(axis, 0, size[axis - 2])
    return lfc


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def encode_triton(
    x: Tensor,
    seed: Tensor,
    kernel: Sequence[int],
    bits: int,
    align: str,
    lfc: str,
    config: launch.Config = ENCODE_CONFIGS[0],
) -> Code:
    """`encode_reference` with the noise of noise.py, elements numbered in memory order. seed: int64 [1].

    x is read once as long as the maps of a program stay in a cache. Where maps are so large that there are few of them, images and tokens,
    they are cut into parts, and x is read once for extremes, once, with lfc="auto", for errors, and once for codes; so are maps of
    blocks of more than 16 rows and align="authors", where means take one read more. Of up to L2 bytes only the first counts.

    Differs in the order of sums: a mean may round to a neighbouring bf16, and lfc="auto" may choose the other way for a map whose
    errors agree to about 1e-5. Maps of the same means and the same choice have the same low, step and codes, bit for bit.
    """
    channels_last = is_channels_last(x)
    x = x if channels_last else x.contiguous()
    if x.numel() == 0:
        return Code(*(t.zero_() for t in _empty_code(x, kernel, bits, align)))
    shape, kernel, device = tuple(x.shape), tuple(kernel), x.device
    room = _room(shape, kernel, bits, align)
    code = Code(
        _empty(room.lfc, torch.bfloat16, channels_last, device),
        torch.empty(room.codes, dtype=torch.uint8, device=device),
        torch.empty(room.maps, dtype=torch.bfloat16, device=device),
        torch.empty(room.maps, dtype=torch.bfloat16, device=device),
    )
    means, low, step = code.lfc.view(torch.int16), code.low.view(torch.int16), code.step.view(torch.int16)
    inverse = torch.empty(room.maps, dtype=torch.float32, device=device)
    way = way_of(shape, channels_last, x.itemsize, kernel, bits, align, lfc, *config.values())
    plan, outers = way.plan, way.outers
    options = {"num_warps": way.warps, "fp_fusion": False}
    if way.parts == 0:
        arguments = (x, seed, means, code.codes, low, step, inverse, outers)
        launch.run(codes.encode_kernel, (way.programs,), *arguments, P=plan, **options)
        if plan.codes:
            return code
    else:
        _encode_parts(x, means, low, step, inverse, way, config["LANES"])
    plan, grid = in_order(plan, outers, config["LANES"] // plan.lanes, plan.lanes)
    arguments = (x, seed, means, code.codes, low, inverse, outers)
    launch.run(codes.codes_kernel, grid, *arguments, P=plan, **options)
    return code


def _encode_parts(x: Tensor, means: Tensor, low: Tensor, step: Tensor, inverse: Tensor, way: Way, lanes: int) -> None:
    """All but the codes of maps that are cut into parts."""
    plan, outers, programs, warps, parts = way
    options = {"num_warps": warps, "fp_fusion": False}
    if plan.known:
        area = min(triton.next_power_of_2(plan.kh * plan.kw), max(lanes // plan.maps, 1))
        tile = min(triton.next_power_of_2(plan.means), max(lanes // (plan.maps * area), 1))
        how = replace(plan, known=False, tile=tile)
        grid = (programs * how.tiles,)
        launch.run(tiles.means_kernel, grid, x, means, outers, P=how, LANES=area, **options)
    partials, errors = (torch.empty(k, low.numel(), parts, dtype=torch.float32, device=x.device) for k in (4, 2))
    grid, cut, lanes = (
        (programs * parts,),
        (outers, parts, triton.cdiv(plan.tiles, parts)),
        triton.next_power_of_2(parts),
    )
    launch.run(tiles.partials_kernel, grid, x, means, partials, *cut, P=plan, **options)
    if plan.auto:
        arguments = (x, means, partials, errors, *cut)
        launch.run(tiles.errors_kernel, grid, *arguments, P=plan, PARTS=lanes, **options)
    arguments = (means, low, step, inverse, partials, errors, outers, parts)
    how = replace(plan, known=False, tile=min(plan.tile, triton.next_power_of_2(plan.means)))
    launch.run(tiles.finish_kernel, (programs,), *arguments, P=how, PARTS=lanes, **options)


def decode_triton(
    code: Code,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    kernel: Sequence[int],
    bits: int,
    align: str,
    mask: Tensor | None = None,
    config: launch.Config = DECODE_CONFIGS[0],
) -> Tensor:
    """`decode_reference` in one pass; equal bit for bit."""
    x = _empty(shape, dtype, channels_last, code.codes.device)
    if x.numel() == 0:
        return x
    means = dense_as(code.lfc, channels_last).view(torch.int16)
    plan, outers = shape_of(tuple(shape), is_channels_last(x), tuple(kernel), bits, align)
    lanes = 16 // x.itemsize
    plan, grid = in_order(plan, outers, config["THREADS"], lanes)
    arguments = (means, code.codes, code.low.view(torch.int16), code.step.view(torch.int16), mask, x, outers)
    options = {"num_warps": config["num_warps"], "fp_fusion": False}
    launch.run(codes.decode_kernel, grid, *arguments, P=plan, LANES=lanes, **options)
    return x


def _way(x: Tensor, kernel: Sequence[int], bits: int, align: str, lfc: str, config: launch.Config) -> Way:
    return way_of(tuple(x.shape), is_channels_last(x), x.itemsize, tuple(kernel), bits, align, lfc, *config.values())


class _Room(NamedTuple):
    """What a Code takes: shapes of the means and of low and step, bytes of codes."""

    lfc: tuple[int, int, int, int]
    codes: int
    maps: tuple[int, int, int, int]


def _room_of(shape: Sequence[int], kernel: Sequence[int], bits: int, align: str) -> _Room:
    n, c, h, w = shape
    means = (n, c, blocks(h, kernel[0], align), blocks(w, kernel[1], align))
    return _Room(means, packed_bytes(math.prod(shape), bits), (n, c, 1, 1))


_room = functools.cache(_room_of)  # not of symbolic sizes


def _empty_code(x: Tensor, kernel: Sequence[int], bits: int, align: str) -> Code:
    room = _room_of(x.shape, kernel, bits, align)
    return Code(
        _empty(room.lfc, torch.bfloat16, is_channels_last(x), x.device),
        x.new_empty(room.codes, dtype=torch.uint8),
        *(x.new_empty(room.maps, dtype=torch.bfloat16) for _ in range(2)),
    )


def _empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool, device: torch.device) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=dtype, device=device, memory_format=layout)


@torch.library.custom_op("actpress::division_encode", mutates_args=())
def _encode(
    x: Tensor, seed: Tensor, kernel: Sequence[int], bits: int, align: str, lfc: str, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = dense_as(x, channels_last)
    return tuple(encode_reference(x, uniform_from(seed, x), kernel, bits, align, lfc))


@_encode.register_fake
def _(
    x: Tensor, seed: Tensor, kernel: Sequence[int], bits: int, align: str, lfc: str, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(_empty_code(dense_as(x, channels_last), kernel, bits, align))


launch.on_cuda(_encode, lambda x, *how: tuple(encode_triton(dense_as(x, how[-1]), *how[:-1])))


@torch.library.custom_op("actpress::division_decode", mutates_args=())
def _decode(
    lfc: Tensor,
    codes: Tensor,
    low: Tensor,
    step: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    kernel: Sequence[int],
    bits: int,
    align: str,
    mask: Tensor | None,
) -> Tensor:
    code = Code(lfc, codes, low, step)
    return decode_reference(code, torch.Size(shape), dtype, channels_last, kernel, bits, align, mask)


@_decode.register_fake
def _(
    lfc: Tensor,
    codes: Tensor,
    low: Tensor,
    step: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    *_,
) -> Tensor:
    return _empty(shape, dtype, channels_last, codes.device)


launch.on_cuda(
    _decode,
    lambda lfc, codes, low, step, *how: decode_triton(Code(lfc, codes, low, step), *how),
    lambda lfc, codes, low, step, shape, dtype, *_: dtype != torch.float64,
)


def encode(x: Tensor, source: Source, kernel: Sequence[int], bits: int, align: str, lfc: str) -> Code:
    """x [N, C, H, W] of any strides and floating dtype -> Code, with noise from `source`. kernel: rows and columns of a block."""
    if launch.on_gpu(x):
        return Code(*launch.way(_encode, x)(x, source.seed_for(x), kernel, bits, align, lfc, is_channels_last(x)))
    return encode_reference(x, source.uniform_like(x), kernel, bits, align, lfc)


def decode(
    code: Code,
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    kernel: Sequence[int],
    bits: int,
    align: str,
    mask: Tensor | None = None,
) -> Tensor:
    """The inverse: x~ of `shape` and `dtype`, in channels_last or row-major order; zero where the packed mask, if any, is 0."""
    if launch.on_gpu(code.codes) and dtype != torch.float64:
        return launch.way(_decode, code.codes)(*code, shape, dtype, channels_last, kernel, bits, align, mask)
    return decode_reference(code, shape, dtype, channels_last, kernel, bits, align, mask)


def _case_reference(x: Tensor, seed: Tensor, kernel: Sequence[int], bits: int, align: str, lfc: str) -> Code:
    """What `encode_triton` computes: its noise lies in memory order."""
    shape = (x.shape[0], *x.shape[2:], x.shape[1]) if is_channels_last(x) else x.shape
    noise = uniform_reference(int(seed), x.numel(), noise_bits(bits)).view(shape).to(x.device)
    return encode_reference(x, noise.permute(0, 3, 1, 2) if is_channels_last(x) else noise, kernel, bits, align, lfc)


def _case_input(shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: str) -> Tensor:
    """Maps after a ReLU and smooth ones in turn, each clearly better one way, of multiples of 1/64, whose sums are exact."""
    n, c, h, w = shape
    coarse = torch.randn(n, c, blocks(h, 8, "ceil"), blocks(w, 8, "ceil"), device=device)
    smooth = torch.arange(n * c, device=device).view(n, c, 1, 1) % 2 == 1
    x = torch.randn(shape, device=device)
    x = torch.where(smooth, x + 8 * _upsample(coarse, (h, w), (8, 8), "ceil"), x.relu())
    return _empty(shape, dtype, channels_last, x.device).copy_((x * 64).round_().div_(64))


def _encode_floor(x: Tensor, seed: Tensor, kernel: Sequence[int], bits: int, align: str, *_: object) -> int:
    return launch.nbytes(x) + code_bytes(x.shape, kernel, bits, align)


def _encode_moved(x: Tensor, seed: Tensor, kernel: Sequence[int], bits: int, align: str, lfc: str) -> int:
    """What kernels read and write, with scratch memory. Left out: zeros written over means, which depend on x, and code parameters that
    another program has read before, which come from a cache."""
    plan, outers, programs, _, parts = _way(x, kernel, bits, align, lfc, ENCODE_CONFIGS[0])
    maps = x.shape[0] * x.shape[1]
    moved = _encode_floor(x, seed, kernel, bits, align) + 4 * maps  # and the inverse of step
    if parts == 0:
        return moved + 8 * programs  # the seed
    if launch.nbytes(x) > L2:  # x again by each kernel but the first, and parameters to make the codes
        rows = 1 if plan.known else -(-plan.height // plan.every) / plan.height  # of which errors are taken
        moved += math.ceil(launch.nbytes(x) * (plan.known + plan.auto * rows + 1)) + maps * (2 * plan.means + 6)
        moved += plan.auto * 2 * maps * plan.means
    moved += 8 * math.prod(in_order(plan, outers, ENCODE_CONFIGS[0]["LANES"] // plan.lanes, plan.lanes)[1])
    moved += 2 * 4 * maps * parts * (2 + 4 * plan.auto)  # extremes, and errors, of parts: written, and read at the end
    return moved + plan.auto * 4 * 4 * maps * parts**2  # and extremes by each part that takes errors


def _decode_floor(code: Code, shape: torch.Size, dtype: torch.dtype, *_: object) -> int:
    return launch.nbytes(*code) + math.prod(shape) * dtype.itemsize


def cases() -> list[launch.Case]:
    """Activations of ResNet-50 and of ViT-B, tokens as maps."""
    kinds = {  # shape, a tiny one, channels_last, block, bits, lfc
        "56": ((64, 256, 56, 56), (2, 3, 24, 24), False, (8, 8), 2, "auto"),
        "56_always": ((64, 256, 56, 56), (2, 3, 24, 24), False, (8, 8), 2, "always"),
        "56_1bit": ((64, 256, 56, 56), (2, 3, 16, 16), False, (8, 8), 1, "auto"),
        "56_4bit": ((64, 256, 56, 56), (2, 3, 16, 16), False, (8, 8), 4, "auto"),
        "56_8bit": ((64, 256, 56, 56), (2, 3, 16, 16), False, (8, 8), 8, "auto"),
        "112": ((64, 64, 112, 112), (1, 1, 112, 112), False, (8, 8), 2, "auto"),
        "28": ((64, 512, 28, 28), (2, 3, 28, 28), False, (8, 8), 2, "auto"),
        "14": ((256, 1024, 14, 14), (3, 5, 14, 14), False, (8, 8), 2, "auto"),
        "7": ((512, 2048, 7, 7), (9, 3, 7, 7), False, (7, 7), 2, "auto"),
        "channels_last": ((64, 256, 56, 56), (2, 24, 12, 12), True, (8, 8), 2, "auto"),
        "tokens": ((32, 1, 197, 768), (1, 1, 80, 512), False, (8, 1), 2, "auto"),
        "tokens_always": ((64, 1, 197, 3072), (1, 1, 80, 512), False, (8, 1), 2, "always"),
        "block_32": ((32, 48, 56, 56), (1, 3, 35, 32), False, (32, 32), 2, "auto"),
    }
    notes = {"tokens_always": "re-read: a map is a sample, cut into parts; the codes need the extremes of all"}

    def encoded(shape: tuple, channels_last: bool, how: tuple, dtype: torch.dtype, device: str) -> tuple:
        kernel, bits, lfc = how
        x = _case_input(shape, channels_last, dtype, device)
        return x, torch.full((1,), 2**40 + 1, device=device), kernel, bits, "ceil", lfc

    def decoded(shape: tuple, channels_last: bool, how: tuple, dtype: torch.dtype, device: str) -> tuple:
        kernel, bits, _ = how
        code = _empty_code(_empty(shape, dtype, channels_last, torch.device(device)), kernel, bits, "ceil")
        code = Code(code.lfc.normal_(), code.codes.random_(256), code.low.normal_(), code.step.uniform_())
        return code, torch.Size(shape), dtype, channels_last, kernel, bits, "ceil"

    operations = {
        "encode": (encoded, encode_triton, _case_reference, _encode_moved, _encode_floor, ENCODE_CONFIGS),
        "decode": (decoded, decode_triton, decode_reference, _decode_floor, _decode_floor, DECODE_CONFIGS),
    }
    return [
        launch.Case(
            f"division_{operation}_{kind}",
            functools.partial(inputs, shape, channels_last, how),
            *rest,
            tiny=functools.partial(inputs, tiny, channels_last, how),
            notes=notes.get(kind, "") if operation == "encode" else "",
        )
        for kind, (shape, tiny, channels_last, *how) in kinds.items()
        for operation, (inputs, *rest) in operations.items()
        if operation == "encode" or kind not in ("56_always", "tokens_always", "block_32")
    ]
