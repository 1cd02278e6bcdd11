"""Comparing tensors with constants that their dtype cannot hold."""

import torch

_INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
DTYPES = tuple(_INTEGERS)


def least_not_below(value: float, dtype: torch.dtype) -> float:
    """The least number of `dtype` that is not below `value`. For x of this dtype, x < value exactly if x < that number.

    PyTorch rounds a constant to the tensor's dtype before it compares, which may move it past a neighbour. Raises KeyError for dtypes
    that are not in DTYPES.
    """
    rounded = torch.tensor(value, dtype=dtype)
    if rounded.item() >= value:
        return rounded.item()
    towards_zero = -1 if rounded < 0 else 1  # in sign and magnitude, as floats are stored
    return (rounded.view(_INTEGERS[dtype]) + towards_zero).view(dtype).item()
