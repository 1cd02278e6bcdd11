"""Compile every Triton kernel ahead of time, without a GPU: what it needs on each architecture.

python scripts/compile_kernels.py                 all kernels x dtypes x configurations for sm_80 and sm_90 -> results/kernels/aot.csv
python scripts/compile_kernels.py division relu   only cases whose name starts so; printed, not written
python scripts/compile_kernels.py --check         exit 1 if a default configuration spills or aot.csv is out of date

Registers per thread, bytes of spills (stores and loads), stack and static shared memory are what ptxas reports for the code that Triton
generates; dynamic shared memory is what Triton asks for at launch. Arguments are specialised as at run time for the sizes of the cases.
"""

import argparse
import csv
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from actpress import kernels
from actpress.kernels import launch

TARGET = Path(__file__).resolve().parents[1] / "results" / "kernels" / "aot.csv"
ARCHITECTURES = (80, 90)
FIELDS = (
    "case",
    "kernel",
    "dtype",
    "config",
    "arch",
    "registers",
    "spill_bytes",
    "stack_bytes",
    "static_shared_bytes",
    "dynamic_shared_bytes",
    "triton",
)
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.uint16: "*u16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Job(NamedTuple):
    """One kernel of one case in one configuration."""

    case: str
    dtype: torch.dtype
    config: int  # position in the case's list, 0 the default
    launch: int  # position among the launches of the case
    arch: int


def all_cases() -> dict[str, launch.Case]:
    """The cases of every kernel family, by name."""
    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    cases = [case for module in modules if hasattr(module, "cases") for case in module.cases()]
    assert len({case.name for case in cases}) == len(cases), "two cases of one name"
    return {case.name: case for case in cases}


def launches(case: launch.Case, dtype: torch.dtype, config: launch.Config) -> list[launch.Launch]:
    """What the case would launch: its launcher is run on tensors without memory."""
    with launch.recorded() as recorded:
        case.kernel(*case.make(dtype, "meta"), config=config)
    return recorded


def jobs(prefixes: list[str]) -> Iterator[Job]:
    for name, case in all_cases().items():
        if prefixes and not name.startswith(tuple(prefixes)):
            continue
        for dtype in case.dtypes:
            for position, config in enumerate(case.configs):
                for i in range(len(launches(case, dtype, config))):
                    for arch in ARCHITECTURES:
                        yield Job(name, dtype, position, i, arch)


def source(wanted: launch.Launch) -> ASTSource:
    """Argument types as Triton's own launcher would specialise them: 1 is a constant, multiples of 16 are known to be."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(wanted.kernel.params):
        value = wanted.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), f"{parameter.name}={value!r}"
            signature[parameter.name] = "fp32"
    return ASTSource(wanted.kernel, signature, constants, attributes)


def compile_job(job: Job) -> dict[str, Any]:
    """One row of the table."""
    case = all_cases()[job.case]
    config = case.configs[job.config]
    wanted = launches(case, job.dtype, config)[job.launch]
    compiled = triton.compile(source(wanted), target=GPUTarget("cuda", job.arch, 32), options=dict(wanted.options))
    report = assemble(compiled.asm["ptx"])
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    shared = re.search(r"(\d+) bytes smem", report)
    return {
        "case": job.case,
        "kernel": wanted.kernel.__name__,
        "dtype": str(job.dtype).removeprefix("torch."),
        "config": ("default " if job.config == 0 else "") + " ".join(f"{k}={v}" for k, v in config.items()),
        "arch": f"sm_{job.arch}",
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spill_bytes": int(spills[2]) + int(spills[3]),
        "stack_bytes": int(spills[1]),
        "static_shared_bytes": int(shared[1]) if shared else 0,
        "dynamic_shared_bytes": compiled.metadata.shared,
        "triton": triton.__version__,
    }


def assemble(ptx: str) -> str:
    """What ptxas says of this code."""
    arch = re.search(r"\.target (sm_\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [
            triton.knobs.nvidia.ptxas.path,
            "-v",
            f"--gpu-name={arch}",
            str(path),
            "-o",
            str(path.with_suffix(".cubin")),
        ]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def problems(rows: list[dict[str, Any]], committed: list[dict[str, str]]) -> list[str]:
    """Spills in default configurations, and rows that aot.csv lacks or has too many."""
    found = [
        f"{row['case']} {row['kernel']} {row['dtype']} {row['config']} {row['arch']}: {row['spill_bytes']} bytes of spills"
        for row in rows
        if row["spill_bytes"] and row["config"].startswith("default")
    ]
    here, there = ({tuple(row[field] for field in FIELDS[:5]) for row in table} for table in (rows, committed))
    found += [f"not in {TARGET.name}: {' '.join(key)}" for key in sorted(here - there)]
    found += [f"in {TARGET.name}, no longer there: {' '.join(key)}" for key in sorted(there - here)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="PREFIX")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    wanted = list(jobs(options.cases))
    if not wanted:
        raise SystemExit(f"no case starts with {' or '.join(options.cases)}; there are: {', '.join(all_cases())}")
    with ProcessPoolExecutor(options.workers) as pool:
        rows = list(pool.map(compile_job, wanted, chunksize=8))
    if options.check:
        with TARGET.open(newline="") as file:
            found = problems(rows, list(csv.DictReader(file)))
        print("\n".join([*found, f"{len(rows)} kernels compiled, {len(found)} problems"]))
        return bool(found)
    if options.cases:
        writer = csv.DictWriter(sys.stdout, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
        return 0
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with TARGET.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"{TARGET}: {len(rows)} kernels compiled")
    return 0


if __name__ == "__main__":
    sys.exit(main())
