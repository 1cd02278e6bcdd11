"""Group quantization: each group of elements as Q-bit steps between its own least and greatest value, both exact.

    low, step = min(group), (max(group) - min(group)) / (2^Q - 1)     per group, bf16
    code = floor((x - low) / step + noise)      noise uniform in [0, 1): unbiased up to kernels/common/noise.py; noise 1/2: the nearest
    x~   = low + step * code

Bits per element: Q + 32 / (elements of a group). ActNN and GACT take groups of 256 and Q in {1, 2, 4, 8}, Mesa channels and Q = 8.

Sources: ActNN, arXiv 2104.14129; GACT, arXiv 2206.11357; Mesa, arXiv 2111.11124; with DIVISION's repairs (kernels/division). `low` is
rounded down to bf16 and `step` up, *before* the codes are made. So every code lies in [0, 2^Q - 1], and decoding uses the very numbers that
encoding used. The step is saved, not its inverse, so a constant group needs no epsilon. Mesa's bounds are moving averages; ours are each
tensor's own.

How x is split into groups: kernels/common/groups.py.

A group that holds a NaN or an infinity decodes to NaN throughout, as does one whose range exceeds fp32. Ranges whose step is below 2^-126
count as constant. What decodes beyond the finite range of x's dtype, 65504 in fp16, becomes its largest number.
"""

from actpress.kernels.common.groups import GROUPINGS, LARGEST
from actpress.kernels.quantize.op import decode, encode
from actpress.kernels.quantize.reference import Code, Format, code_bytes, decode_reference, encode_reference

__all__ = [
    "GROUPINGS",
    "LARGEST",
    "Code",
    "Format",
    "code_bytes",
    "decode",
    "decode_reference",
    "encode",
    "encode_reference",
]
