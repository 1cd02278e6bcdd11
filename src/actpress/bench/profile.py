"""Where the time of a training step goes, kernel by kernel, from PyTorch's profiler.

{busy_ms, span_ms, kernels: [{kernel, calls, ms}]}, means of PROFILED steps. busy_ms: sum of all kernels. span_ms: from the start of the
first to the end of the last; the difference is time in which the device waits for Python. On a CPU the kernels are PyTorch's operations.
"""

from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from actpress.bench import steps
from actpress.train import config

WARMUP, PROFILED, PRINTED = 6, 3, 30


def profile_step(setting: steps.Setting, method: str, configs: Path) -> dict[str, Any]:
    """The profile of one method, the longest kernel first."""
    cfg = setting.training_config(configs, method)
    device = config.device(cfg.runtime.device)
    trainer, x, y = steps.prepare(setting, cfg, device)
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


def describe(method: str, found: dict[str, Any]) -> str:
    """The profile as text: the PRINTED longest kernels."""
    head = f"{method}: {found['busy_ms']:.1f} ms of kernels in {found['span_ms']:.1f} ms a step"
    kernels = found["kernels"][:PRINTED]
    lines = [f"  {kernel['ms']:8.3f} ms {kernel['calls']:6.1f} calls  {kernel['kernel'][:100]}" for kernel in kernels]
    return "\n".join([head, *lines])
