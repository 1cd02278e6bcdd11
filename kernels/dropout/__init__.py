"""Dropout that saves one bit per element, or nothing but the seed its mask is drawn from.

Stock PyTorch saves a bool per element on CUDA and the mask in the input's dtype on the CPU. Packed to bits the mask stays exact. The kernel
draws a mask of its own (Philox, see kernels/common/noise.py), not the one of stock dropout, and can draw it again in the backward pass.
"""

from actpress.kernels.dropout.op import dropout, dropout_backward, dropout_backward_regenerated
from actpress.kernels.dropout.reference import (
    dropout_backward_reference,
    dropout_backward_regenerated_reference,
    dropout_reference,
)

__all__ = [
    "dropout",
    "dropout_backward",
    "dropout_backward_reference",
    "dropout_backward_regenerated",
    "dropout_backward_regenerated_reference",
    "dropout_reference",
]
