"""Uniform noise for stochastic rounding, from a counter: Philox 4x32, 7 rounds, 16 bits an element.

Elements are numbered in memory order; group g = element // 8 gets the 128 bits of philox(seed, counter = g), element 2 i + j of the
group the j-th half (low first) of word i. noise = (16 bits + 1/2) / 2^16, in (0, 1), exact in fp32. Its mean is 1/2 exactly and it takes
each value once in 2^16, so rounding with it is unbiased to 2^-17 of a step.

Seven rounds pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011); at the speed of memory the arithmetic of
the full ten, with 32 bits an element, would be what limits a kernel.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .launch import tl, triton

ROUNDS = 7
_KEYS = (0x9E3779B9, 0xBB67AE85)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)


class Source(Protocol):
    """Where encoders get their noise from (codec.Context): each call is a new draw."""

    def uniform_like(self, x: Tensor) -> Tensor:
        """fp32 noise in [0, 1) of x's shape, device and memory format: for references."""
        ...

    def seed_for(self, x: Tensor) -> Tensor:
        """int64 [1] on x's device, not negative: for kernels, which make their noise from it. A later draw may overwrite it: whoever reads
        it after the forward pass keeps a clone."""
        ...


def uniform_from(seed: Tensor | int, x: Tensor) -> Tensor:
    """fp32 noise in [0, 1) of x's shape, device and memory format from a seed: what registered operations use off the GPU."""
    generator = torch.Generator(x.device).manual_seed(int(seed))
    return torch.empty_like(x, dtype=torch.float32, requires_grad=False).uniform_(generator=generator)


def uniform_reference(seed: int, count: int) -> Tensor:
    """The noise that kernels draw for elements 0 .. count - 1: fp32 [count]. seed: 0 <= seed < 2^63."""
    low32 = np.uint64(0xFFFFFFFF)
    group = np.arange(-(-count // 8), dtype=np.uint64)
    c = [group & low32, group >> np.uint64(32), np.zeros_like(group), np.zeros_like(group)]
    k = [np.uint64(seed) & low32, np.uint64(seed) >> np.uint64(32)]
    for _ in range(ROUNDS):
        a, b = np.uint64(_MULTIPLIERS[0]) * c[0], np.uint64(_MULTIPLIERS[1]) * c[2]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k[0], b & low32, (a >> np.uint64(32)) ^ c[3] ^ k[1], a & low32]
        k = [(key + np.uint64(step)) & low32 for key, step in zip(k, _KEYS, strict=True)]
    words = np.stack(c, axis=1).astype("<u4")  # [groups, 4]
    halves = words.view("<u2").reshape(-1)[:count]
    return torch.from_numpy((halves.astype(np.float32) + np.float32(0.5)) / np.float32(2**16))


@triton.jit
def uniform8(seed, group):
    """Noise of the eight elements of each group: int64 [G] (or [..., G]) -> fp32 [G, 8]. seed: int64 scalar."""
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero, zero, n_rounds=7)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [G, 2, 2]: word i at (i // 2, i % 2)
    halves = tl.join((words << 7) & 0x7FFF80, (words >> 9) & 0x7FFF80)  # [G, 2, 2, 2]
    # the first 16 bits of the mantissa of 1 .. 2: exact, and faster than a conversion
    noise = (halves | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-17)
    return tl.reshape(noise, [group.shape[0], 8])
