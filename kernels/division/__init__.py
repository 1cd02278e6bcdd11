"""DIVISION's code of a map: block means in bf16 (low frequency) and the Q-bit rest (high frequency).

    lfc  = bf16(mean of each block)                     [N, C, h, w]
    hfc  = x - upsample(lfc)                            taken against the rounded means: rounding them costs nothing
    low, step = min(hfc), (max(hfc) - min(hfc)) / (2^Q - 1)    per map (n, c), bf16 [N, C, 1, 1]
    code = floor((hfc - low) / step + noise)            noise uniform in [0, 1): stochastic rounding, unbiased up to kernels/common/noise.py
    x~   = low + step * code + upsample(lfc)

Bits per element: Q + 16 * blocks / (H * W) + 32 / (H * W).

lfc="always" subtracts the block means in every map, as above. lfc="auto" leaves the means out (stores zeros) in the maps whose code is more
exact without them. Those are mostly maps after a ReLU: a mean that differs from block to block turns exact zeros, which one code would
hold without error, into values that have to be rounded. The choice compares the expected squared errors of stochastic rounding, with and
without means, summed over rows 0, 4, 8, ... of the map, or over all rows of a map of fewer than eight. Compared with a choice by all rows,
a few maps in a hundred are chosen differently, mostly where both errors are about equal. Layout, bytes and decoding are the same.

Source: arXiv 2208.04187 and its official code, with three repairs. `low` is rounded down to bf16 and `step` up, *before* the codes are
made. So every code lies in [0, 2^Q - 1], and decoding uses the very numbers that encoding used. The official code rounds them afterwards,
which is a bias, and lets a code of 2^Q spill into its neighbour. We save the step, not its inverse, so a constant map needs no epsilon.

A map that holds a NaN or an infinity decodes to NaN throughout. So does a map whose range exceeds fp32 and, unless lfc="auto" can leave the
means out, one with a block whose sum exceeds fp32. What decodes beyond the finite range of x's dtype, 65504 in fp16, becomes its largest
number.

align="ceil": the last block of a row or column may be smaller and holds the mean of what it covers; pixel i belongs to block i // k.
align="authors": the official floor mode. Only whole blocks count, so the pixels past the last one are in no mean. Nearest-neighbour
resizing spreads the means over the map, which misplaces them when k does not divide the size.
"""

from actpress.kernels.division.op import decode, encode
from actpress.kernels.division.reference import (
    ALIGN,
    LFC,
    Code,
    Format,
    code_bytes,
    decode_reference,
    encode_reference,
)

__all__ = ["ALIGN", "LFC", "Code", "Format", "code_bytes", "decode", "decode_reference", "encode", "encode_reference"]
