"""The low and the high frequencies of a map, apart: a study without kernels. See reference.py."""

from actpress.kernels.frequency.reference import TRANSFORMS, back_reference, low_bytes, low_reference

__all__ = ["TRANSFORMS", "back_reference", "low_bytes", "low_reference"]
