"""A piecewise-constant derivative of GELU or SiLU: which of 2^bits intervals the input lies in, and nothing else.

    code  = number of borders not above x            0 .. 2^bits - 1
    dx    = dy * levels[code]

Borders and levels minimise the integral of (f' - level)^2 over the line (scripts/fit_few_bit.py). Codes are kept as bit planes, plane
i holding bit i of every code, 8 elements a byte: any number of bits, 3 too, takes bits / 8 bytes an element and no more.

Source: Few-Bit Backward, arXiv 2202.00441; its shipped tables are not optimal, ours are.
"""

import torch
from torch import Tensor

from .compare import DTYPES, least_not_below
from .few_bit_tables import TABLES
from .layout import is_channels_last
from .masks import pack_mask_reference, unpack_mask_reference

BITS = (1, 2, 3, 4)


def code_bytes(count: int, bits: int) -> int:
    """Bytes that the codes of `count` elements take."""
    return bits * ((count + 7) // 8)


def encode_reference(x: Tensor, function: str, bits: int) -> tuple[Tensor, bool]:
    """x (fp64, fp32, fp16 or bf16, any shape and strides) -> (uint8 [bits, ceil(numel / 8)], whether in channels_last order)."""
    codes = torch.zeros_like(x, dtype=torch.uint8, requires_grad=False)
    for border in _BORDERS[function, bits, x.dtype]:
        codes += x >= border
    planes = [pack_mask_reference((codes >> i & 1).bool()) for i in range(bits)]
    return torch.stack(planes), is_channels_last(codes)


def input_grad_reference(dy: Tensor, planes: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    """dx = dy * levels[code], in dy's dtype; computed in fp32, in fp64 for fp64."""
    codes = torch.zeros(dy.shape, dtype=torch.int32, device=dy.device)
    for i, plane in enumerate(planes):
        codes += unpack_mask_reference(plane, dy.shape, channels_last).to(torch.int32) << i
    compute = torch.float64 if dy.dtype == torch.float64 else torch.float32
    levels = torch.tensor(TABLES[function][bits]["levels"], dtype=compute, device=dy.device)
    return (levels[codes] * dy).to(dy.dtype)


_BORDERS = {
    (function, bits, dtype): tuple(least_not_below(border, dtype) for border in table["borders"])
    for function, tables in TABLES.items()
    for bits, table in tables.items()
    for dtype in DTYPES
}
