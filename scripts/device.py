"""Which device this is, and its two ceilings: a copy in memory and a product of bf16 matrices.

python scripts/device.py out=FILE.json                 a CUDA device
python scripts/device.py out=FILE.json device=cpu      no ceilings, to see that it runs

copy_gib_per_s: bytes read plus bytes written, 2 GiB each. product_tflops: 8192 rows and columns. Medians of single runs between events.
driver: nvidia-smi's words, null where it has none. kernel_cache: what ACTPRESS_KERNELS says of Triton's cache.
"""

import os
import sys
from statistics import median

import torch
from triton.testing import do_bench

from actpress.train import arguments, command, config, provenance, record
from actpress.train.run import bad_input

QUERY = ("driver_version", "memory.total", "power.limit")


def main(given: list[str]) -> int:
    with bad_input():
        options = arguments.read(given, {"out": "device.json", "device": "cuda"})
        device = config.device(options["device"])
    found = {"driver": provenance.nvidia_smi(*QUERY)} | dict.fromkeys(("copy_gib_per_s", "product_tflops"))
    found |= {"environment": provenance.environment(device), "kernel_cache": os.environ.get("ACTPRESS_KERNELS")}
    record.write(options["out"], found)  # should the rest fail: without it no archive can be imported
    if device.type == "cuda":
        x = torch.randint(256, (2**31,), dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
        seconds = [median(do_bench(call, return_mode="all")) / 1000 for call in (lambda: y.copy_(x), lambda: a @ b)]
        found |= {"copy_gib_per_s": 4 / seconds[0], "product_tflops": 2 * 8192**3 / 1e12 / seconds[1]}
    record.write(options["out"], found)
    print(found)
    return 0


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
