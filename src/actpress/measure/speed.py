"""Speed of a training step. All times are seconds."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class Throughput(NamedTuple):
    """Items per second: median and quartiles over n timed steps."""

    median: float
    q25: float
    q75: float
    n: int


def throughput(
    step: Callable[[], Any], items: int, device: torch.device | str, warmup: int = 10, steps: int = 50
) -> Throughput:
    """Time `steps` calls of step() after `warmup` untimed ones. Each call handles `items` items whose data are on the device.

    CUDA devices are timed with CUDA events, others with a wall clock.
    """
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
    return items_per_second(seconds, items)


def items_per_second(seconds: Sequence[float], items: int) -> Throughput:
    """Throughput of steps of `items` items each that took the given seconds."""
    rates = [items / s for s in seconds]
    q25, _, q75 = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
    return Throughput(statistics.median(rates), q25, q75, len(rates))
