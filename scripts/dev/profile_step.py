"""Where the time of a training step goes: its kernels by PyTorch's profiler, methods one after the other in one process.

python scripts/dev/profile_step.py model=resnet50 batch=256 methods=none,division out=FILE.json        bf16 autocast, channels_last

A row: kernel, calls and ms a step, means of `profiled` steps. busy_ms: the sum of all kernels; span_ms: from the start of the first to the
end of the last; the difference is time in which the device waits for Python. On a CPU the kernels are PyTorch's operations.
"""

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from actpress.bench import steps
from actpress.train import arguments, command, config, provenance, record
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEFAULTS = {field.name: field.default for field in fields(steps.Setting)} | {"model": "resnet50"}
WARMUP, PROFILED, PRINTED = 6, 3, 30


def main(given: list[str]) -> int:
    with bad_input():
        values = arguments.read(given, DEFAULTS | {"methods": ("none", "division"), "out": "profile.json"})
        methods, out = values.pop("methods"), values.pop("out")
        steps.check(methods, CONFIGS)
        setting = steps.Setting(**values)
    found: dict[str, Any] = {
        "setting": asdict(setting),
        "environment": provenance.environment(config.device(setting.device)),
        "profiled": PROFILED,
        "methods": {},
    }
    for method in methods:
        found["methods"][method] = profiled(setting, method)
        record.write(out, found)
        describe(method, found["methods"][method])
    return 0


def profiled(setting: steps.Setting, method: str) -> dict[str, Any]:
    """{busy_ms, span_ms, kernels: [{kernel, calls, ms}], the longest first} of a step."""
    cfg = setting.config(CONFIGS, method)
    device = config.device(cfg.runtime.device)
    trainer, x, y, _ = steps.prepare(setting, cfg, device)
    for _ in range(WARMUP):
        trainer.train_step(x, y)
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        for _ in range(PROFILED):
            trainer.train_step(x, y)
        wait()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    ranges = [e.time_range for e in profiler.events() if e.device_type == kind and not e.is_user_annotation]
    kernels = [
        {
            "kernel": average.key,
            "calls": average.count / PROFILED,
            "ms": (average.self_device_time_total if cuda else average.self_cpu_time_total) / PROFILED / 1e3,
        }
        for average in profiler.key_averages()
        if average.device_type == kind and not average.is_user_annotation
    ]
    return {
        "busy_ms": sum(kernel["ms"] for kernel in kernels),
        "span_ms": (max(r.end for r in ranges) - min(r.start for r in ranges)) / PROFILED / 1e3,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["ms"]),
    }


def describe(method: str, found: dict[str, Any]) -> None:
    print(f"{method}: {found['busy_ms']:.1f} ms of kernels in {found['span_ms']:.1f} ms a step")
    for kernel in found["kernels"][:PRINTED]:
        print(f"  {kernel['ms']:8.3f} ms {kernel['calls']:6.1f} calls  {kernel['kernel'][:100]}", flush=True)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
