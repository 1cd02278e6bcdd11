"""Time every kernel beside what PyTorch offers, on one device in one process.

python scripts/bench_kernels.py                                               all -> results/kernels/<device>.csv, .md and .png
python scripts/bench_kernels.py cases=relu,division dtypes=bfloat16 budget=300
python scripts/bench_kernels.py profile=tiny                                  small inputs, without a GPU -> outputs/kernels

Per case and dtype: the kernel in each configuration, stock PyTorch, the kernel's reference eager and compiled, and a plain
device-to-device copy that reads half of the bytes the kernel has to move at least and writes the other half. A kernel is first
compared with its reference on fresh random inputs; one that is wrong is reported as red and not timed.

cases: name prefixes (default all); names: whole names instead, measured in this order. dtypes: of float32, bfloat16, float16 (default
all); cases of none of these, such as masks, are always measured. what: of kernel, stock, reference, compiled (default all).
configs=default: each kernel in that one alone. budget: seconds after which no other case is begun. out: another folder. fresh=true: measure
again; otherwise what the CSV holds, of the same device, versions and commit, is left out, so that the same command goes on where the last
one stopped. profile=tiny runs in Triton's interpreter on the CPU: its times mean nothing.

Exit codes: 0 all kernels of the chosen cases are right, or the budget ended before one was wrong; 1 one is red or failed; 2 bad input.
"""

import functools
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_INTERPRET", str(int("profile=tiny" in sys.argv)))  # before Triton is imported

import torch
import triton
from triton.testing import do_bench

from actpress.bench import kernel_rows
from actpress.kernels.common import launch
from actpress.kernels.proof import registry, verify
from actpress.report import kernels
from actpress.train import arguments, command, files, provenance
from actpress.train.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"full": ROOT / "results" / "kernels", "tiny": ROOT / "outputs" / "kernels"}
DEFAULTS = {
    "cases": (),
    "names": (),
    "dtypes": (),
    "what": (),
    "configs": "all",
    "budget": math.inf,
    "profile": "full",
    "fresh": False,
    "out": "",
}
INTERPRETER = "Triton interpreter, CPU"
SAME = ("device", "torch", "triton", "cuda", "driver", "commit")  # what rows must share to be continued
ORDER = (torch.float32, torch.bfloat16, torch.float16)
WHAT = ("kernel", "stock", "reference", "compiled")
SLOW_MS = 1000.0  # what takes longer is timed once


class Options(NamedTuple):
    """What was asked for on the command line."""

    cases: list[launch.Case]
    dtypes: list[torch.dtype]
    what: tuple[str, ...]
    default_only: bool
    budget: float
    tiny: bool
    fresh: bool
    out: Path


def parse(given: list[str]) -> Options:
    """Raises ValueError, on one line, for what is unknown or impossible."""
    values = arguments.read(given, DEFAULTS)
    named = registry.cases_named(values["cases"])
    if unknown := set(values["names"]) - set(named):
        raise ValueError(f"names={','.join(sorted(unknown))}, allowed: {', '.join(named)}")
    cases = [named[name] for name in values["names"] or named]
    dtypes = {registry.name_of(dtype): dtype for dtype in (*ORDER, *(dtype for case in cases for dtype in case.dtypes))}
    if unknown := set(values["dtypes"]) - set(dtypes):
        raise ValueError(f"dtypes={','.join(sorted(unknown))}, allowed: {', '.join(dtypes)}")
    if unknown := set(values["what"]) - set(WHAT):
        raise ValueError(f"what={','.join(sorted(unknown))}, allowed: {', '.join(WHAT)}")
    if values["configs"] not in ("all", "default"):
        raise ValueError(f"configs={values['configs']}, allowed: all, default")
    if values["profile"] not in FOLDERS:
        raise ValueError(f"profile={values['profile']}, allowed: {', '.join(FOLDERS)}")
    tiny, interpreted = values["profile"] == "tiny", triton.knobs.runtime.interpret
    if interpreted != tiny:
        raise ValueError(
            f"profile={values['profile']} with TRITON_INTERPRET={int(interpreted)}; leave that variable unset"
        )
    if not (tiny or torch.cuda.is_available()):
        raise ValueError("profile=full needs a CUDA device; profile=tiny runs without one")
    wanted = values["dtypes"] or tuple(dtypes)
    return Options(
        cases=cases,
        dtypes=[dtype for name, dtype in dtypes.items() if name in wanted or dtype not in ORDER],
        what=values["what"] or WHAT,
        default_only=values["configs"] == "default",
        budget=values["budget"],
        tiny=tiny,
        fresh=values["fresh"],
        out=Path(values["out"] or FOLDERS[values["profile"]]),
    )


