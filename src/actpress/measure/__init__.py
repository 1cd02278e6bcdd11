"""The ruler: saved bytes, peak bytes, throughput, gradient fidelity. All sizes are bytes, all times seconds.

Saved bytes are exact, independent of the device, and need neither memory nor time when the tensors are fake
(`fake_model`): "predicted" then. Saved is not peak: report both. How saved bytes are seen: actpress.measure.saved.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from actpress import swap
from actpress.measure.predict import fake_model, predicted_memory
from actpress.measure.saved import SavedBytes, saved_bytes, storage_key
from actpress.swap import first_pass

__all__ = [
    "Fidelity",
    "SavedBytes",
    "Throughput",
    "compare",
    "fake_model",
    "gradient_fidelity",
    "gradients",
    "peak_bytes",
    "peak_reserved",
    "predicted_memory",
    "ran_out",
    "rates",
    "saved_bytes",
    "storage_key",
    "throughput",
]

OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def peak_bytes(step: Callable[[], Any], device: torch.device | str, state: Iterable[Any] = ()) -> int:
    """Peak of live tensor memory while step() runs once.

    CUDA: max_memory_allocated after a reset; run warm-up steps first. CPU: a tracker of live storages; `state` are the modules,
    optimizers and tensors that exist before the step, which count too.
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
    """Bytes reserved at the peak by CUDA's caching allocator since the last reset; None on other devices."""
    return torch.cuda.max_memory_reserved(device) if torch.device(device).type == "cuda" else None


class Throughput(NamedTuple):
    """Items per second over n timed steps."""

    median: float
    q25: float
    q75: float
    n: int


def throughput(
    step: Callable[[], Any], items: int, device: torch.device | str, warmup: int = 10, steps: int = 50
) -> Throughput:
    """Items per second of step(), which handles `items` items whose data lie on the device: CUDA events there, a wall clock elsewhere."""
    for _ in range(warmup):
        step()
    seconds = []
    cuda = torch.device(device).type == "cuda"
    for _ in range(steps):
        if cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - begin)
    return rates(seconds, items)


def rates(seconds: list[float], items: int) -> Throughput:
    """Times of steps of `items` items -> items per second."""
    rate = [items / s for s in seconds]
    q25, _, q75 = statistics.quantiles(rate, n=4, method="inclusive") if len(rate) > 1 else rate * 3
    return Throughput(statistics.median(rate), q25, q75, len(rate))


class Fidelity(NamedTuple):
    """An approximate gradient g~ beside the exact g."""

    cosine: float  # of g~ and g
    norm_ratio: float  # |g~| / |g|


def gradient_fidelity(model: nn.Module, method: swap.Method, batch: tuple[Tensor, Tensor]) -> dict[str, Fidelity]:
    """Each parameter's gradient under `method` against the exact one, at the same weights on the same batch.

    batch: (x, y), y class indices [N]; the loss is cross-entropy. Runs on copies, in the model's mode; random layers (dropout)
    draw the same in both. Returns {parameter name: Fidelity}, and "total" for all parameters together. Parameters without a gradient are
    left out.
    """
    exact, approximate = gradients(model, batch), gradients(model, batch, method)
    return {name: compare(approximate[name], g) for name, g in exact.items()}


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor], method: swap.Method | None = None) -> dict[str, Tensor]:
    """The gradient of each parameter, flat and in fp64, and "total", all of them in one; under `method` if there is one.

    As for gradient_fidelity. The noise of stochastic codecs follows `torch.manual_seed`; that of random layers is the same in every call.
    """
    x, y = batch
    twin = copy.deepcopy(model)
    if method is not None:
        swap.apply(twin, method)
        first_pass.remove_all(twin)
    twin.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.functional.cross_entropy(twin(x), y).backward()
    found = {name: p.grad.double().flatten() for name, p in twin.named_parameters() if p.grad is not None}
    return found | {"total": torch.cat(list(found.values()))}


def compare(approximate: Tensor, exact: Tensor) -> Fidelity:
    """Two flat gradients of one parameter. An approximate gradient that is zero where the exact one is not has cosine 0."""
    norms = approximate.norm(), exact.norm()
    lost = norms[0] == 0 and norms[1] > 0
    cosine = 0.0 if lost else (approximate @ exact / (norms[0] * norms[1])).item()
    return Fidelity(cosine, (norms[0] / norms[1]).item())


def ran_out(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: CUDA has one of its own, libraries and the CPU's allocator only a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
    )
