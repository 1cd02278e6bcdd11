"""Peak bytes of a training step, and whether an exception means that memory ran out."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker

# Messages of a plain RuntimeError that mean out of memory.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def peak_bytes(step: Callable[[], Any], device: torch.device | str, state: Iterable[Any] = ()) -> int:
    """Peak bytes of live tensors while step() runs once.

    CUDA: max_memory_allocated after a reset of the statistics; run warm-up steps first. CPU: a tracker of live storages. `state` lists
    the modules, optimizers and tensors that exist before the step; the CPU's tracker counts them too.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    tracker = MemTracker()
    tracker.track_external(*state)
    with tracker:
        step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def peak_reserved(device: torch.device | str) -> int | None:
    """Peak bytes that CUDA's caching allocator has reserved since the last reset; None on other devices."""
    return torch.cuda.max_memory_reserved(device) if torch.device(device).type == "cuda" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out.

    CUDA's allocator raises a class of its own; libraries and the CPU's allocator raise a RuntimeError that only its message identifies.
    """
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )
