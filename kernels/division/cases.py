"""DIVISION's code: cases that are proven and timed."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import empty, is_channels_last
from actpress.kernels.common.noise import noise_bits, uniform_reference
from actpress.kernels.division.plan import DECODE_CONFIGS, ENCODE_CONFIGS, Strategy, in_order, strategy_of
from actpress.kernels.division.reference import (
    Code,
    Format,
    code_bytes,
    decode_reference,
    empty_code,
    encode_reference,
    upsample,
)
from actpress.kernels.division.triton import decode_triton, encode_triton

L2 = 24 * 2**20  # bytes of x that a GPU's last cache keeps from one kernel to the next: half of an H100's


def _case_reference(x: Tensor, seed: Tensor, format: Format) -> Code:
    """What `encode_triton` computes: its noise lies in memory order."""
    shape = (x.shape[0], *x.shape[2:], x.shape[1]) if is_channels_last(x) else x.shape
    noise = uniform_reference(int(seed), x.numel(), noise_bits(format.bits)).view(shape).to(x.device)
    return encode_reference(x, noise.permute(0, 3, 1, 2) if is_channels_last(x) else noise, format)


def _case_input(shape: Sequence[int], channels_last: bool, dtype: torch.dtype, device: str) -> Tensor:
    """Maps after a ReLU and smooth ones in turn, each clearly better one way, of multiples of 1/64, whose sums are exact."""
    n, c, h, w = shape
    blocks = Format((8, 8), 2)
    coarse = torch.randn(n, c, *blocks.grid(h, w), device=device)
    smooth = torch.arange(n * c, device=device).view(n, c, 1, 1) % 2 == 1
    x = torch.randn(shape, device=device)
    x = torch.where(smooth, x + 8 * upsample(coarse, (h, w), blocks), x.relu())
    return empty(shape, dtype, x.device, channels_last).copy_((x * 64).round_().div_(64))


def _encode_floor(x: Tensor, seed: Tensor, format: Format) -> int:
    return launch.nbytes(x) + code_bytes(x.shape, format)


def _encode_moved(x: Tensor, seed: Tensor, format: Format) -> int:
    """What kernels read and write, with scratch memory.

    Not counted: zeros written over means, which depend on x, and code parameters that another program has read before (from a cache).
    """
    plan, outers, programs, _, parts = _strategy(x, format)
    maps = x.shape[0] * x.shape[1]
    moved = _encode_floor(x, seed, format) + 4 * maps  # and the inverse of step
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


def _strategy(x: Tensor, format: Format) -> Strategy:
    channels_last, config = is_channels_last(x), ENCODE_CONFIGS[0]
    return strategy_of(tuple(x.shape), channels_last, x.itemsize, format, *config.values())


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
    notes = {"tokens_always": "re-read: a map is a sample, split into parts; the codes need the extremes of all"}

    def encoded(shape: tuple, channels_last: bool, how: tuple, dtype: torch.dtype, device: str) -> tuple:
        kernel, bits, lfc = how
        x = _case_input(shape, channels_last, dtype, device)
        return x, torch.full((1,), 2**40 + 1, device=device), Format(kernel, bits, "ceil", lfc)

    def decoded(shape: tuple, channels_last: bool, how: tuple, dtype: torch.dtype, device: str) -> tuple:
        kernel, bits, _ = how
        format = Format(kernel, bits, "ceil")
        code = empty_code(empty(shape, dtype, torch.device(device), channels_last), format)
        code = Code(code.lfc.normal_(), code.codes.random_(256), code.low.normal_(), code.step.uniform_())
        return code, torch.Size(shape), dtype, channels_last, format

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
