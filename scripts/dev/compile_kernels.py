"""Compile every Triton kernel ahead of time, without a GPU: what it needs on each architecture.

python scripts/dev/compile_kernels.py                 all kernels x dtypes x configurations for sm_80 and sm_90 -> results/kernels/aot.csv
python scripts/dev/compile_kernels.py division relu   only cases whose name starts so; printed, not written
python scripts/dev/compile_kernels.py --check         exit 1 for spills in a default configuration, an overflow, an old aot.csv

code is a digest of what Triton hands its backend: the kernel's intermediate code, options and the version of Triton. Rows of aot.csv whose
code is still the same are taken over, all else is compiled. --check also compiles every eighth of the defaults for sm_90.

Registers per thread, bytes of spills (stores and loads), stack and static shared memory are what ptxas reports when Triton calls it;
dynamic shared memory is what Triton asks for at launch. Arguments are specialised as at run time for the sizes of the cases. overflow:
32-bit arithmetic that may overflow on its way to an address when the launch grows, see scripts/dev/offsets.py; of a kernel with a constant
WIDE, which stands for 64-bit offsets, that variant is looked at.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"  # before Triton is imported

import offsets
import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from actpress.kernels.common import launch
from actpress.kernels.proof import registry

TARGET = Path(__file__).resolve().parents[2] / "results" / "kernels" / "aot.csv"
ARCHITECTURES = (80, 90)
SAMPLED = 8  # --check compiles one in so many kernels whose code has not changed
KEY = ("case", "launch", "kernel", "dtype", "config", "arch")
MEASURED = ("registers", "spill_bytes", "stack_bytes", "static_shared_bytes", "dynamic_shared_bytes")
FIELDS = (*KEY, *MEASURED, "overflow", "code", "triton")
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

    def wanted(self) -> launch.Launch:
        case = all_cases()[self.case]
        return registry.launches(case, self.dtype, case.configs[self.config])[self.launch]


all_cases = functools.cache(registry.all_cases)


def jobs(cases: Iterable[str]) -> dict[tuple, list[Job]]:
    """Everything to compile; what gives the same code in several cases together, by what it is made of."""
    found: dict[tuple, list[Job]] = {}
    for name in cases:
        case = all_cases()[name]
        for dtype in case.dtypes:
            for position, config in enumerate(case.configs):
                for i, wanted in enumerate(registry.launches(case, dtype, config)):
                    for arch in ARCHITECTURES:
                        key = (source(wanted).hash(), str(wanted.options), arch)
                        found.setdefault(key, []).append(Job(name, dtype, position, i, arch))
    return found


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


def rows_of(same: list[Job], anew: bool, known: Mapping[str, dict[str, str]]) -> list[tuple[Job, dict[str, str]]]:
    """Rows of the table for jobs that give the same code. known: rows by their code; anew: compile also where there is one."""
    wanted, arch = same[0].wanted(), same[0].arch
    try:
        code = lowered(wanted, arch)
        wide = widened(wanted)
        wide_code = code if wide is wanted else lowered(wide, arch)
        digest = hashlib.sha256(f"{code} {wanted.options} {arch} {triton.__version__}".encode()).hexdigest()[:12]
        measured = known[digest] if digest in known and not anew else compiled(wanted, arch)
    except Exception as error:
        error.add_note(str(same[0]))
        raise
    measured = {field: str(measured[field]) for field in MEASURED}
    return [(job, row(job, wide_code) | measured | {"code": digest, "triton": triton.__version__}) for job in same]


def row(job: Job, code: str) -> dict[str, str]:
    case, wanted = all_cases()[job.case], widened(job.wanted())
    names = [name for name, kind in source(wanted).signature.items() if kind != "constexpr"]
    return {
        "case": job.case,
        "launch": str(job.launch + 1),
        "kernel": wanted.kernel.__name__,
        "dtype": registry.name_of(job.dtype),
        "config": registry.describe(case, case.configs[job.config]),
        "arch": f"sm_{job.arch}",
        "overflow": "; ".join(offsets.overflows(code, [wanted.arguments[name] for name in names], wanted.grid)),
    }


def widened(wanted: launch.Launch) -> launch.Launch:
    """With 64-bit offsets, if it is a launch that has a choice."""
    if wanted.arguments.get("WIDE") is not False:
        return wanted
    return dataclasses.replace(wanted, arguments={**wanted.arguments, "WIDE": True})


def lowered(wanted: launch.Launch, arch: int, until: str = "ttir") -> str:
    """Triton's intermediate code: TTIR, with which its backend begins, or TTGIR, which has layouts."""
    target = GPUTarget("cuda", arch, 32)
    backend, code, context, stages = make_backend(target), source(wanted), ir.context(), {}
    options = backend.parse_options(dict(wanted.options))
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = code.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    backend.add_stages(stages, options, code.language)
    metadata = {}
    made = stages["ttir"](made, metadata)
    return (made if until == "ttir" else stages["ttgir"](made, metadata)).str_nodebug()


