"""A battery: commands with time limits that need a GPU and can be stopped at any moment, in configs/battery/<profile>.yaml.

A profile names its `device`, the seconds of each of its `calls` (a machine that is lent for minutes takes commands of limited length), the
`overhead` seconds of starting the machine and copying, and its `units`, most valuable first. See Unit.

Scripts write their rows below `out` as soon as they have them, and skip existing ones, so that the same command resumes:

identity.json   units.json   *.json   *.csv   runs/<run_id>.json   logs/<unit>.log
"""

import os
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from actpress.train import files, provenance, record

GRACE = 5.0  # seconds that a stopped unit has to end by itself
WORTH = 10.0  # seconds that must remain to start a unit
EVERY = 10.0  # seconds between two archives while a unit runs
TAIL = 20  # lines of a failed unit's log that are printed


@dataclass(frozen=True)
class Unit:
    """A command of a battery.

    run: arguments of python; {out} is the folder of results, {seconds} the time the command has.
    seconds: time limit; unused time of earlier units is added.
    rehearse: arguments appended in a rehearsal on a CPU; the last one of an option counts.
    variables: environment variables, not in a rehearsal.
    required: its failure ends the call, since the other units are worth nothing without it.
    """

    name: str
    run: str
    seconds: float
    call: str = ""
    rehearse: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    required: bool = False


@dataclass(frozen=True)
class Profile:
    """calls: seconds of each, {"": seconds} where there is but one."""

    name: str
    device: str
    calls: Mapping[str, float]
    units: tuple[Unit, ...]
    overhead: float = 0.0

    def plan(self, ended: Mapping[str, Any]) -> list[str]:
        """A line for each unit, each call and the sum. ended: see `units_of`."""
        words = {name: f": {unit['status']} in {unit['seconds']:.0f} s" for name, unit in ended.items()}
        lines = []
        for call, seconds in self.calls.items():
            units = [unit for unit in self.units if unit.call == call]
            lines += [f"{unit.seconds:5.0f} s  {unit.name}{words.get(unit.name, '')}" for unit in units]
            planned = sum(unit.seconds for unit in units)
            lines += [f"{planned:5.0f} s  of {seconds:.0f} s  {call and f'of call {call}'}", ""]
        total, rest = sum(self.calls.values()) + self.overhead, f"{self.overhead:.0f} s to start and to copy"
        return [*lines, f"{total:5.0f} s  in all ({total / 60:.1f} minutes), {rest}"]


def load(folder: Path, name: str) -> Profile:
    """The profile folder/<name>.yaml. Raises ValueError, with what is allowed, for an unknown name or too long a call."""
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"profile={name}, allowed: {', '.join(names)}")
    content = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=True)
    units = tuple(Unit(**unit) for unit in content.pop("units"))
    profile = Profile(name, units=units, **content)
    for call in {unit.call for unit in units}:
        planned = sum(unit.seconds for unit in units if unit.call == call)
        if planned > (allowed := profile.calls.get(call, 0)):
            raise ValueError(f"profile {name}: the units of call {call!r} take {planned:.0f} s, allowed: {allowed:.0f}")
    return profile


def units_of(out: Path) -> dict[str, Any]:
    """How each unit ended, by name: status, seconds, limit, its last line of output, commit and dirty of its source."""
    return record.read(out / "units.json", {"units": dict})["units"] if (out / "units.json").exists() else {}


def execute_call(
    profile: Profile, call: str, seconds: float, out: Path, archive: Path, root: Path, rehearsal: bool = False
) -> int:
    """Run the units of a call that are not done and fit into `seconds`. `archive`, of all files in `out`, is rewritten every EVERY seconds.

    A unit that fails is recorded, with its log, and does not stop the rest. Returns 1 if one failed or was stopped, 0 otherwise.
    """
    end, ended, commit = time.monotonic() + seconds, units_of(out), provenance.commit()
    units = [unit for unit in profile.units if unit.call == call]
    with _archived(out, archive):
        for number, unit in enumerate(units):
            left, before = end - GRACE - time.monotonic(), ended.get(unit.name, {})
            if before.get("status") == "done":
                if before["commit"] != commit["commit"]:
                    print(f"{unit.name}: done at {before['commit']}, not run again", flush=True)
                continue
            if left < min(WORTH, unit.seconds):
                print(f"[{left:4.0f} s left] {unit.name}: not started", flush=True)
                continue
            limit = min(left, max(unit.seconds, left - sum(later.seconds for later in units[number + 1 :])))
            log, begin = out / "logs" / f"{files.slug(unit.name)}.log", time.monotonic()
            code = execute(unit, out, log, limit, root, rehearsal)
            status = "stopped" if code is None else "failed" if code else "done"
            took, left = time.monotonic() - begin, end - time.monotonic()
            tail = log.read_text(errors="replace").splitlines()[-TAIL:]
            found = {"status": status, "seconds": round(took, 1), "limit": round(limit, 1), **commit}
            ended[unit.name] = {**found, "said": " ".join(tail[-1:])[:300]}
            record.write(out / "units.json", {"units": ended})
            print(f"[{left:4.0f} s left] {unit.name}: {status} in {took:.0f} s", flush=True)
            if status == "failed":
                print("".join(f"    {line}\n" for line in tail), end="", flush=True)
                if unit.required:
                    return 1
    how = [ended.get(unit.name, {}).get("status") for unit in units]
    print(f"{how.count('done')} of {len(units)} units done; {archive}", flush=True)
    return int("failed" in how or "stopped" in how)


def execute(unit: Unit, out: Path, log: Path, seconds: float, root: Path, rehearsal: bool = False) -> int | None:
    """Run a unit for at most `seconds`, its output in `log`. Returns its exit code, None if it ran out of time.

    It has a process group of its own, which is interrupted as by Ctrl-C when its time is over, and killed GRACE seconds later.
    """
    words = shlex.split(f"{unit.run} {unit.rehearse}" if rehearsal else unit.run)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, *(word.format(out=out, seconds=int(seconds)) for word in words)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | ({} if rehearsal else dict(unit.variables)),
            process_group=0,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also of an interruption
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def pack(out: Path, archive: Path) -> None:
    """Write all files below `out` into a .tar.gz, which replaces the last one atomically."""
    with files.atomic_write(archive) as file, tarfile.open(fileobj=file, mode="w:gz", compresslevel=1) as tar:
        for path in sorted(out.rglob("*")):
            if path.is_file() and path.suffix != ".tmp":
                tar.add(path, path.relative_to(out).as_posix())


@contextmanager
def _archived(out: Path, archive: Path) -> Iterator[None]:
    """Pack every EVERY seconds, and at the end of the block, even if it is interrupted."""
    over = threading.Event()

    def again() -> None:
        while not over.wait(EVERY):
            with suppress(OSError):  # a file changed meanwhile: the next archive has it; the last call raises
                pack(out, archive)

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        pack(out, archive)
