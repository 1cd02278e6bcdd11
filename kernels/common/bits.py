"""Packing small unsigned codes into bytes, neighbours together: code i of a byte sits at bits [i * Q, (i + 1) * Q).

Q is 1, 2, 4 or 8. n codes take ceil(n * Q / 8) bytes, so a 1-bit mask is 1/32 of an fp32 tensor.

Kernels work on groups of eight codes, which fill Q whole bytes. Their shared parts: `load8` loads the elements to encode; `pack8`, `words8`
and `store_words` pack codes; `unpack_at` loads codes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.launch import tl, triton

BITS = (1, 2, 4, 8)
_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of so many bytes; the lowest comes first
# The bits of the lowest code in each byte of such a word. A table, as Dynamo 2.11 does not trace int.from_bytes.
_LOWEST = {2: 0x0F0F, 4: 0x03030303, 8: 0x0101010101010101}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (any shape, bool or uint8, each below 2**bits) in row-major order -> uint8 [packed_bytes]."""
    codes = codes.reshape(-1)
    if codes.dtype == torch.bool:  # Inductor 2.11 has no view of it; compiled, a cast costs nothing
        codes = codes.to(torch.uint8) if torch.compiler.is_compiling() else codes.view(torch.uint8)
    per_byte = 8 // bits
    if per_byte == 1:
        return codes.clone()
    codes = F.pad(codes, (0, -codes.numel() % per_byte)).view(-1, per_byte)  # a copy: [bytes, codes of one byte]
    words = codes.view(_WORDS[per_byte]).squeeze(1)
    for doubling in range(per_byte.bit_length() - 1):  # joins neighbours, then pairs, then fours
        # not in place: Inductor 2.11 would write back through the view
        words = words | words >> ((8 - bits) << doubling)
    return words.to(torch.uint8)  # the lowest byte


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 [packed_bytes] -> uint8 [count]."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    words = packed.to(_WORDS[per_byte])
    for doubling in range(per_byte.bit_length() - 1):  # each copy shifts other codes to the lowest bits of their bytes
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


@triton.jit
def words8(codes, BITS: tl.constexpr):
    """The 8 BITS bits of each eight, BITS up to 4: uint32 [G, 8] -> uint32 [G]."""
    return tl.sum(codes << (BITS * tl.arange(0, 8))[None, :], axis=1)


@triton.jit
def store_words(ptr, codes, first, mask, BITS: tl.constexpr):
    """Store codes of elements from each of `first` on to the bytes after ptr, one store a thread.

    codes: a tuple of uint32 [G, 8], one eight or two neighbouring ones. first: int [G], multiples of 8, or of 16 for two eights.
    """
    if len(codes) == 2:
        WORD: tl.constexpr = tl.uint16 if BITS == 1 else tl.uint32
        words = (words8(codes[0], BITS).to(tl.uint16) | (words8(codes[1], BITS) << (8 * BITS))).to(WORD)
        tl.store(ptr.to(tl.pointer_type(WORD)) + first // 16, words, mask=mask)
    elif BITS == 8:
        words = tl.sum(tl.reshape(codes[0], [first.shape[0], 2, 4]) << (8 * tl.arange(0, 4))[None, None, :], axis=2)
        word = first[:, None] // 4 + tl.arange(0, 2)[None, :]
        tl.store(ptr.to(tl.pointer_type(tl.uint32)) + word, words, mask=mask[:, None])
    else:
        WORD: tl.constexpr = tl.uint8 if BITS == 1 else tl.uint16 if BITS == 2 else tl.uint32
        tl.store(ptr.to(tl.pointer_type(WORD)) + first // 8, words8(codes[0], BITS).to(WORD), mask=mask)


@triton.jit
def load_at(ptr, at, limit, LANES: tl.constexpr, WHOLE: tl.constexpr):
    """Load LANES neighbours from each of `at` on: [...] -> [..., LANES]; unless WHOLE, 0 from element `limit` on."""
    element = tl.expand_dims(at, -1) + tl.arange(0, LANES)
    if WHOLE:
        return tl.load(ptr + element)
    else:
        return tl.load(ptr + element, mask=element < limit, other=0.0)


@triton.jit
def load8(ptr, at, limit, WHOLE: tl.constexpr):
    """Load eights from each of `at` on: [...] -> fp32 [..., 8]. One thread holds an eight; fp32 is loaded in halves of 16 bytes."""
    if ptr.dtype.element_ty.primitive_bitwidth == 32:
        x = tl.join(load_at(ptr, at, limit, 4, WHOLE), load_at(ptr, at + 4, limit, 4, WHOLE))  # [..., 4, 2]
        if len(at.shape) == 1:
            return tl.reshape(tl.permute(x, (0, 2, 1)), [at.shape[0], 8])
        else:
            return tl.reshape(tl.permute(x, (0, 1, 3, 2)), [at.shape[0], at.shape[1], 8])
    else:
        return load_at(ptr, at, limit, 8, WHOLE).to(tl.float32)


@triton.jit
def unpack_at(ptr, first, total, BITS: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr):
    """Load codes of LANES neighbours from each of `first` on: [...] -> int32 [..., LANES].

    LANES is 4 or 8, and `first` are multiples of it. ptr[0] holds the code of element 0; unless WHOLE, bytes from `total` on are 0.
    """
    BYTES: tl.constexpr = (LANES * BITS + 7) // 8
    byte = first // LANES * BYTES if LANES * BITS >= 8 else first * BITS // 8
    byte = tl.expand_dims(byte, -1) + tl.arange(0, BYTES)
    if WHOLE:
        packed = tl.load(ptr + byte).to(tl.int32)
    else:
        packed = tl.load(ptr + byte, mask=byte < total, other=0).to(tl.int32)
    if LANES * BITS < 8:  # half a byte
        packed = packed >> tl.expand_dims((first % 8).to(tl.int32), -1)
    codes = tl.expand_dims(packed, -1) >> (tl.arange(0, LANES // BYTES) * BITS)
    if len(first.shape) == 1:
        return tl.reshape(codes, [first.shape[0], LANES]) & (2**BITS - 1)
    else:
        return tl.reshape(codes, [first.shape[0], first.shape[1], LANES]) & (2**BITS - 1)