def compiled(wanted: launch.Launch, arch: int) -> dict[str, int]:
    """What ptxas and Triton say of the compiled kernel."""
    kernel, report = compiled_and_report(wanted, arch)
    return {
        "registers": largest(r"Used (\d+) registers", report),
        "spill_bytes": largest(r"(\d+) bytes spill stores", report) + largest(r"(\d+) bytes spill loads", report),
        "stack_bytes": largest(r"(\d+) bytes stack frame", report),
        "static_shared_bytes": largest(r"(\d+) bytes smem", report, default=0),
        "dynamic_shared_bytes": kernel.metadata.shared,
    }


def compiled_and_report(wanted: launch.Launch, arch: int) -> tuple[Any, str]:
    """The compiled kernel and what ptxas said; Triton prints that on request, where it compiles rather than finds a cached result."""
    printed = io.StringIO()
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(printed):
        triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
        target = GPUTarget("cuda", arch, 32)
        compiled = triton.compile(source(wanted), target=target, options=dict(wanted.options))
    return compiled, printed.getvalue()


def largest(pattern: str, report: str, default: int | None = None) -> int:
    """Of the functions that a kernel consists of."""
    found = [int(number) for number in re.findall(pattern, report)]
    return max(found) if default is None else max(found, default=default)


def problems(rows: list[dict[str, str]], committed: list[dict[str, str]]) -> list[str]:
    """Spills in defaults, offsets that may overflow, and where aot.csv says something else; numbers of another Triton are let be."""
    found = [
        f"{words(row)}: {row['spill_bytes']} bytes of spills"
        for row in rows
        if row["spill_bytes"] != "0" and row["config"].startswith("default")
    ]
    found += {f"{row['case']} {row['kernel']}: {row['overflow']}" for row in rows if row["overflow"]}
    here, there = ({words(row): row for row in table} for table in (rows, committed))
    found += [f"not in {TARGET.name}: {key}" for key in here.keys() - there.keys()]
    found += [f"in {TARGET.name}, no longer there: {key}" for key in there.keys() - here.keys()]
    found += [
        f"{TARGET.name} is of another source: {key}"
        for key in here.keys() & there.keys()
        if here[key] != there[key] and here[key]["triton"] == there[key]["triton"]
    ]
    return sorted(found)


def words(row: dict[str, str]) -> str:
    return " ".join(row[field] for field in KEY)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="PREFIX")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    try:
        chosen = registry.cases_named(options.cases)
    except ValueError as error:
        parser.error(str(error))
    committed = read(options.cases)
    todo = jobs(chosen)
    known = {row["code"]: row for row in committed}
    defaults = [i for i, same in enumerate(todo.values()) if any(job.config == 0 and job.arch == 90 for job in same)]
    sampled = set(defaults[::SAMPLED]) if options.check else set()
    anew = [i in sampled for i in range(len(todo))]
    with ProcessPoolExecutor(options.workers) as pool:
        made = pool.map(functools.partial(rows_of, known=known), todo.values(), anew, chunksize=4)
        done = dict(pair for pairs in made for pair in pairs)
    order = {name: i for i, name in enumerate(chosen)}
    rows = [done[job] for job in sorted(done, key=lambda job: (order[job.case], str(job.dtype), *job[2:]))]
    if options.check:
        found = problems(rows, committed)
        print("\n".join([*found, f"{len(rows)} launches of {len(todo)} kernels, {len(found)} problems"]))
        return bool(found)
    if options.cases:
        write(sys.stdout, rows)
        return 0
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with TARGET.open("w", newline="") as file:
        write(file, rows)
    print(f"{TARGET}: {len(rows)} launches of {len(todo)} kernels")
    return 0


def read(prefixes: Iterable[str]) -> list[dict[str, str]]:
    """The table as it is, rows of cases whose name starts with one of `prefixes`, or all; empty where there is none."""
    if not TARGET.is_file():
        return []
    with TARGET.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["case"].startswith(tuple(prefixes) or "")]


def write(file: Any, rows: list[dict[str, str]]) -> None:
    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
