"""DIVISION's code: registered operations and public functions."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import empty
from actpress.kernels.common.noise import Source, uniform_from
from actpress.kernels.division.reference import Code, Format, decode_reference, empty_code, encode_reference
from actpress.kernels.division.triton import decode_triton, encode_triton


def _format(kernel: Sequence[int], *rest: int | str) -> Format:
    """The Format whose fields are arguments of a registered operation."""
    return Format(tuple(kernel), *rest)


_known_format = functools.cache(Format)  # for numbers that are not symbolic: launchers look their plans up by it


def _encode_reference(
    x: Tensor, seed: Tensor, kernel: Sequence[int], bits: int, align: str, lfc: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return encode_reference(x, uniform_from(seed, x), _format(kernel, bits, align, lfc))


def _decode_reference(
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
    return decode_reference(code, torch.Size(shape), dtype, channels_last, _format(kernel, bits, align), mask)


_encode = launch.operation(
    "division_encode",
    _encode_reference,
    lambda x, seed, kernel, *rest: encode_triton(x, seed, _known_format(tuple(kernel), *rest)),
    lambda x, seed, *format: empty_code(x, _format(*format)),
    in_order=["x"],
)
_decode = launch.operation(
    "division_decode",
    _decode_reference,
    lambda lfc, codes, low, step, shape, dtype, channels_last, kernel, bits, align, mask: decode_triton(
        Code(lfc, codes, low, step), shape, dtype, channels_last, _known_format(tuple(kernel), bits, align), mask
    ),
    lambda lfc, codes, low, step, shape, dtype, channels_last, *_: empty(shape, dtype, codes.device, channels_last),
    fits=lambda lfc, codes, low, step, shape, dtype, *_: dtype != torch.float64,
)


def encode(x: Tensor, source: Source, format: Format) -> Code:
    """x [N, C, H, W] of any strides and floating dtype -> Code, with noise from `source`."""
    if launch.on_gpu(x):
        return Code(*_encode(x, source.seed_for(x), format.kernel, format.bits, format.align, format.lfc))
    return encode_reference(x, source.uniform_like(x), format)


def decode(
    code: Code,
    shape: torch.Size,
    dtype: torch.dtype,
    channels_last: bool,
    format: Format,
    mask: Tensor | None = None,
) -> Tensor:
    """The inverse: x~ of `shape` and `dtype`, in channels_last or row-major order; zero where the packed mask, if any, is 0."""
    if launch.on_gpu(code.codes) and dtype != torch.float64:
        return _decode(*code, shape, dtype, channels_last, format.kernel, format.bits, format.align, mask)
    return decode_reference(code, shape, dtype, channels_last, format, mask)
