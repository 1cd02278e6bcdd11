"""Times of every kernel beside what PyTorch offers, on one device in one process.

Per case and dtype: the kernel in each configuration, stock PyTorch, the kernel's reference eager and compiled, and a plain device-to-device
copy that reads half of the bytes that the kernel has to move at least and writes the other half. A kernel is first compared with its
reference on fresh random inputs; a wrong one is reported as red and not timed.

Needs no Hydra. In Triton's interpreter, on a CPU, times mean nothing.
"""

import functools
import gc
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.testing import do_bench

from actpress.bench import kernel_rows
from actpress.bench.kernel_rows import Row
from actpress.kernels.common import launch
from actpress.kernels.proof import registry, verify
from actpress.train import provenance
from actpress.train.files import slug

INTERPRETER = "Triton interpreter, CPU"
SAME = ("device", "torch", "triton", "cuda", "driver", "commit")  # columns that rows of one measurement share
ORDER = (torch.float32, torch.bfloat16, torch.float16)
WHAT = ("kernel", "stock", "reference", "compiled")
SLOW_MS = 1000.0  # a function that takes longer is timed once
Unit = tuple[str, str]  # case and dtype: what is measured at once


class Options(NamedTuple):
    """What to measure. what: of WHAT. default_only: each kernel in its first configuration alone. budget: seconds after which no other
    case is started. tiny: small inputs in Triton's interpreter. fresh: measure again what the file holds. out: folder of the file."""

    cases: list[launch.Case]
    dtypes: list[torch.dtype]
    what: tuple[str, ...]
    default_only: bool
    budget: float
    tiny: bool
    fresh: bool
    out: Path


def select(
    *,
    cases: Sequence[str],
    names: Sequence[str],
    dtypes: Sequence[str],
    what: Sequence[str],
    configs: str,
    profile: str,
    budget: float,
    fresh: bool,
    out: Path,
) -> Options:
    """The options that command-line arguments stand for. Raises ValueError, on one line, for what is unknown or impossible here.

    cases: prefixes of names; names: whole names, in the order to measure. Empty lists stand for all. configs: all or default. profile: full
    or tiny.
    """
    named = registry.cases_named(tuple(cases))
    _check_names("names", names, named)
    chosen = [named[name] for name in names or named]
    known = {registry.name_of(dtype): dtype for dtype in (*ORDER, *(dtype for case in chosen for dtype in case.dtypes))}
    _check_names("dtypes", dtypes, known)
    _check_names("what", what, WHAT)
    _check_device(profile)
    return Options(
        cases=chosen,
        dtypes=[dtype for name, dtype in known.items() if not dtypes or name in dtypes or dtype not in ORDER],
        what=tuple(what) or WHAT,
        default_only=configs == "default",
        budget=budget,
        tiny=profile == "tiny",
        fresh=fresh,
        out=out,
    )


def _check_names(option: str, names: Sequence[str], allowed: Collection[str]) -> None:
    if unknown := set(names) - set(allowed):
        raise ValueError(f"--{option} {','.join(sorted(unknown))}, allowed: {', '.join(allowed)}")


def _check_device(profile: str) -> None:
    """Raise ValueError unless profile full has a CUDA device, and tiny Triton's interpreter."""
    interpreted = triton.knobs.runtime.interpret
    if interpreted != (profile == "tiny"):
        raise ValueError(
            f"--profile {profile} with TRITON_INTERPRET={int(interpreted)}, allowed: that variable unset; the profile sets it"
        )
    if profile == "full" and not torch.cuda.is_available():
        raise ValueError("--profile full needs a CUDA device; --profile tiny runs without one")


def measure_all(options: Options) -> tuple[Path, list[Row]]:
    """Measure what the file of this device lacks, printing rows as they come, and write it after every case.

    Returns (the file, the rows of chosen kernels that are red or failed). Raises ValueError if the file has other columns.
    """
    device = "cpu" if options.tiny else "cuda"
    table = Table(options.out, environment(device))
    # dtype by dtype, so that a budget that ends early has seen every case
    chosen = {(c.name, registry.name_of(d)): (c, d) for d in options.dtypes for c in options.cases if d in c.dtypes}
    remaining = [unit for unit in chosen if options.fresh or unit not in table.units()]
    for unit in within(options.budget, list(remaining)):
        rows = measure(*chosen[unit], device, options)
        table.replace(unit, rows)
        remaining.remove(unit)
        print("\n".join(map(kernel_rows.line, rows)), flush=True)
        if not freed(device):
            break
    wrong = [row for unit, rows in table.units().items() if unit in chosen for row in rows if is_wrong(row)]
    print("".join(f"NOT RIGHT: {kernel_rows.line(row)}\n" for row in wrong), end="")
    words = f"{len(remaining)} of {len(chosen)} left; the same command resumes" if remaining else "complete"
    print(f"{table.path}: {words}")
    return table.path, wrong


