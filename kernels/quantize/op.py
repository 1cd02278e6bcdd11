"""Group quantization: registered operations and public functions."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import empty
from actpress.kernels.common.noise import Source, uniform_from
from actpress.kernels.quantize.reference import Code, Format, decode_reference, empty_code, encode_reference
from actpress.kernels.quantize.triton import decode_triton, encode_triton


def _encode_reference(
    x: Tensor, seed: Tensor | None, grouping: str, size: int, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    noise = None if seed is None else uniform_from(seed, x)
    return encode_reference(x, noise, Format(grouping, size, bits))


def _decode_reference(
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
    format = Format(grouping, size, bits)
    return decode_reference(Code(codes, low, step), torch.Size(shape), dtype, channels_last, format)


_known_format = functools.cache(Format)  # for numbers that are not symbolic: launchers look their plans up by it

_encode = launch.operation(
    "quantize_encode",
    _encode_reference,
    lambda x, seed, *format: encode_triton(x, seed, _known_format(*format)),
    lambda x, seed, *format: empty_code(x, Format(*format)),
    in_order=["x"],
)
_decode = launch.operation(
    "quantize_decode",
    _decode_reference,
    lambda codes, low, step, shape, dtype, channels_last, *format: decode_triton(
        Code(codes, low, step), shape, dtype, channels_last, _known_format(*format)
    ),
    lambda codes, low, step, shape, dtype, channels_last, *_: empty(shape, dtype, codes.device, channels_last),
    fits=lambda codes, low, step, shape, dtype, *_: dtype != torch.float64,
)


def encode(x: Tensor, source: Source | None, format: Format) -> Code:
    """x of any shape, strides and floating dtype -> Code, rounded stochastically; with source=None, to the nearest.

    Raises ValueError for a `format` that Format.check refuses.
    """
    format.check()
    if launch.on_gpu(x):
        seed = None if source is None else source.seed_for(x)
        return Code(*_encode(x, seed, format.grouping, format.size, format.bits))
    return encode_reference(x, None if source is None else source.uniform_like(x), format)


def decode(code: Code, shape: torch.Size, dtype: torch.dtype, channels_last: bool, format: Format) -> Tensor:
    """Code, and what x was, -> x~ of `shape` and `dtype`, contiguous or channels_last as x was (layout.is_channels_last).

    Raises ValueError for a `format` that Format.check refuses.
    """
    format.check()
    if launch.on_gpu(code.codes) and dtype != torch.float64:
        return _decode(*code, shape, dtype, channels_last, format.grouping, format.size, format.bits)
    return decode_reference(code, shape, dtype, channels_last, format)
