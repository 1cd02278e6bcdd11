"""Which device this is, and its two limits: memory bandwidth of a copy, and speed of a product of bf16 matrices."""

import os
from statistics import median
from typing import Any

import torch
from triton.testing import do_bench

from actpress.train import provenance

QUERY = ("driver_version", "memory.total", "power.limit")


def identity(device: torch.device) -> dict[str, Any]:
    """{environment, driver, kernel_cache, copy_gib_per_s, product_tflops}; the last two are None until `limits` has measured them.

    driver: nvidia-smi's answer to QUERY, None without one. kernel_cache: how Triton's cache was filled, from ACTPRESS_KERNELS.
    """
    return {
        "driver": provenance.nvidia_smi(*QUERY),
        "copy_gib_per_s": None,
        "product_tflops": None,
        "environment": provenance.environment(device),
        "kernel_cache": os.environ.get("ACTPRESS_KERNELS"),
    }


def limits(device: torch.device) -> dict[str, float]:
    """{copy_gib_per_s: bytes read plus bytes written, 2 GiB each; product_tflops: of 8192 x 8192 matrices}, medians; {} on a CPU."""
    if device.type != "cuda":
        return {}
    x = torch.randint(256, (2**31,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    seconds = [median(do_bench(call, return_mode="all")) / 1000 for call in (lambda: y.copy_(x), lambda: a @ b)]
    return {"copy_gib_per_s": 4 / seconds[0], "product_tflops": 2 * 8192**3 / 1e12 / seconds[1]}
