"""Group quantisation: each group of elements as Q-bit steps between its own least and greatest value, both exact.

    low, step = min(group), (max(group) - min(group)) / (2^Q - 1)     per group, bf16
    code = floor((x - low) / step + noise)      noise uniform in [0, 1): unbiased up to kernels/common/noise.py; noise 1/2: the nearest
    x~   = low + step * code

Bits per element: Q + 32 / (elements of a group). ActNN and GACT take groups of 256 and Q in {1, 2, 4, 8}, Mesa channels and Q = 8.

Sources: ActNN, arXiv 2104.14129; GACT, arXiv 2206.11357; Mesa, arXiv 2111.11124; with DIVISION's repairs (kernels/division): `low` is
rounded down and `step` up to bf16 *before* the codes are made, so that every code lies in [0, 2^Q - 1] and decoding uses the very numbers
encoding used, and the step is kept rather than its inverse, so that a constant group needs no epsilon. Mesa's bounds are
moving averages; ours are each tensor's own.

How x is cut into groups: kernels/common/groups.py.

A group that holds a NaN or an infinity decodes to NaN throughout, as does one whose range exceeds fp32. Ranges whose step is below 2^-126
count as constant. What decodes beyond the finite range of x's dtype, 65504 in fp16, becomes its largest number.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.bits import BITS, pack, packed_bytes, unpack
from actpress.kernels.common.groups import GROUPINGS, LARGEST, Cut, cut
from actpress.kernels.common.launch import cdiv, next_power_of_2
from actpress.kernels.common.layout import dense_as, is_channels_last
from actpress.kernels.common.noise import Source, noise_bits, uniform_from, uniform_reference
from actpress.kernels.common.rounding import bf16_ceil, bf16_floor, finite, poison, saturated
from actpress.kernels.quantize import device as kernels

_PART = 8192  # elements of the parts in which larger ones are measured


class Code(NamedTuple):
    """What is kept of x."""

    codes: Tensor  # uint8 [ceil(numel * Q / 8)], in x's memory order
    low: Tensor  # bf16 [groups], sample by sample
    step: Tensor  # bf16 [groups]


def code_bytes(shape: torch.Size, grouping: str, size: int, bits: int) -> int:
    """Bytes of the Code of a tensor of this shape."""
    return packed_bytes(math.prod(shape), bits) + 4 * cut(shape, False, grouping, size).groups


def encode_reference(x: Tensor, noise: Tensor | None, grouping: str, size: int, bits: int) -> Code:
    """x (any shape; fp64, fp32, fp16 or bf16), noise fp32 of x's shape, or None for the nearest -> Code."""
    channels_last, levels = is_channels_last(x), 2**bits - 1
    where = cut(x.shape, channels_last, grouping, size)
    values = _grouped(_in_memory_order(x, channels_last).to(_compute_dtype(x.dtype)), where)
    by_group = values.transpose(2, 3).contiguous()  # neighbours in memory: several times as fast on a CPU
    low, high = (extreme.unsqueeze(2) for extreme in (by_group.amin(3), by_group.amax(3)))
    low = finite(bf16_floor(low + (poison(low) + poison(high))))
    steps_of_range = torch.full_like(high, levels)  # a tensor: by a number, CUDA multiplies with the number's inverse
    size_of_range = high - low.to(values.dtype)
    step = finite(bf16_ceil((size_of_range + poison(size_of_range)) / steps_of_range))
    least = torch.finfo(step.dtype).tiny  # the inverse of a smaller one may not be finite
    inverse = torch.where(step >= least, 1 / step.to(values.dtype), 0)
    steps = _ungrouped((values - low).mul_(inverse), where)
    steps += 0.5 if noise is None else _in_memory_order(noise, channels_last)
    codes = steps.floor_().clamp_(0, levels).nan_to_num_(levels).to(torch.uint8)
    return Code(pack(codes, bits), low.flatten(), step.flatten())


def decode_reference(
    code: Code, shape: torch.Size, dtype: torch.dtype, channels_last: bool, grouping: str, size: int, bits: int
) -> Tensor:
    """Code -> x~ of `shape` and `dtype`, in the memory format of the encoded tensor."""
    where = cut(shape, channels_last, grouping, size)
    compute = _compute_dtype(dtype)
    values = _grouped(unpack(code.codes, bits, math.prod(shape)).to(compute), where)
    low, step = (t.to(compute).view(where.rows, where.per_channel, 1, where.channels) for t in (code.low, code.step))
    x = _ungrouped(saturated(values.mul_(step).add_(low), dtype), where)
    if channels_last:
        n, c, h, w = shape
        return x.view(n, h, w, c).permute(0, 3, 1, 2)
    return x.view(shape)


