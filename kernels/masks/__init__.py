"""One bit per element: masks, and ReLU, which needs no more for its gradient.

Stock PyTorch saves the output of ReLU, 4 bytes per element in fp32. The gradient only asks whether it is above zero: 1/8 byte, exact.
"""

from actpress.kernels.masks.op import pack_mask, relu, relu_, relu_backward, unpack_mask
from actpress.kernels.masks.reference import (
    pack_mask_reference,
    relu_backward_reference,
    relu_inplace_reference,
    relu_reference,
    unpack_mask_reference,
)

__all__ = [
    "pack_mask",
    "pack_mask_reference",
    "relu",
    "relu_",
    "relu_backward",
    "relu_backward_reference",
    "relu_inplace_reference",
    "relu_reference",
    "unpack_mask",
    "unpack_mask_reference",
]
