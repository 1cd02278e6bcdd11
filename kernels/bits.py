"""Packing small unsigned codes into bytes, neighbours together: code i of a byte sits at bits [i * Q, (i + 1) * Q).

Q is 1, 2, 4 or 8. n codes take ceil(n * Q / 8) bytes, so a 1-bit mask is 1/32 of an fp32 tensor.

Kernels work on groups of eight codes, which fill Q whole bytes: `pack8` and `unpack8` are the parts they share.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .launch import tl, triton

BITS = (1, 2, 4, 8)
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes; the lowest comes first
# In each byte of such a word the bits of the lowest code. A table, as int.from_bytes is nothing that Dynamo 2.11 traces.
_LOWEST = {2: 0x0F0F, 4: 0x03030303, 8: 0x0101010101010101}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, bool or uint8, each below 2**bits) in row-major order -> uint8 [packed_bytes]."""
    codes = codes.reshape(-1)
    codes = codes.view(torch.uint8) if codes.dtype == torch.bool else codes
    per_byte = 8 // bits
    if per_byte == 1:
        return codes.clone()
    codes = F.pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)  # a copy: [bytes, codes of one byte]
    words = codes.view(_WORDS[per_byte]).squeeze(1)
    for doubling in range(per_byte.bit_length() - 1):  # neighbours move together, then pairs, then fours
        words = words | words >> (
            (8 - bits) << doubling
        )  # not in place: Inductor 2.11 would write back through the view
    return words.to(torch.uint8)  # the lowest byte


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [packed_bytes] -> uint8 [count]."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    words = packed.to(_WORDS[per_byte])
    for doubling in range(per_byte.bit_length() - 1):  # each copy brings other codes to the foot of their bytes
        words |= words << ((8 - bits) << doubling)
    words &= _LOWEST[per_byte]
    return words.view(torch.uint8)[:count]


@triton.jit
def pack8(codes, BITS: tl.constexpr):
    """int32 codes [G, 8], each below 2^BITS -> uint8 [G, BITS]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    codes = tl.reshape(codes, [codes.shape[0], BITS, PER_BYTE])
    shifts = tl.arange(0, PER_BYTE) * BITS
    return tl.sum(codes << shifts[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpack8(packed, BITS: tl.constexpr):
    """The inverse: uint8 [G, BITS] -> int32 [G, 8]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    shifts = tl.arange(0, PER_BYTE) * BITS
    codes = (packed.to(tl.int32)[:, :, None] >> shifts[None, None, :]) & (2**BITS - 1)
    return tl.reshape(codes, [packed.shape[0], 8])