def environment(device: str) -> dict[str, str]:
    """Where and from what a row was measured. commit: "changed" is added where files differ from it."""
    found = provenance.commit()
    commit = (found["commit"] or "")[:12] + (" changed" if found["dirty"] else "")
    about = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    if device != "cuda":
        return {**about, "device": INTERPRETER, "cuda": "", "driver": ""}
    return {
        **about,
        "device": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "driver": provenance.nvidia_smi("driver_version") or "",
    }


def timings(function: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of single runs. On a GPU between events, its L2 cache overwritten before each; in the interpreter, of one run."""

    def once() -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    if device != "cuda":
        return [once()]
    once()  # what is compiled on first use
    first = once()
    return [first] if first > SLOW_MS else do_bench(function, return_mode="all")


def copy_of(count: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes `count` bytes in total."""
    x = torch.randint(256, (count // 2,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def measure(case: launch.Case, dtype: torch.dtype, device: str, options: Options) -> list[kernel_rows.Row]:
    """The rows of one case in one dtype. What fails, or does not fit in memory, costs its own row alone."""
    about: dict[str, object] = {"case": case.name, "dtype": registry.name_of(dtype)}
    default = {"what": "kernel", "config": registry.describe(case, case.configs[0])}
    if reason := left_out(case, dtype, device):
        return [kernel_rows.row(**about, **default, status=f"skipped: {reason}")]
    torch.seed()
    try:
        inputs = (case.make if device == "cuda" else case.tiny)(dtype, device)
        about |= {"floor_bytes": case.floor(*inputs), "moved_bytes": case.moved(*inputs)}
        about |= {"flops": case.flops(*inputs)} if case.flops else {}
        expected = verify.outcome(case.reference, inputs)
    except Exception as error:  # whatever it is, it must not cost the other cases their time on the device
        return [kernel_rows.row(**about, **default, status=status_of(error))]
    rows = []
    for what, config, prepare in contestants(case, inputs, expected, device, options):
        status, ms = attempt(prepare, device)
        rows.append(kernel_rows.row(ms, **about, what=what, config=config, status=status))
    return kernel_rows.compared(rows)


def left_out(case: launch.Case, dtype: torch.dtype, device: str) -> str | None:
    """Why there is nothing to measure, if so."""
    if device != "cuda" and case.tiny is None:
        return "no tiny size"
    if device != "cuda" and dtype == torch.bfloat16:
        return "the interpreter truncates where a GPU rounds to bfloat16"
    return None


def contestants(
    case: launch.Case, inputs: tuple, expected: list[torch.Tensor], device: str, options: Options
) -> Iterator[tuple[str, str, Callable | None]]:
    """(what, configuration, a function that prepares the function to time; None where there is none)."""
    yield "copy", "", lambda: copy_of(case.floor(*inputs), device)
    for config in case.configs[:1] if options.default_only else case.configs:
        yield "kernel", registry.describe(case, config), functools.partial(verified, case, config, inputs, expected)
    compiled = None
    if "compiled" in options.what:  # loading the compiler alone takes seconds
        compiled = torch.compile(case.reference, dynamic=False, backend="inductor" if device == "cuda" else "eager")
    for what, function in (("stock", case.stock), ("reference", case.reference), ("compiled", compiled)):
        if what in options.what:
            yield what, "", function and functools.partial(ready, function, inputs)


def ready(function: Callable, inputs: tuple, **options: object) -> Callable[[], object]:
    """The call to time, on inputs of its own: some functions change them."""
    return functools.partial(function, *verify.copied(inputs), **options)


def attempt(prepare: Callable | None, device: str) -> tuple[str, list[float]]:
    """(status, times in ms)."""
    if prepare is None:
        return kernel_rows.NO_COUNTERPART, []
    try:
        return "ok", timings(prepare(), device)
    except Red as error:
        return f"red: {error}", []
    except Exception as error:  # as above
        return status_of(error), []


class Red(Exception):
    """A kernel's output is not what its reference says."""


def verified(
    case: launch.Case, config: launch.Config, inputs: tuple, expected: list[torch.Tensor]
) -> Callable[[], object]:
    """The kernel, ready to be timed. Raises Red if it is wrong."""
    wrong = verify.difference(case, config, inputs, expected)
    if wrong:
        raise Red(f"{wrong}; seed {torch.initial_seed()}")
    return ready(case.kernel, inputs, config=config)


def status_of(error: Exception) -> str:
    """oom, or failed and why, on one line."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def main(given: list[str]) -> int:
    try:
        options = parse(given)
        device = "cpu" if options.tiny else "cuda"
        table = Table(options.out, environment(device))
    except ValueError as error:
        raise InputError(str(error)) from error
    # dtype by dtype, so that a budget that ends early has seen every case
    chosen = {(c.name, registry.name_of(d)): (c, d) for d in options.dtypes for c in options.cases if d in c.dtypes}
    left = [unit for unit in chosen if options.fresh or unit not in table.units()]
    for unit in within(options.budget, list(left)):
        rows = measure(*chosen[unit], device, options)
        table.replace(unit, rows)
        left.remove(unit)
        print("\n".join(map(kernel_rows.line, rows)), flush=True)
        if not freed(device):
            break
    if table.rows:
        kernels.render(table.path)
    wrong = [row for unit, rows in table.units().items() if unit in chosen for row in rows if is_wrong(row)]
    print("".join(f"NOT RIGHT: {kernel_rows.line(row)}\n" for row in wrong), end="")
    print(f"{table.path}: {f'{len(left)} of {len(chosen)} left; the same command goes on' if left else 'complete'}")
    return int(bool(wrong))


class Table:
    """The file of one device, rewritten after every case. Rows of cases that are no more are dropped."""

    def __init__(self, folder: Path, here: dict[str, str]) -> None:
        self.here = here
        self.path = folder / f"{files.slug(here['device'])}.csv"
        self.cases = {name: i for i, name in enumerate(registry.all_cases())}
        self.rows = [row for row in kernel_rows.read(self.path) if row["case"] in self.cases]

    def units(self) -> dict[tuple[str, str], list[kernel_rows.Row]]:
        """Rows by case and dtype, of this device, these versions and these sources."""
        found: dict[tuple[str, str], list[kernel_rows.Row]] = {}
        for row in self.rows:
            if all(row[key] == self.here[key] for key in SAME):
                found.setdefault((row["case"], row["dtype"]), []).append(row)
        return found

    def replace(self, unit: tuple[str, str], rows: list[kernel_rows.Row]) -> None:
        """Put freshly measured rows in the place of the unit's old ones, if any."""
        others = [row for row in self.rows if (row["case"], row["dtype"]) != unit]
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.rows = [*others, *({**row, **self.here, "date": date} for row in rows)]
        self.rows.sort(key=lambda row: (self.cases[row["case"]], row["dtype"]))
        kernel_rows.write(self.path, self.rows)


def within(budget: float, units: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Units until the seconds are used up, as far as the longest so far tells."""
    begin, longest = time.monotonic(), 0.0
    for unit in units:
        start = time.monotonic()
        if start - begin + longest > budget:
            return
        yield unit
        longest = max(longest, time.monotonic() - start)


def is_wrong(row: kernel_rows.Row) -> bool:
    return row["what"] == "kernel" and row["status"].startswith(("red", "failed"))


def freed(device: str) -> bool:
    """Give memory back before the next case. False where a kernel left the device unusable to this process."""
    gc.collect()
    torch.compiler.reset()
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError as error:
        print(f"the device is unusable to this process, which ends here: {status_of(error)}")
        return False
    torch.cuda.empty_cache()
    return True


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
