"""What a training loop is watched with. Nothing here waits for the device but `Sums.read` and `StepTimer.read`."""

import time

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
    """(mean loss, accuracy in %) of what two readings of `Sums` lie apart."""
    loss, correct, samples = (b - a for a, b in zip(before, now, strict=True))
    return loss / samples, 100 * correct / samples


class StepTimer:
    """Seconds of each timed block: CUDA events on a GPU, a wall clock elsewhere.

    with timer: train_step(x, y)
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds: list[float] = []

    def __enter__(self) -> None:
        if self._cuda:
            self._pending.append(tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)))
            self._pending[-1][0].record()
        else:
            self._begin = time.perf_counter()

    def __exit__(self, *exception) -> None:
        if self._cuda:
            self._pending[-1][1].record()
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


def median(values: list[float]) -> float | None:
    """The middle value, the upper one of two; None if there is none."""
    return sorted(values)[len(values) // 2] if values else None
