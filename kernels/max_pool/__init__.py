"""Max-pooling that saves the offset of each maximum within its window: one byte per output.

Stock PyTorch saves an int64 index per output, 8 bytes, and the input. The offset and the geometry say the same, so the gradient is exact.
"""

from actpress.kernels.max_pool.op import max_pool2d, max_pool2d_backward
from actpress.kernels.max_pool.reference import (
    Window,
    max_pool2d_backward_reference,
    max_pool2d_reference,
    window_index_reference,
    window_offset_reference,
)

__all__ = [
    "Window",
    "max_pool2d",
    "max_pool2d_backward",
    "max_pool2d_backward_reference",
    "max_pool2d_reference",
    "window_index_reference",
    "window_offset_reference",
]
