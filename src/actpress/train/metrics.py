"""Metrics of a training loop: loss, accuracy, step times. Only `Sums.read` and `StepTimer.read` wait for the device."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor


class Sums:
    """Loss and correct predictions of the samples seen, summed on the device.

    loss: mean loss of a batch, a scalar; logits [N, classes]; y [N] class indices.
    """

    def __init__(self, device: torch.device):
        self._loss = torch.zeros((), dtype=torch.float64, device=device)  # times samples
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self.samples = 0

    def add(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        self._loss.add_(loss, alpha=len(y))
        self._correct.add_((logits.argmax(1) == y).sum())
        self.samples += len(y)

    def read(self) -> tuple[float, float, int]:
        """(loss summed over samples, correct predictions, samples); waits for the device."""
        loss, correct = torch.stack((self._loss, self._correct.double())).tolist()
        return loss, correct, self.samples


def means(now: tuple[float, float, int], before: tuple[float, float, int] = (0.0, 0.0, 0)) -> tuple[float, float]:
    """(mean loss, accuracy in %) of the samples between two readings of `Sums`."""
    loss, correct, samples = (b - a for a, b in zip(before, now, strict=True))
    return loss / samples, 100 * correct / samples


class StepTimer:
    """Seconds of each timed block: CUDA events on a GPU, a wall clock elsewhere.

    with timer: train_step(x, y)

    host: on a GPU, seconds that Python took to issue each block, from its start to the return of its last call; None if the device was
    still busy with the block before. The queue of about a thousand launches may then have been full, so that the host waited for the
    device. On a CPU the two times are the same, and `host` stays empty.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds: list[float] = []
        self.host: list[float | None] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._idle = not self._pending or self._pending[-1][1].query()
            self._pending.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
            self._begin = time.perf_counter()
            self._pending[-1][0].record()
        else:
            self._begin = time.perf_counter()

    def __exit__(self, *exception) -> None:
        if self._cuda:
            self._pending[-1][1].record()
            self.host.append(time.perf_counter() - self._begin if self._idle else None)
        else:
            self.seconds.append(time.perf_counter() - self._begin)

    def read(self) -> list[float]:
        """All times so far, oldest first; waits for the device if blocks are still running there."""
        if self._pending:
            self._pending[-1][1].synchronize()
            self.seconds += [start.elapsed_time(end) / 1e3 for start, end in self._pending]
            self._pending.clear()
        return self.seconds

    def steady(self, warmup: int = 10) -> tuple[list[float], int]:
        """(the times after the warm-up blocks, how many those were): `warmup`, or half of all blocks if they are fewer than twice that."""
        seconds = self.read()
        skipped = min(warmup, len(seconds) // 2)
        return seconds[skipped:], skipped

    def steady_host(self, warmup: int = 10) -> list[float]:
        """The host's times of the blocks that `steady` counts, without unknown ones."""
        _, skipped = self.steady(warmup)
        return [seconds for seconds in self.host[skipped:] if seconds is not None]


def milliseconds(seconds: Sequence[float]) -> dict[str, float | int] | None:
    """{median, iqr, n} of times in seconds, in ms; None if there is none."""
    if not seconds:
        return None
    times = [1e3 * s for s in seconds]
    q25, _, q75 = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {"median": statistics.median(times), "iqr": q75 - q25, "n": len(times)}


def median(values: list[float]) -> float | None:
    """The median; of an even number of values the upper of the middle two; None for an empty list."""
    return sorted(values)[len(values) // 2] if values else None
