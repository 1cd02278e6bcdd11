"""Launchers of the Triton kernels of group quantization: which kernels run for a shape, and with which tiles. Device code: kernels.py."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.common.groups import LARGEST, Partition, partition
from actpress.kernels.common.launch import cdiv, next_power_of_2
from actpress.kernels.common.layout import empty, is_channels_last
from actpress.kernels.common.noise import noise_bits
from actpress.kernels.quantize import kernels
from actpress.kernels.quantize.reference import Code, Format

PART = 8192  # elements of the parts in which larger groups are measured

# TILE: elements that a program holds at a time. A larger group takes more elements and more warps.
CONFIGS: tuple[launch.Config, ...] = (
    {"TILE": 4096, "num_warps": 4},
    {"TILE": 4096, "num_warps": 8},
    {"TILE": 2048, "num_warps": 2},
)


def encode_triton(x: Tensor, seed: Tensor | None, format: Format, config: launch.Config = CONFIGS[0]) -> Code:
    """`encode_reference` with the noise of kernels/common/noise.py; equal bit for bit. seed: int64 [1], or None to round to the nearest.

    x is read once where groups fit in a program. It is read twice for groups of more than LARGEST elements, for groups that share an eight
    of elements with a group of another program, and for channels in channels_last order (from a cache as long as they fit).
    """
    channels_last = is_channels_last(x)
    x = x if channels_last else x.contiguous()
    bits, device = format.bits, x.device
    where = _partition(tuple(x.shape), channels_last, format.grouping, format.size)
    codes = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=device)
    low, step = (torch.empty(where.groups, dtype=torch.bfloat16, device=device) for _ in range(2))
    code = Code(codes, low, step)
    arguments = (x, seed, codes, *_as_integers(code))
    if where.size > LARGEST and where.channels == 1:
        _measure_rows(x, *_as_integers(code), where, bits, config)
        done = False
    else:
        done = (_encode_rows if where.channels == 1 else _encode_maps)(*arguments, where, bits, config)
    if not done:
        grid = (cdiv(x.numel(), config["TILE"]),)
        options = _over_memory(where, bits, config) | {"EIGHTS": config["TILE"] // 8}
        launch.run(kernels.codes_kernel, grid, *arguments, x.numel(), codes.numel(), **options)
    return code


_partition = functools.cache(partition)  # not of symbolic sizes


def _as_integers(code: Code) -> tuple[Tensor, Tensor]:
    """low and step as int16, as kernels take them."""
    return code.low.view(torch.int16), code.step.view(torch.int16)


def _encode_rows(
    x: Tensor, seed, codes: Tensor, low: Tensor, step: Tensor, where: Partition, bits: int, config
) -> bool:
    """low and step of groups of consecutive elements. Returns whether the codes were made as well."""
    if _sharing(where := _merged(where)) == 8:
        grid, sizes, options = _aligned(where, x.itemsize, bits, tuple(config.items()))
        launch.run(kernels.aligned_kernel, grid, x, seed, codes, low, step, *sizes, **options)
        return True
    sharing = _sharing(where)
    whole_bytes = where.rows == 1 and where.size * (8 // sharing) <= LARGEST
    _run_rows(x, seed, codes if whole_bytes else None, low, step, where, bits, config)
    return whole_bytes


@functools.cache
def _aligned(
    where: Partition, itemsize: int, bits: int, config: tuple
) -> tuple[tuple[int], tuple[int, ...], launch.Config]:
    """Grid, sizes and options of the kernel for rows whose groups are whole eights."""
    config = dict(config)
    eights = _eights(bits, where.size, where.length)
    slots = next_power_of_2(where.size // (8 * eights))
    groups = max(config["TILE"] // (8 * eights * slots), 1)
    programs = cdiv(where.per_row, groups)
    lanes = max(slots // _loads_a_thread(8 * eights, config), 1)
    tile = {"SIZE": where.size, "BITS": bits, "GROUPS": groups, "SLOTS": slots, "LANES": lanes, "EIGHTS": eights}
    options = {**tile, **_options(config, groups * slots * eights * 8)}
    return (where.rows * programs,), (programs, where.per_row, where.length), options


def _measure_rows(x: Tensor, low: Tensor, step: Tensor, where: Partition, bits: int, config: launch.Config) -> None:
    """low and step of groups that are whole rows, measured in parts."""
    parts = cdiv(where.size, PART)
    bounds = [x.new_empty(where.rows, parts, dtype=torch.float32) for _ in range(2)]
    _run_rows(x, None, None, *bounds, where._replace(size=PART), 0, config)
    options = {"PARTS": parts, "BITS": bits, "BLOCK": min(next_power_of_2(parts), 1024)}
    launch.run(kernels.finish_kernel, (where.rows,), *bounds, low, step, **options, num_warps=1, fp_fusion=False)


def _run_rows(x: Tensor, seed, codes, low: Tensor, step: Tensor, where: Partition, bits: int, config) -> None:
    block = max(next_power_of_2(where.size), 8)
    groups = max(config["TILE"] // block, 1 if codes is None else 8 // _sharing(where))
    programs = cdiv(where.per_row, groups)
    launch.run(
        kernels.rows_kernel,
        (where.rows * programs,),
        *(x, seed, codes, low, step),
        *(programs, where.per_row, where.length, 0 if codes is None else codes.numel()),
        SIZE=where.size,
        BITS=bits,
        GROUPS=groups,
        BLOCK=block,
        LANES=max(block // _loads_a_thread(math.gcd(where.size, 16 // x.itemsize), config), 16 // x.itemsize),
        EIGHTS=next_power_of_2(groups * where.size // 8),
        SHARE=_sharing(where),
        **_options(config, groups * block),
    )


def _encode_maps(
    x: Tensor, seed, codes: Tensor, low: Tensor, step: Tensor, where: Partition, bits: int, config
) -> bool:
    """low and step of groups that are channels, and codes if channels are a multiple of eight. Returns whether the codes were made."""
    aligned = where.channels % 8 == 0
    grid, sizes, options = _maps(where, x.itemsize, bits, tuple(config.items()))
    inverse = torch.empty(low.shape if aligned else 0, dtype=torch.float32, device=x.device)
    launch.run(kernels.maps_kernel, grid, x, seed, codes if aligned else None, low, step, inverse, *sizes, **options)
    return aligned


@functools.cache
def _maps(
    where: Partition, itemsize: int, bits: int, config: tuple
) -> tuple[tuple[int], tuple[int, ...], launch.Config]:
    """Grid, sizes and options of the kernel for groups that are channels."""
    config, channels = dict(config), channels_a_program(where, itemsize)
    programs = cdiv(where.channels, channels)
    tile = {"SIZE": where.size, "PIXELS": config["TILE"] // channels, "CHANNELS": channels}
    tile |= {"ALIGNED": where.channels % 8 == 0, "EIGHTS": _eights(bits, where.channels, channels)}
    options = {"BITS": bits, **tile, **_options(config)}
    return (where.rows * programs,), (programs, where.channels), options


def decode_triton(
    code: Code,
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    format: Format,
    config: launch.Config = CONFIGS[0],
) -> Tensor:
    """`decode_reference` in one pass; equal bit for bit."""
    where = _partition(tuple(shape), channels_last, format.grouping, format.size)
    x = empty(shape, dtype, code.codes.device, channels_last)
    kernel, grid, sizes, options = _decoding(where, x.itemsize, x.numel(), format.bits, tuple(config.items()))
    launch.run(kernel, grid, code.codes, *_as_integers(code), x, *sizes, **options)
    return x


@functools.cache
def _decoding(
    where: Partition, itemsize: int, count: int, bits: int, config: tuple
) -> tuple[Any, tuple[int], tuple[int, ...], launch.Config]:
    """Kernel, grid, sizes and options to decode `count` elements."""
    config, lanes = dict(config), 16 // itemsize
    if where.channels % 8:
        sizes, options = (count, packed_bytes(count, bits)), _over_memory(where, bits, config)
        options |= {"SLOTS": config["TILE"] // lanes, "LANES": lanes, "SHARE": min(options["SHARE"], lanes)}
        return kernels.decode_kernel, (cdiv(count, config["TILE"]),), sizes, options
    channels = channels_a_program(where, itemsize)
    programs, pixels = cdiv(where.channels, channels), config["TILE"] // channels
    blocks = cdiv(where.size, pixels)
    options = {"BITS": bits, "PIXELS": pixels, "CHANNELS": channels, "LANES": lanes, **_options(config)}
    sizes = (blocks, programs, where.size, where.channels)
    return kernels.decode_maps_kernel, (where.rows * blocks * programs,), sizes, options


def _merged(where: Partition) -> Partition:
    """Rows that consist of whole groups, as one row."""
    return where._replace(rows=1, length=where.rows * where.length) if where.length % where.size == 0 else where


def _sharing(where: Partition) -> int:
    """How many neighbours among eight elements are of one group, wherever the eight lie: 1, 2, 4 or 8."""
    return math.gcd(where.size, where.length, 8) if where.channels == 1 else 1


def channels_a_program(where: Partition, itemsize: int) -> int:
    """Channels of a program: their pixels fit in a cache, they fill at least a sector of memory, and they are no more than exist."""
    fitting = 2**16 // (where.size * itemsize)
    at_most = min(256 // itemsize, max(next_power_of_2(where.channels), 8))
    return max(min(1 << max(fitting, 1).bit_length() - 1, at_most), min(16, at_most))


def _over_memory(where: Partition, bits: int, config: launch.Config) -> dict[str, int | bool]:
    """Options of kernels that run over memory in order, whatever the groups."""
    per_row = where.per_row
    if where.channels == 1 and where.length % where.size == 0:
        per_row, where = 1, where._replace(length=where.size)
    geometry = {"LENGTH": where.length, "SIZE": where.size, "PER_ROW": per_row, "CHANNELS": where.channels}
    return {**geometry, "BITS": bits, "SHARE": _sharing(where), **_options(config)}


def _eights(bits: int, *sizes: int) -> int:
    """Eights that a thread encodes: two, which share a draw of 8-bit noise, where all `sizes` are multiples of 16; otherwise one."""
    return 2 if noise_bits(bits) == 8 and math.gcd(*sizes) % 16 == 0 else 1


def _loads_a_thread(elements: int, config: launch.Config) -> int:
    """Loads of `elements` elements each that a thread does in a kernel for groups of consecutive elements."""
    return config["TILE"] // (32 * config["num_warps"] * elements)


def _options(config: launch.Config, elements: int = 0) -> dict[str, int | bool]:
    """num_warps, more where a program has more `elements` than TILE; every operation is rounded, as in the reference."""
    return {"num_warps": config["num_warps"] * max(1, elements // config["TILE"]), "fp_fusion": False}
