"""Repairs of Triton's interpreter in the older of the supported versions."""

from typing import Any

import numpy as np


def mend(triton: Any) -> None:
    """Make the interpreter of Triton 3.6 and 3.7 compute what a GPU computes, under any supported NumPy. Later versions do so."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    interpreter = triton.runtime.interpreter
    if version < (3, 7):
        _mend_bounds(interpreter)
    if version < (3, 8):
        _mend_nan(interpreter.InterpreterBuilder)


def _mend_bounds(interpreter: Any) -> None:
    """Let numbers of a kernel be bounds of its loops, `for i in range(first, last)`.

    The interpreter holds a number as an array of one element and calls int() on it, which NumPy 2.5 refuses.
    """
    patch = interpreter._patch_lang_tensor  # runs at each launch and sets the methods that tensors have while it lasts

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend


def _mend_nan(builder: Any) -> None:
    """Minimum and maximum of a number and NaN give the number, as on a GPU, unless a kernel asks for NaN."""
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
