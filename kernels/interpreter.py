"""What Triton's interpreter lacks in the oldest supported version."""

from typing import Any


def mend(triton: Any) -> None:
    """Let a kernel's own number bound its loops, `for i in range(first, last)`, in Triton 3.6 under NumPy 2.5.

    The interpreter holds a number as an array of one element. Triton 3.6 calls int() on it, which NumPy 2.5 refuses for an array of one
    dimension; Triton 3.7 takes the element out first, as is done here. Later versions are left as they are.
    """
    if not triton.__version__.startswith("3.6."):
        return
    interpreter = triton.runtime.interpreter
    patch = interpreter._patch_lang_tensor  # runs at each launch and sets the methods that tensors have while it lasts

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_and_mend
