"""Uniform noise for stochastic rounding, from a counter: Philox 4x32, 7 rounds, 16 or 8 bits an element.

Elements are numbered in memory order. Each call of philox(seed, counter = g) makes 128 bits, four words, for a group g of neighbours:

    noise bits   elements of a group   element's bits, the low ones first     used for
    16           8                     i-th half of a word, two a word        4- and 8-bit codes, dropout
    8            16                    i-th byte of a word, four a word       1- and 2-bit codes

noise = (bits + 1/2) / 2^n with n noise bits. It lies in (0, 1), is exact in fp32, takes each of 2^n values equally often and has mean 1/2
exactly. A value that lies a fraction f of a step above a code is rounded up with the probability f, rounded to a multiple of 2^-n. So the
bias of rounding is at most half of that: 2^-17 of a step with 16 bits, 2^-9 with 8. The bias depends on f alone. It is 0 where f is a
multiple of 2^-n (zeros, and all that a code holds exactly) and averages to 0 over any interval of 2^-n. For comparison, the standard
deviation of stochastic rounding itself is sqrt(f (1 - f)), up to 1/2 of a step.

Seven rounds pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). With the full ten rounds and 32 bits an
element, arithmetic instead of memory would limit a kernel.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from actpress.kernels.common.launch import tl, triton

ROUNDS = 7
_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


class Source(Protocol):
    """The source of an encoder's noise (codec.Context). Each call is a new draw."""

    def uniform_like(self, x: Tensor) -> Tensor:
        """fp32 noise in [0, 1) of x's shape, device and memory format: for references."""
        ...

    def seed_for(self, x: Tensor) -> Tensor:
        """A seed for kernels, which make their noise from it: int64 [1] on x's device, not negative.

        A later draw may overwrite it, so code that reads it after the forward pass keeps a clone.
        """
        ...


def uniform_from(seed: Tensor | int, x: Tensor) -> Tensor:
    """fp32 noise in [0, 1) of x's shape, device and memory format from a seed: for registered operations where no kernel runs."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x, dtype=torch.float32, requires_grad=False).uniform_(generator=generator)


def noise_bits(bits: int) -> int:
    """Bits of noise for an element of a code of `bits` bits."""
    return 8 if bits <= 2 else 16


def uniform_reference(seed: int, count: int, bits: int = 16) -> Tensor:
    """The noise that kernels draw for elements 0 .. count - 1: fp32 [count]. seed: 0 <= seed < 2^63. bits of noise: 16 or 8."""
    low32 = np.uint64(0xFFFFFFFF)
    group = np.arange(-(-count * bits // 128), dtype=np.uint64)
    c = [group & low32, group >> np.uint64(32), np.zeros_like(group), np.zeros_like(group)]
    k = [np.uint64(seed) & low32, np.uint64(seed) >> np.uint64(32)]
    for _ in range(ROUNDS):
        a, b = np.uint64(_MULTIPLIERS[0]) * c[0], np.uint64(_MULTIPLIERS[1]) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low32, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low32]
        k = [(key + np.uint64(step)) & low32 for key, step in zip(k, _KEYS, strict=True)]
    words = np.stack(c, axis=1).astype("<u4")  # [groups, 4]
    parts = words.view(f"<u{bits // 8}").reshape(-1)[:count]
    return torch.from_numpy((parts.astype(np.float32) + np.float32(0.5)) / np.float32(2**bits))


@triton.jit
def _philox(seed, group):
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero, n_rounds=7)


@triton.jit
def _noise8(words):
    """uint32 [...] -> fp32 [..., 2, 2], of the bytes of words: byte i at (i // 2, i % 2)."""
    # the last 8 bits of the mantissa of 2^23 ..: exact, and faster than a conversion
    low = tl.join(words & 0xFF, (words >> 16) & 0xFF)
    high = tl.join((words >> 8) & 0xFF, words >> 24)
    bits = tl.join(low, high)  # [..., byte // 2, byte % 2]
    return tl.fma((bits | 0x4B000000).to(tl.float32, bitcast=True), 2.0**-8, 2.0**-9 - 2.0**15)


@triton.jit
def uniform8(seed, group):
    """16-bit noise of the eight elements of each group: int64 [G] (or [..., G]) -> fp32 [G, 8]. seed: int64 scalar."""
    a, b, c, d = _philox(seed, group)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [G, 2, 2]: word i at (i // 2, i % 2)
    halves = tl.join((words << 7) & 0x7FFF80, (words >> 9) & 0x7FFF80)  # [G, 2, 2, 2]
    # the first 16 bits of the mantissa of 1 .. 2: exact, and faster than a conversion
    noise = (halves | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-17)
    return tl.reshape(noise, [group.shape[0], 8])


@triton.jit
def uniform16(seed, group):
    """8-bit noise of the sixteen elements of each group: int64 [G] -> fp32 [G, 16]."""
    a, b, c, d = _philox(seed, group)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [G, 2, 2]
    return tl.reshape(_noise8(words), [group.shape[0], 16])


@triton.jit
def uniform_half16(seed, eight):
    """8-bit noise of the eight elements of each half group `eight`, which is 2 g or 2 g + 1: int64 [G] -> fp32 [G, 8]."""
    a, b, c, d = _philox(seed, eight >> 1)
    second = (eight & 1) != 0
    words = tl.join(tl.where(second, c, a), tl.where(second, d, b))  # [G, 2]
    return tl.reshape(_noise8(words), [eight.shape[0], 8])


@triton.jit
def draws(seed, start, first, BITS: tl.constexpr, EIGHTS: tl.constexpr):
    """Noise for codes of BITS bits of EIGHTS eights of elements from each of start + first on: a tuple of fp32 [G, 8].

    EIGHTS is 1, or 2 where BITS is at most 2. start: int64 scalar, first: int [G]; their sums are multiples of 8 * EIGHTS.
    """
    if EIGHTS == 2:
        noise = tl.reshape(uniform16(seed, start // 16 + first // 16), [first.shape[0], 2, 8])
        a, b = tl.split(tl.permute(noise, (0, 2, 1)))
        return a, b
    elif BITS <= 2:
        return (uniform_half16(seed, start // 8 + first // 8),)
    else:
        return (uniform8(seed, start // 8 + first // 8),)
