"""Compare a kernel with its reference: tests assert it, and the benchmark checks it before it times anything."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actpress.kernels.common import launch


def difference(
    case: launch.Case, config: launch.Config, inputs: tuple, expected: list[Tensor] | None = None
) -> str | None:
    """How the kernel's outputs for these inputs differ from the reference, in words; None if they agree within the case's tolerance.

    Outputs start as NaN or the largest integer, so that an element that is not written shows. expected: `outcome` of the reference; it
    is computed if None.
    """
    expected = outcome(case.reference, inputs) if expected is None else expected
    with poisoned():
        ours = outcome(case.kernel, inputs, config=config)
    if len(ours) != len(expected):
        return f"{len(ours)} tensors instead of {len(expected)}"
    found = (tensor_difference(a, b, case.tolerance) for a, b in zip(ours, expected, strict=True))
    return next((f"tensor {i}: {words}" for i, words in enumerate(found) if words), None)


def outcome(function: Callable, inputs: tuple, **options: Any) -> list[Tensor]:
    """The tensors that a function returns for a copy of the inputs, then those of the copy, which the function may have changed."""
    copy = copied(inputs)
    return tensors((function(*copy, **options), copy))


def copied(value: Any) -> Any:
    """A copy of tensors, also of those in tuples, each with its own storage and the same strides."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage().clone()
        return value.new_empty(0).set_(storage, value.storage_offset(), value.shape, value.stride())
    return mapped(copied, value)


def mapped(function: Callable, value: Any) -> Any:
    """The function applied to each item of a tuple, named or not; any other value unchanged."""
    if not isinstance(value, tuple):
        return value
    items = [function(item) for item in value]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def tensor_difference(ours: Tensor, reference: Tensor, tolerance: float) -> str | None:
    """How two tensors differ, in words; None if they agree.

    tolerance 0: equal, NaN to NaN and -0 to 0. Otherwise ||ours - reference|| <= tolerance ||reference|| in fp64, which no NaN passes.
    """
    if (ours.shape, ours.dtype) != (reference.shape, reference.dtype):
        return f"{ours.dtype} {list(ours.shape)} instead of {reference.dtype} {list(reference.shape)}"
    if tolerance == 0:
        different = int((~torch.isclose(ours, reference, rtol=0, atol=0, equal_nan=True)).sum())
        return f"{different} of {ours.numel()} elements differ" if different else None
    error = relative_error(ours, reference)
    return None if error <= tolerance else f"relative error {error:.2e}, allowed {tolerance:.0e}"


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """||ours - reference|| / ||reference|| in fp64; 0 for two that are all zeros, inf where only the reference is."""
    error, size = float((ours.double() - reference.double()).norm()), float(reference.double().norm())
    return error / size if size else (0.0 if error == 0 else float("inf"))


def tensors(value: Any) -> list[Tensor]:
    """The tensors among nested tuples and lists, in order."""
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors(item)]
    return [value] if isinstance(value, Tensor) else []


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch.empty returns memory that is filled with NaN, or with the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about operations that are not deterministic, which does not matter here
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled
