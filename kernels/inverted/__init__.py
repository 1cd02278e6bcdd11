"""Inverted activations: the derivative of GELU or SiLU from the activation's output and one bit. See reference.py."""

from actpress.kernels.inverted.op import forward, input_grad, left_bits
from actpress.kernels.inverted.reference import DECODERS, FITS, FUNCTIONS, decoded_by

__all__ = ["DECODERS", "FITS", "FUNCTIONS", "decoded_by", "forward", "input_grad", "left_bits"]
