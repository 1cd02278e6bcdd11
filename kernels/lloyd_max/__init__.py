"""Fixed Lloyd-Max levels for normally distributed maps: a study without kernels. See reference.py."""

from actpress.kernels.lloyd_max.reference import (
    BITS,
    Code,
    Levels,
    code_bytes,
    decode_reference,
    encode_reference,
    normal_levels,
)

__all__ = ["BITS", "Code", "Levels", "code_bytes", "decode_reference", "encode_reference", "normal_levels"]
