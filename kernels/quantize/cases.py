"""Group quantization: cases that are proven and timed, and the bytes that they move."""

import functools
import math

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.common.groups import LARGEST, Partition
from actpress.kernels.common.launch import cdiv
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.common.noise import noise_bits, uniform_reference
from actpress.kernels.quantize.reference import (
    Code,
    Format,
    code_bytes,
    decode_reference,
    encode_reference,
    in_memory_order,
)
from actpress.kernels.quantize.triton import CONFIGS, PART, channels_a_program, decode_triton, encode_triton


def _case_reference(x: Tensor, seed: Tensor, format: Format) -> Code:
    """The reference with the noise of the kernel."""
    noise = torch.empty_like(x, dtype=torch.float32)
    in_memory_order(noise, is_channels_last(x)).copy_(uniform_reference(int(seed), x.numel(), noise_bits(format.bits)))
    return encode_reference(x, noise, format)


def _encode_floor(x: Tensor, seed: Tensor | None, format: Format) -> int:
    return launch.nbytes(x) + code_bytes(x.shape, format)


def encode_moved(x: Tensor, seed: Tensor | None, format: Format) -> int:
    """Bytes that `encode_triton` moves. The seed, which every program reads, comes from a cache."""
    once, where = _encode_floor(x, seed, format), format.groups(x.shape, is_channels_last(x))
    if where.channels > 1:
        channels = channels_a_program(where, x.itemsize)
        aligned = where.channels % 8 == 0
        once += 4 * where.groups * aligned  # inverses of steps
        on_chip = channels * (where.size * x.itemsize + 8) + packed_bytes(where.size * channels, format.bits)
        again = launch.nbytes(x) + 6 * where.groups * aligned
        return once + (again if on_chip > 96 * 1024 else 0)
    if where.size > LARGEST:  # x again, and bounds of parts written and read
        return once + launch.nbytes(x) + 16 * where.rows * cdiv(where.size, PART) + 4 * _seen(where)
    return once


def _decode_floor(code: Code, shape: torch.Size, dtype: torch.dtype, channels_last: bool, format: Format) -> int:
    return launch.nbytes(*code) + math.prod(shape) * dtype.itemsize


def decode_moved(code: Code, shape: torch.Size, dtype: torch.dtype, channels_last: bool, format: Format) -> int:
    """Bytes that `decode_triton` moves."""
    where = format.groups(shape, channels_last)
    seen = _seen(where)
    if where.channels > 1:
        pixels = CONFIGS[0]["TILE"] // channels_a_program(where, dtype.itemsize)
        seen = where.groups * cdiv(where.size, pixels)
    return launch.nbytes(code.codes) + math.prod(shape) * dtype.itemsize + 4 * seen


def _seen(where: Partition) -> int:
    """Groups of consecutive elements; a group counts once for each program of TILE elements that reads a part of it."""
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

    def encoded(shape: tuple, channels_last: bool, format: Format, dtype: torch.dtype, device: str) -> tuple:
        x = torch.randn(shape, dtype=dtype, device=device)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        return x, torch.full((1,), 2**40 + 1, device=device), format

    def decoded(shape: tuple, channels_last: bool, format: Format, dtype: torch.dtype, device: str) -> tuple:
        groups = format.groups(shape, channels_last).groups
        codes = torch.randint(256, (packed_bytes(math.prod(shape), format.bits),), dtype=torch.uint8, device=device)
        low, step = torch.randn(groups, device=device), torch.rand(groups, device=device)
        code = Code(codes, low.to(torch.bfloat16), step.to(torch.bfloat16))
        return code, torch.Size(shape), dtype, channels_last, format

    operations = {
        "encode": (encoded, encode_triton, _case_reference, encode_moved, _encode_floor),
        "decode": (decoded, decode_triton, decode_reference, decode_moved, _decode_floor),
    }
    return [
        launch.Case(
            f"quantize_{operation}_{kind}",
            functools.partial(inputs, shape, channels_last, Format(*how)),
            *rest,
            CONFIGS,
            tiny=functools.partial(inputs, tiny, channels_last, Format(*how)),
            notes=reread if operation == "encode" and kind in ("samples_8bit", "channels_last_56_2bit") else "",
        )
        for kind, (shape, tiny, channels_last, *how) in kinds.items()
        for operation, (inputs, *rest) in operations.items()
    ]