def environment(device: str) -> dict[str, str]:
    """Where and from what a row was measured. commit: "changed" is appended where files differ from it."""
    found = provenance.commit()
    commit = (found["commit"] or "")[:12] + (" changed" if found["dirty"] else "")
    about = {"torch": torch.__version__, "triton": triton.__version__, "commit": commit}
    if device != "cuda":
        return {**about, "device": INTERPRETER, "cuda": "", "driver": ""}
    driver = provenance.nvidia_smi("driver_version") or ""
    return {**about, "device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "driver": driver}


class Table:
    """The file of one device, rewritten after every case. Rows of cases that no longer exist are dropped."""

    def __init__(self, folder: Path, here: dict[str, str]) -> None:
        self.here = here
        self.path = folder / f"{slug(here['device'])}.csv"
        self.cases = {name: i for i, name in enumerate(registry.all_cases())}
        self.rows = [row for row in kernel_rows.read(self.path) if row["case"] in self.cases]

    def units(self) -> dict[Unit, list[Row]]:
        """Rows by case and dtype, of this device, these versions and these sources."""
        found: dict[Unit, list[Row]] = {}
        for row in self.rows:
            if all(row[key] == self.here[key] for key in SAME):
                found.setdefault((row["case"], row["dtype"]), []).append(row)
        return found

    def replace(self, unit: Unit, rows: list[Row]) -> None:
        """Replace the unit's rows, if any, by freshly measured ones."""
        others = [row for row in self.rows if (row["case"], row["dtype"]) != unit]
        date = datetime.now(UTC).isoformat(timespec="seconds")
        self.rows = [*others, *({**row, **self.here, "date": date} for row in rows)]
        self.rows.sort(key=lambda row: (self.cases[row["case"]], row["dtype"]))
        kernel_rows.write(self.path, self.rows)


def measure(case: launch.Case, dtype: torch.dtype, device: str, options: Options) -> list[Row]:
    """The rows of one case in one dtype. A contestant that fails, or does not fit in memory, costs its own row alone."""
    about: dict[str, object] = {"case": case.name, "dtype": registry.name_of(dtype)}
    default = {"what": "kernel", "config": registry.describe(case, case.configs[0])}
    if reason := reason_to_skip(case, dtype, device):
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


def reason_to_skip(case: launch.Case, dtype: torch.dtype, device: str) -> str | None:
    """Why this case cannot be measured here; None if it can."""
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


def copy_of(count: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes `count` bytes in total."""
    x = torch.randint(256, (count // 2,), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return lambda: y.copy_(x)


def ready(function: Callable, inputs: tuple, **options: object) -> Callable[[], object]:
    """The call to time, on its own copy of the inputs: some functions change them."""
    return functools.partial(function, *verify.copied(inputs), **options)


class Red(Exception):
    """A kernel's output differs from its reference's."""


def verified(
    case: launch.Case, config: launch.Config, inputs: tuple, expected: list[torch.Tensor]
) -> Callable[[], object]:
    """The kernel, ready to be timed. Raises Red if it is wrong."""
    wrong = verify.difference(case, config, inputs, expected)
    if wrong:
        raise Red(f"{wrong}; seed {torch.initial_seed()}")
    return ready(case.kernel, inputs, config=config)


def attempt(prepare: Callable | None, device: str) -> tuple[str, list[float]]:
    """(status, times in ms)."""
    if prepare is None:
        return kernel_rows.NO_COUNTERPART, []
    try:
        return "ok", timings(prepare(), device)
    except Red as error:
        return f"red: {error}", []
    except Exception as error:  # as in `measure`
        return status_of(error), []


def timings(function: Callable[[], object], device: str) -> list[float]:
    """Milliseconds of single runs: on a GPU between events, its L2 cache overwritten before each; in the interpreter of one run."""

    def once() -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    if device != "cuda":
        return [once()]
    once()  # compiles what is compiled on first use
    first = once()
    return [first] if first > SLOW_MS else do_bench(function, return_mode="all")


def status_of(error: Exception) -> str:
    """oom, or failed and why, on one line."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "oom"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_wrong(row: Row) -> bool:
    """Whether a row is a kernel's that is red or failed."""
    return row["what"] == "kernel" and row["status"].startswith(("red", "failed"))


def within(budget: float, units: list[Unit]) -> Iterator[Unit]:
    """Units as long as the next one fits into `budget` seconds, if it takes as long as the longest so far."""
    begin, longest = time.monotonic(), 0.0
    for unit in units:
        start = time.monotonic()
        if start - begin + longest > budget:
            return
        yield unit
        longest = max(longest, time.monotonic() - start)


def freed(device: str) -> bool:
    """Free memory before the next case. Returns False if a kernel left the device unusable to this process."""
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
