"""Few-Bit activations: a piecewise-constant derivative of GELU or SiLU, 1 to 4 bits per element. See reference.py."""

from actpress.kernels.few_bit.op import encode, forward, input_grad
from actpress.kernels.few_bit.reference import BITS, code_bytes

__all__ = ["BITS", "code_bytes", "encode", "forward", "input_grad"]