def _in_memory_order(x: Tensor, channels_last: bool) -> Tensor:
    return (x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1)


def _grouped(flat: Tensor, where: Cut) -> Tensor:
    """[numel] -> [rows, groups of a channel, size, channels]; short groups are filled up with their last element."""
    if where.length % where.size:
        flat = F.pad(flat.view(1, where.rows, where.length), (0, -where.length % where.size), mode="replicate")
    return flat.view(where.rows, where.per_channel, where.size, where.channels)


def _ungrouped(values: Tensor, where: Cut) -> Tensor:
    return values.view(where.rows, where.per_row * where.size)[:, : where.length].reshape(-1)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


# Elements that a program holds at a time and the warps that hold them; a group that is larger takes more of both.
CONFIGS: tuple[launch.Config, ...] = (
    {"TILE": 4096, "num_warps": 4},
    {"TILE": 4096, "num_warps": 8},
    {"TILE": 2048, "num_warps": 2},
)


def encode_triton(
    x: Tensor, seed: Tensor | None, grouping: str, size: int, bits: int, config: launch.Config = CONFIGS[0]
) -> Code:
    """`encode_reference` with the noise of kernels.noise (seed: int64 [1]; None: to the nearest); equal bit for bit.

    One read of x where groups fit in a program; a second one for groups of more than LARGEST elements, for those that share an eight of
    elements with a neighbour of another program, and, from a cache as long as they fit, for channels in channels_last order.
    """
    channels_last = is_channels_last(x)
    x = x if channels_last else x.contiguous()
    where, device = _cut(tuple(x.shape), channels_last, grouping, size), x.device
    codes = torch.empty(packed_bytes(x.numel(), bits), dtype=torch.uint8, device=device)
    low, step = (torch.empty(where.groups, dtype=torch.bfloat16, device=device) for _ in range(2))
    code = Code(codes, low, step)
    arguments = (x, seed, codes, *_as_integers(code))
    if where.size > LARGEST and where.channels == 1:
        _measure_rows(x, *_as_integers(code), where, bits, config)
        coded = False
    else:
        coded = (_encode_rows if where.channels == 1 else _encode_maps)(*arguments, where, bits, config)
    if not coded:
        grid = (cdiv(x.numel(), config["TILE"]),)
        options = _over_memory(where, bits, config) | {"EIGHTS": config["TILE"] // 8}
        launch.run(kernels.codes_kernel, grid, *arguments, x.numel(), codes.numel(), **options)
    return code


_cut = functools.cache(cut)  # not of symbolic sizes


def _as_integers(code: Code) -> tuple[Tensor, Tensor]:
    """low and step as kernels take them."""
    return code.low.view(torch.int16), code.step.view(torch.int16)


def _encode_rows(x: Tensor, seed, codes: Tensor, low: Tensor, step: Tensor, where: Cut, bits: int, config) -> bool:
    """low and step of groups of consecutive elements. Are these coded, too? That is returned."""
    if _sharing(where := _merged(where)) == 8:
        grid, sizes, options = _aligned(where, x.itemsize, bits, tuple(config.items()))
        launch.run(kernels.aligned_kernel, grid, x, seed, codes, low, step, *sizes, **options)
        return True
    sharing = _sharing(where)
    whole_bytes = where.rows == 1 and where.size * (8 // sharing) <= LARGEST
    _run_rows(x, seed, codes if whole_bytes else None, low, step, where, bits, config)
    return whole_bytes


@functools.cache
def _aligned(where: Cut, itemsize: int, bits: int, config: tuple) -> tuple[tuple[int], tuple[int, ...], launch.Config]:
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


def _measure_rows(x: Tensor, low: Tensor, step: Tensor, where: Cut, bits: int, config: launch.Config) -> None:
    """low and step of groups of whole rows, each in parts."""
    parts = cdiv(where.size, _PART)
    bounds = [x.new_empty(where.rows, parts, dtype=torch.float32) for _ in range(2)]
    _run_rows(x, None, None, *bounds, where._replace(size=_PART), 0, config)
    options = {"PARTS": parts, "BITS": bits, "BLOCK": min(next_power_of_2(parts), 1024)}
    launch.run(kernels.finish_kernel, (where.rows,), *bounds, low, step, **options, num_warps=1, fp_fusion=False)


def _run_rows(x: Tensor, seed, codes, low: Tensor, step: Tensor, where: Cut, bits: int, config) -> None:
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


def _encode_maps(x: Tensor, seed, codes: Tensor, low: Tensor, step: Tensor, where: Cut, bits: int, config) -> bool:
    """low and step of groups that are channels, and codes, if these are a multiple of eight. Are they coded? That is returned."""
    aligned = where.channels % 8 == 0
    grid, sizes, options = _maps(where, x.itemsize, bits, tuple(config.items()))
    inverse = torch.empty(low.shape if aligned else 0, dtype=torch.float32, device=x.device)
    launch.run(kernels.maps_kernel, grid, x, seed, codes if aligned else None, low, step, inverse, *sizes, **options)
    return aligned


@functools.cache
def _maps(where: Cut, itemsize: int, bits: int, config: tuple) -> tuple[tuple[int], tuple[int, ...], launch.Config]:
    """Grid, sizes and options of the kernel for groups that are channels."""
    config, channels = dict(config), _channels_a_program(where, itemsize)
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
    grouping: str,
    size: int,
    bits: int,
    config: launch.Config = CONFIGS[0],
) -> Tensor:
    """`decode_reference` in one pass; equal bit for bit."""
    where = _cut(tuple(shape), channels_last, grouping, size)
    x = _empty(shape, dtype, channels_last, code.codes.device)
    kernel, grid, sizes, options = _decoding(where, x.itemsize, x.numel(), bits, tuple(config.items()))
    launch.run(kernel, grid, code.codes, *_as_integers(code), x, *sizes, **options)
    return x


@functools.cache
def _decoding(
    where: Cut, itemsize: int, count: int, bits: int, config: tuple
) -> tuple[Any, tuple[int], tuple[int, ...], launch.Config]:
    """Kernel, grid, sizes and options to decode `count` elements."""
    config, lanes = dict(config), 16 // itemsize
    if where.channels % 8:
        sizes, options = (count, packed_bytes(count, bits)), _over_memory(where, bits, config)
        options |= {"SLOTS": config["TILE"] // lanes, "LANES": lanes, "SHARE": min(options["SHARE"], lanes)}
        return kernels.decode_kernel, (cdiv(count, config["TILE"]),), sizes, options
    channels = _channels_a_program(where, itemsize)
    programs, pixels = cdiv(where.channels, channels), config["TILE"] // channels
    blocks = cdiv(where.size, pixels)
    options = {"BITS": bits, "PIXELS": pixels, "CHANNELS": channels, "LANES": lanes, **_options(config)}
    sizes = (blocks, programs, where.size, where.channels)
    return kernels.decode_maps_kernel, (where.rows * blocks * programs,), sizes, options


def _empty(shape: Sequence[int], dtype: torch.dtype, channels_last: bool, device: torch.device) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)


def _merged(where: Cut) -> Cut:
    """Rows of whole groups are one row."""
    return where._replace(rows=1, length=where.rows * where.length) if where.length % where.size == 0 else where


def _sharing(where: Cut) -> int:
    """Of eight elements, counted from the first in memory, how many neighbours are of one group wherever they lie: 1, 2, 4 or 8."""
    return math.gcd(where.size, where.length, 8) if where.channels == 1 else 1


def _channels_a_program(where: Cut, itemsize: int) -> int:
    """So many that all their pixels fit in a cache, but at least a sector of memory and no more than there are."""
    fitting = 2**16 // (where.size * itemsize)
    at_most = min(256 // itemsize, max(next_power_of_2(where.channels), 8))
    return max(min(1 << max(fitting, 1).bit_length() - 1, at_most), min(16, at_most))


def _over_memory(where: Cut, bits: int, config: launch.Config) -> dict[str, int | bool]:
    """Options of kernels that run over memory without regard to groups."""
    per_row = where.per_row
    if where.channels == 1 and where.length % where.size == 0:
        per_row, where = 1, where._replace(length=where.size)
    geometry = {"LENGTH": where.length, "SIZE": where.size, "PER_ROW": per_row, "CHANNELS": where.channels}
    return {**geometry, "BITS": bits, "SHARE": _sharing(where), **_options(config)}


def _eights(bits: int, *sizes: int) -> int:
    """Eights that a thread codes: two, which share a draw of noise, where that is of 8 bits and all `sizes` are whole pairs."""
    return 2 if noise_bits(bits) == 8 and math.gcd(*sizes) % 16 == 0 else 1


def _loads_a_thread(elements: int, config: launch.Config) -> int:
    """How many loads, of so many elements each, a thread of a kernel for groups of consecutive elements does."""
    return config["TILE"] // (32 * config["num_warps"] * elements)


def _options(config: launch.Config, elements: int = 0) -> dict[str, int | bool]:
    """Warps, more where a program has more `elements` than TILE; and operations rounded one by one as in the reference."""
    return {"num_warps": config["num_warps"] * max(1, elements // config["TILE"]), "fp_fusion": False}


@torch.library.custom_op("actpress::quantize_encode", mutates_args=())
def _encode(
    x: Tensor, seed: Tensor | None, grouping: str, size: int, bits: int, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = dense_as(x, channels_last)
    return tuple(encode_reference(x, None if seed is None else uniform_from(seed, x), grouping, size, bits))


@_encode.register_fake
def _(
    x: Tensor, seed: Tensor | None, grouping: str, size: int, bits: int, channels_last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    groups = cut(x.shape, is_channels_last(dense_as(x, channels_last)), grouping, size).groups
    codes = x.new_empty(packed_bytes(x.numel(), bits), dtype=torch.uint8)
    return codes, x.new_empty(groups, dtype=torch.bfloat16), x.new_empty(groups, dtype=torch.bfloat16)


launch.on_cuda(_encode, lambda x, *how: tuple(encode_triton(dense_as(x, how[-1]), *how[:-1])))


@torch.library.custom_op("actpress::quantize_decode", mutates_args=())
def _decode(
    codes: Tensor,
    low: Tensor,
    step: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
    grouping: str,
    size: int,
    bits: int,
) -> Tensor:
    return decode_reference(Code(codes, low, step), torch.Size(shape), dtype, channels_last, grouping, size, bits)


@_decode.register_fake
def _(codes: Tensor, low: Tensor, step: Tensor, shape: Sequence[int], dtype, channels_last: bool, *how) -> Tensor:
    return _empty(shape, dtype, channels_last, codes.device)


launch.on_cuda(
    _decode,
    lambda codes, low, step, *how: decode_triton(Code(codes, low, step), *how),
    lambda codes, low, step, shape, dtype, *_: dtype != torch.float64,
)


def encode(
    x: Tensor,
    source: Source | None,
    grouping: str = "group",
    size: int = 256,
    bits: int = 2,
) -> Code:
    """x of any shape, strides and floating dtype -> Code, rounded stochastically; with source=None, to the nearest.

    size is of "group" alone, 1 to LARGEST. Raises ValueError for other values than GROUPINGS and BITS hold."""
    _check(grouping, size, bits)
    if launch.on_gpu(x):
        seed = None if source is None else source.seed_for(x)
        return Code(*launch.way(_encode, x)(x, seed, grouping, size, bits, is_channels_last(x)))
    return encode_reference(x, None if source is None else source.uniform_like(x), grouping, size, bits)


def decode(
    code: Code,
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    grouping: str = "group",
    size: int = 256,
    bits: int = 2,
) -> Tensor:
    """Code, and what x was, -> x~ of `shape` and `dtype`, contiguous or channels_last as x was (layout.is_channels_last)."""
    _check(grouping, size, bits)
    how = (shape, dtype, channels_last, grouping, size, bits)
    if launch.on_gpu(code.codes) and dtype != torch.float64:
        return launch.way(_decode, code.codes)(*code, *how)
    return decode_reference(code, *how)


def _check(grouping: str, size: int, bits: int) -> None:
    for name, value, allowed in (("grouping", grouping, GROUPINGS), ("bits", bits, BITS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}; allowed: {', '.join(map(str, allowed))}")
    if not 1 <= size <= LARGEST:
        raise ValueError(f"size={size}; allowed: 1 to {LARGEST}")


def _case_reference(x: Tensor, seed: Tensor, *how: object) -> Code:
    """The reference with the noise of the kernel."""
    noise = torch.empty_like(x, dtype=torch.float32)
    _in_memory_order(noise, is_channels_last(x)).copy_(uniform_reference(int(seed), x.numel(), noise_bits(how[-1])))
    return encode_reference(x, noise, *how)


def _encode_floor(x: Tensor, seed: Tensor | None, *how: object) -> int:
    return launch.nbytes(x) + code_bytes(x.shape, *how)


def _encode_moved(x: Tensor, seed: Tensor | None, grouping: str, size: int, bits: int) -> int:
    """The seed, which every program reads, comes from a cache."""
    once, where = _encode_floor(x, seed, grouping, size, bits), cut(x.shape, is_channels_last(x), grouping, size)
    if where.channels > 1:
        channels = _channels_a_program(where, x.itemsize)
        coded = where.channels % 8 == 0
        once += 4 * where.groups * coded  # inverses of steps
        on_chip = channels * (where.size * x.itemsize + 8) + packed_bytes(where.size * channels, bits)
        again = launch.nbytes(x) + 6 * where.groups * coded
        return once + (again if on_chip > 96 * 1024 else 0)
    if where.size > LARGEST:  # x again, and bounds of parts written and read
        return once + launch.nbytes(x) + 16 * where.rows * cdiv(where.size, _PART) + 4 * _seen(where)
    return once


def _decode_floor(code: Code, shape: torch.Size, dtype: torch.dtype, *how: object) -> int:
    return launch.nbytes(*code) + math.prod(shape) * dtype.itemsize


def _decode_moved(code: Code, shape: torch.Size, dtype: torch.dtype, channels_last: bool, *how: object) -> int:
    where = cut(shape, channels_last, *how[:2])
    seen = _seen(where)
    if where.channels > 1:
        pixels = CONFIGS[0]["TILE"] // _channels_a_program(where, dtype.itemsize)
        seen = where.groups * cdiv(where.size, pixels)
    return launch.nbytes(code.codes) + math.prod(shape) * dtype.itemsize + 4 * seen


def _seen(where: Cut) -> int:
    """Groups of consecutive elements, each as often as there are programs, of TILE elements, that see some of it."""
    firsts = range(CONFIGS[0]["TILE"], where.rows * where.length, CONFIGS[0]["TILE"])
    return where.groups + sum(first % where.length % where.size != 0 for first in firsts)


def cases() -> list[launch.Case]:
    """Activations of ResNet-50 and ViT-B."""
    reread = "re-read: a group is larger than what a program holds, so bounds come first and codes in a second pass"
    kinds = {  # shape, a tiny one, channels_last, grouping, size, bits
        "groups_2bit": ((64, 256, 56, 56), (2, 3, 9, 11), False, "group", 256, 2),
        "channels_56_2bit": ((64, 256, 56, 56), (2, 5, 8, 8), False, "channel", 256, 2),
        "channels_14_4bit": ((256, 1024, 14, 14), (3, 5, 7, 7), False, "channel", 256, 4),
        "channels_last_56_2bit": ((64, 256, 56, 56), (2, 24, 9, 7), True, "channel", 256, 2),
        "channels_last_14_4bit": ((256, 1024, 14, 14), (3, 8, 7, 7), True, "channel", 256, 4),
        "samples_8bit": ((256, 197, 768), (2, 197, 96), False, "sample", 256, 8),
    }

    def encoded(shape: tuple, channels_last: bool, how: tuple, dtype: torch.dtype, device: str) -> tuple:
        x = torch.randn(shape, dtype=dtype, device=device)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        return x, torch.full((1,), 2**40 + 1, device=device), *how

    def decoded(shape: tuple, channels_last: bool, how: tuple, dtype: torch.dtype, device: str) -> tuple:
        grouping, size, bits = how
        groups = cut(shape, channels_last, grouping, size).groups
        codes = torch.randint(256, (packed_bytes(math.prod(shape), bits),), dtype=torch.uint8, device=device)
        low, step = torch.randn(groups, device=device), torch.rand(groups, device=device)
        code = Code(codes, low.to(torch.bfloat16), step.to(torch.bfloat16))
        return code, torch.Size(shape), dtype, channels_last, *how

    operations = {
        "encode": (encoded, encode_triton, _case_reference, _encode_moved, _encode_floor),
        "decode": (decoded, decode_triton, decode_reference, _decode_moved, _decode_floor),
    }
    return [
        launch.Case(
            f"quantize_{operation}_{kind}",
            functools.partial(inputs, shape, channels_last, how),
            *rest,
            CONFIGS,
            tiny=functools.partial(inputs, tiny, channels_last, how),
            notes=reread if operation == "encode" and kind in ("samples_8bit", "channels_last_56_2bit") else "",
        )
        for kind, (shape, tiny, channels_last, *how) in kinds.items()
        for operation, (inputs, *rest) in operations.items()
    ]
