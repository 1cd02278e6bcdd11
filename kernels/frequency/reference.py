"""The low and the high frequencies of a map, apart: a study of what the backward pass needs of each.

    low   = block means, or the lowest DCT coefficients, of each map [N, C, H, W]: bf16 [N, C, ceil(H / k), ceil(W / k)]
    high  = x - back(low), in Q bits between each map's bounds (kernels/quantize/)
    x~    = back(low) + high, or one of the two alone

transform="mean": back() repeats each mean over its block.

transform="dct": an orthonormal DCT-II along rows and columns. The lowest ceil(H / k) x ceil(W / k) coefficients are kept, as many numbers
as block means. back() is the inverse transform with zeros for the rest. It approximates smooth maps best in the mean square.

The low part of a map that holds a NaN or an infinity is not finite. Decoded values beyond the finite range of x's dtype become its largest
number.

Source: the split is DIVISION's (arXiv 2208.04187), whose code uses block means. This is a study of it, not the method of a paper.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common.rounding import poison, saturated

TRANSFORMS = ("mean", "dct")


def low_reference(x: Tensor, block: int, transform: str) -> Tensor:
    """x [N, C, H, W] -> bf16 [N, C, ceil(H / k), ceil(W / k)]; k is limited to the size of the map."""
    kernel = tuple(max(min(block, size), 1) for size in x.shape[2:])
    if x.numel() == 0:
        return x.new_empty(
            (*x.shape[:2], *(-(-size // k) for size, k in zip(x.shape[2:], kernel, strict=True)))
        ).bfloat16()
    if transform == "mean":
        low = F.avg_pool2d(x, kernel, kernel, ceil_mode=True, count_include_pad=False)
    else:
        down, across = (_dct(size, -(-size // k), x) for size, k in zip(x.shape[2:], kernel, strict=True))
        low = down @ x @ across.T
    return saturated(low + poison(low), torch.bfloat16)


def low_bytes(shape: torch.Size, block: int) -> int:
    """Bytes of the low part of a map of this shape."""
    n, c, *axes = shape
    return 2 * n * c * math.prod([-(-size // max(min(block, size), 1)) for size in axes])  # Dynamo takes no generator


def back_reference(low: Tensor, size: tuple[int, int], block: int, transform: str, dtype: torch.dtype) -> Tensor:
    """The map [N, C, H, W] of `dtype` that `low` represents; `size` is (H, W)."""
    low = low.to(dtype)
    if transform == "mean":
        for axis, length in enumerate(size, start=2):
            low = low.index_select(axis, torch.arange(length, device=low.device) // max(min(block, length), 1))
        return low
    down, across = (_dct(length, low.shape[axis], low) for axis, length in enumerate(size, start=2))
    return down.T @ low @ across


def _dct(size: int, kept: int, like: Tensor) -> Tensor:
    """The first `kept` rows of the orthonormal DCT-II matrix of `size`."""
    place, frequency = torch.arange(size, dtype=torch.float64), torch.arange(kept, dtype=torch.float64)[:, None]
    if size == 0:
        return like.new_empty(kept, size)
    rows = torch.cos(math.pi / size * (place + 0.5) * frequency) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.to(like.device, like.dtype)
