"""What a training step costs in Python: calls of actpress operations, how often and how long each, with launches left out.

CPU tensors take the path of CUDA tensors down to the launch, which does nothing: what is timed is the host's code, and what is computed is
meaningless. A launch takes a GPU's host some 10 to 20 us more; it is counted, not timed. The step on the CPU holds the arithmetic of
everything that is not ours, so it says little by itself.

    python scripts/dev/host_time.py --model resnet50 --methods division quantize --steps 20
"""

import argparse
import functools
import inspect
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import actpress
from actpress.kernels.common import launch
from actpress.kernels.proof import registry
from actpress.train import models

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Calls:
    """CPU times of the operations that were called, in ns, by name; and how many kernels would have been launched."""

    def __init__(self):
        self.times: dict[str, list[int]] = defaultdict(list)
        self.launches = 0

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, noting how long it takes."""

        @functools.wraps(function)
        def run(*args, **kwargs):
            begin = time.thread_time_ns()
            result = function(*args, **kwargs)
            self.times[name].append(time.thread_time_ns() - begin)
            return result

        return run

    def launch(self, *args: object, **options: object) -> None:
        """Stands in for launch.run."""
        self.launches += 1


def operations() -> dict[str, Callable]:
    """Public functions that call a registered operation: "family.function" -> the function."""
    registry.all_cases()  # imports all families
    return {
        f"{module.__name__.split('.')[2]}.{name}": function
        for module in list(sys.modules.values())
        if module.__name__.startswith("actpress.kernels.") and module.__name__.endswith(".op")
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and any(isinstance(vars(module).get(used), launch.Operation) for used in function.__code__.co_names)
        and not name.startswith("_")
    }


@contextmanager
def watched() -> Iterator[Calls]:
    """Send CPU tensors the way of CUDA tensors, without launching, and time every operation, wherever it was imported."""
    calls, undo = Calls(), []

    def put(owner: object, name: str, value: object) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    put(launch, "on_gpu", lambda x: x.dtype != torch.float64)
    put(launch, "directly", launch.plain)
    put(launch, "run", calls.launch)
    for label, function in operations().items():
        timed = calls.timed(label, function)
        for module in [m for name, m in sys.modules.items() if name.startswith("actpress.")]:
            for name in [name for name, value in vars(module).items() if value is function]:
                put(module, name, timed)
    try:
        yield calls
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


def step(model: nn.Module, x: Tensor) -> int:
    """A forward and a backward pass: ns."""
    begin = time.thread_time_ns()
    model(x).sum().backward()
    elapsed = time.thread_time_ns() - begin
    for p in model.parameters():
        p.grad = None
    return elapsed


def prepared(name: str, method: str) -> nn.Module:
    """The model with the method of this name in configs/method applied."""
    torch.manual_seed(0)
    model = models.create(name, num_classes=1000, image_size=224)
    actpress.apply(model, hydra.utils.instantiate(OmegaConf.load(CONFIGS / "method" / f"{method}.yaml")))
    return model


def report(method: str, calls: Calls, totals: list[int], steps: int) -> None:
    """Print what a step of one method takes: medians of steps."""
    per_step = {name: len(times) // steps for name, times in calls.times.items()}
    inside = [
        sum(sum(times[i * per_step[name] :][: per_step[name]]) for name, times in calls.times.items())
        for i in range(steps)
    ]
    print(
        f"{method}: {sum(per_step.values())} operations, {calls.launches // steps} launches a step; "
        f"{statistics.median(inside) / 1e6:.2f} ms in operations (launches not included), "
        f"step on the CPU {statistics.median(totals) / 1e6:.1f} ms"
    )
    for name, times in sorted(calls.times.items(), key=lambda item: -sum(item[1])):
        print(f"  {name:32} {per_step[name]:4d} a step, {statistics.median(times) / 1e3:7.1f} us each")


def main(argv: list[str] | None = None) -> None:
    """Steps of the methods in turn, so that all see the same machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--methods", nargs="+", default=["division", "quantize"])
    parser.add_argument(
        "--size", type=int, default=64, help="side of the images: small, since only the host's code is of interest"
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    x = torch.randn(2, 3, args.size, args.size)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    x = x.contiguous(memory_format=memory_format)
    found = {
        name: (prepared(args.model, name).to(memory_format=memory_format), Calls(), [])
        for name in ("none", *args.methods)
    }
    for i in range(args.steps + 2):
        for model, total, totals in found.values():
            with watched() as calls:
                elapsed = step(model, x)
            if i >= 2:  # the first fill caches
                totals.append(elapsed)
                total.launches += calls.launches
                for name, times in calls.times.items():
                    total.times[name] += times
    for name, (_, calls, totals) in found.items():
        report(name, calls, totals, args.steps)


if __name__ == "__main__":
    main()
