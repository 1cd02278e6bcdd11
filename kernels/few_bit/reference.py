"""A piecewise-constant derivative of GELU or SiLU, in plain PyTorch. Only the interval that the input lies in is saved.

    code  = number of borders that are not above x   0 .. 2^bits - 1
    dx    = dy * levels[code]

Borders and levels minimise the integral of (f' - level)^2 over the line (scripts/dev/fit_few_bit.py). The source is Few-Bit Backward,
arXiv 2202.00441. The tables that it ships are not optimal; ours are.

Layout of the code, one uint8 tensor:

    bit planes   [bits, ceil(numel / 8)]   plane i holds bit i of every code, 8 elements per byte; so 3 bits take 3/8 byte per element
    NaN flags    [ceil(numel / CHUNK)]     one byte per CHUNK elements: whether one of them is NaN

NaN lies in no interval. dx is NaN for all elements of a chunk that holds a NaN; stock PyTorch's dx is NaN for that element only.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.common.compare import DTYPES, least_not_below
from actpress.kernels.common.dtypes import compute_dtype
from actpress.kernels.common.layout import dense, is_channels_last
from actpress.kernels.few_bit.tables import TABLES
from actpress.kernels.inverted.reference import STOCK
from actpress.kernels.masks import pack_mask_reference, unpack_mask_reference

BITS = (1, 2, 3, 4)
CHUNK = 1024  # elements, next to each other in memory


def code_bytes(count: int, bits: int) -> int:
    """Bytes of the code of `count` elements."""
    return bits * packed_bytes(count, 1) + _chunks(count)


def planes_of(code: Tensor, count: int, bits: int) -> tuple[Tensor, Tensor]:
    """Splits the code of `count` elements into views: bit planes, uint8 [bits, ceil(count / 8)], and NaN flags, uint8 [chunks]."""
    planes, nans = code.split([bits * packed_bytes(count, 1), _chunks(count)])
    return planes.view(bits, packed_bytes(count, 1)), nans


def _chunks(count: int) -> int:
    return (count + CHUNK - 1) // CHUNK


def encode_reference(x: Tensor, function: str, bits: int) -> Tensor:
    """The code of x (fp64, fp32, fp16 or bf16, any shape and strides), uint8 [code_bytes], in the order of dense(x)."""
    x = dense(x)
    codes = torch.zeros_like(x, dtype=torch.uint8, requires_grad=False)
    for border in BORDERS[function, bits, x.dtype]:
        codes += x >= border
    planes = [pack_mask_reference((codes >> i & 1).bool()) for i in range(bits)]
    nans = (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).isnan().reshape(-1)
    nans = F.pad(nans, (0, -nans.numel() % CHUNK)).view(-1, CHUNK).any(1).to(torch.uint8)
    return torch.cat([*planes, nans])


def forward_reference(x: Tensor, function: str, bits: int) -> tuple[Tensor, Tensor]:
    """(function(x) as stock PyTorch computes it, its code), both in the order of dense(x)."""
    x = dense(x)
    return STOCK[function](x), encode_reference(x, function, bits)


def input_grad_reference(dy: Tensor, code: Tensor, function: str, bits: int, channels_last: bool) -> Tensor:
    """dx = dy * levels[code] in dy's dtype; NaN in chunks that hold one. Computed in fp32, in fp64 for fp64."""
    planes, nans = planes_of(code, dy.numel(), bits)
    codes = torch.zeros(dy.shape, dtype=torch.int32, device=dy.device)
    for i, plane in enumerate(planes):
        codes += unpack_mask_reference(plane, dy.shape, channels_last).to(torch.int32) << i
    compute = compute_dtype(dy.dtype)
    levels = torch.tensor(TABLES[function][bits]["levels"], dtype=compute, device=dy.device)
    dx = levels[codes] * dy
    nans = nans.repeat_interleave(CHUNK)[: dx.numel()] != 0
    n, c, h, w = dx.shape if channels_last else (1,) * 4
    nans = nans.view(n, h, w, c).permute(0, 3, 1, 2) if channels_last else nans.view(dx.shape)
    return dx.masked_fill_(nans, torch.nan).to(dy.dtype)


# x >= border in x's dtype exactly where x is at or above the border of the table
BORDERS = {
    (function, bits, dtype): tuple(least_not_below(border, dtype) for border in table["borders"])
    for function, tables in TABLES.items()
    for bits, table in tables.items()
    for dtype in DTYPES
}
