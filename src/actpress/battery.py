"""Everything a GPU is needed for, in one command that may be interrupted at any time: units, the order they run in, their state.

A unit is a command with the least time it is worth starting for and the most it may take. `Battery.run` starts those that are not done
and fit into the time left, one after the other, stops one that outlasts it, and notes how each ended; the next call goes on. Below
the folder `out`:

state.json            what each unit came to, under its name, the source and the device; written after every unit
environment.json      the device, its memory, versions, commit
units/  kernels/  runs/   what the units measured (bench_training.py, largest_batch.py, pytest; bench_kernels.py; train.py)
logs/                 what they printed
training/  data/      checkpoints and images, which stay on the machine
battery-<device>.tar.gz   all of it but what stays

Status: done; failed; stopped (its time was over: it goes on or begins again in the next call). One that failed is not repeated unless it
says itself that it is incomplete, or `retry` is asked for.
"""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from actpress import record

FORMAT = 1  # of state.json
OURS = ("state.json", "environment.json", "units", "kernels", "runs", "logs", "training", "data")  # below `out`
GRACE = 10.0  # seconds a stopped unit has to end by itself
RESERVE = GRACE + 5.0  # kept back from the budget, for stopping and packing
TAIL_LINES = 30
SECONDS = "{seconds}"  # in a command: the time it has to end by itself
COMPLETE = "complete"  # the last word of a unit that goes on by itself, when there is nothing left


@dataclass(frozen=True)
class Unit:
    """minimum, limit: seconds. ended: exit codes that are results. announces: prints COMPLETE when nothing is left, see there.
    resumes: goes on where it was stopped. junit: where pytest leaves its report. keeps: what must exist for it to count as done.
    after: the unit that has to be done first. skip: why it cannot run here. facts: what else the state shall say about it."""

    name: str
    command: tuple[str, ...] = ()
    minimum: float = 10.0
    limit: float = 300.0
    writes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    ended: tuple[int, ...] = (0,)
    announces: bool = False
    resumes: bool = False
    junit: Path | None = None
    keeps: Path | None = None
    after: str | None = None
    skip: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^\w.-]+", "-", self.name)


class Battery:
    """The units of one profile on one device. clock() is in seconds; `end` is when the budget is over."""

    def __init__(
        self,
        units: Sequence[Unit],
        out: Path,
        environment: Mapping[str, Any],
        profile: str,
        root: Path,
        end: float,
        any_source: bool = False,
        retry: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.units, self.out, self.environment, self.profile, self.root = list(units), out, environment, profile, root
        self.end, self.any_source, self.retry, self.clock = end, any_source, retry, clock
        self.state = read_state(out, profile)

    def entry(self, unit: Unit) -> dict[str, Any] | None:
        """How the unit last ended, for this source and device (with any_source: the latest of this device)."""
        device, source = self.environment["device"], self.environment["source"]
        found = [
            entry
            for entry in self.state["units"].values()
            if (entry["unit"], entry["device"]) == (unit.name, device)
            and (self.any_source or entry["source"] == source)
        ]
        return max(found, key=lambda entry: entry["date"], default=None)

    def settled(self, unit: Unit) -> bool:
        """Whether there is nothing to do for the unit."""
        entry = self.entry(unit)
        if entry is None or entry["status"] == "stopped" or (unit.keeps and not unit.keeps.exists()):
            return False
        return entry["status"] == "done" or not (self.retry or entry["incomplete"])

    def needs(self, unit: Unit) -> float:
        """Seconds that must be left for the unit to be started; more than it lasted when it was stopped, unless it goes on from there."""
        entry = self.entry(unit)
        stopped = entry["seconds"] if entry and entry["status"] == "stopped" and not unit.resumes else 0.0
        return max(unit.minimum, min(1.2 * stopped, unit.limit))

    def plan(self) -> list[str]:
        """A line for each unit."""
        lines = []
        for unit in self.units:
            entry = self.entry(unit)
            if unit.skip:
                what = f"skipped: {unit.skip}"
            elif self.settled(unit):
                what = f"{entry['status']}: {entry['message']}"
            else:
                what = f"to do, from {self.needs(unit):.0f} to {unit.limit:.0f} s, writes {', '.join(unit.writes)}"
                what = f"{entry['status']} before, {what}" if entry else what
            lines.append(f"{unit.name}: {what}")
        todo = [unit for unit in self.units if not unit.skip and not self.settled(unit)]
        least, most = sum(map(self.needs, todo)), sum(unit.limit for unit in todo)
        return [*lines, f"{len(self.units)} units, {len(todo)} to do, at least {least:.0f} s, at most {most:.0f} s"]

    def run(self, pack: Callable[[], Any]) -> int:
        """Run what is left and fits; pack() is called after every unit. Returns the exit code: 1 if a unit failed, now or before."""
        self.out.mkdir(parents=True, exist_ok=True)
        record.write(self.out / "environment.json", dict(self.environment))
        for unit in self.units:
            left = self.end - RESERVE - self.clock()
            if unit.skip:
                self.say(f"{unit.name}: skipped: {unit.skip}")
            elif self.settled(unit):
                continue
            elif waits := [other.name for other in self.units if other.name == unit.after and not self.settled(other)]:
                self.say(f"{unit.name}: not started, waits for {waits[0]}")
            elif left < self.needs(unit):
                self.say(f"{unit.name}: not started, needs {self.needs(unit):.0f} s")
            else:
                try:
                    self.note(unit, **self.execute(unit, min(unit.limit, left)))
                finally:  # also when this process is interrupted
                    pack()
        pack()
        units = [unit for unit in self.units if not unit.skip]
        failed = [unit.name for unit in units if (entry := self.entry(unit)) and entry["status"] == "failed"]
        told = f"FAILED: {', '.join(failed)}" if failed else "none failed"
        self.say(f"{self.left()} of {len(units)} units left, {told}")
        return int(bool(failed))

    def left(self) -> int:
        """How many units that can run here are not settled."""
        return sum(not unit.skip and not self.settled(unit) for unit in self.units)

    def execute(self, unit: Unit, seconds: float) -> dict[str, Any]:
        """Run the unit for at most `seconds`; returns how it ended."""
        log = self.out / "logs" / f"{unit.file}.log"
        for folder in (log.parent, *(self.out / Path(path).parent for path in unit.writes)):
            folder.mkdir(parents=True, exist_ok=True)
        if unit.junit:
            unit.junit.unlink(missing_ok=True)
        begin = self.clock()
        command = [part.replace(SECONDS, f"{max(seconds - GRACE, 1):.0f}") for part in unit.command]
        code = run_for(command, seconds, log, self.root, {**os.environ, **unit.environment})
        lines = log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
        last = next((line for line in reversed(lines) if line.strip()), "")
        complete = not unit.announces or last.endswith(COMPLETE)
        tests = junit_summary(unit.junit) if unit.junit else None
        if code is None:  # a unit that had all the time it may take, and cannot use more, has failed
            status = "failed" if seconds >= unit.limit and not unit.resumes else "stopped"
        elif code in unit.ended:
            status = "done" if complete else "stopped"
        else:
            status = "failed"
        if tests is not None and status != "stopped":
            record.write(self.out / "units" / f"{unit.file}.json", {"environment": dict(self.environment), **tests})
        return {
            "status": status,
            "code": code,
            "seconds": round(self.clock() - begin, 1),
            "message": last.strip()[:300] if code is not None else f"its time was over: {last.strip()[:200]}",
            "tail": lines if status == "failed" else [],
            "incomplete": status == "failed" and unit.announces and not complete,
        }

    def note(self, unit: Unit, **ended: Any) -> None:
        """Write into the state how the unit ended, and print it."""
        key = f"{unit.name} {self.environment['source'][:12]} {slug(self.environment['device'])}"
        before = self.state["units"].get(key, {})
        self.state["units"][key] = {
            "unit": unit.name,
            "source": self.environment["source"],
            "device": self.environment["device"],
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "attempts": before.get("attempts", 0) + 1,
            **unit.facts,
            **ended,
        }
        record.write(self.out / "state.json", self.state)
        self.say(f"{unit.name}: {ended['status']} in {ended['seconds']:.0f} s: {ended['message']}")
        for line in ended["tail"]:
            print(f"    {line}", flush=True)

    def say(self, text: str) -> None:
        print(f"[{max(self.end - self.clock(), 0):4.0f} s left] {text}", flush=True)


def run_for(
    command: Sequence[str], seconds: float, log: Path, root: Path, environment: Mapping[str, str]
) -> int | None:
    """Run a command in `root` for at most `seconds`, its output in `log`. Returns its exit code, None if its time was over.

    All its processes are a group of their own, which is interrupted as by Ctrl-C when the time is over, and killed if that does not help.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=root,
            env=dict(environment),
            process_group=0,
            # a shell that runs this in the background has SIGINT ignored, which would be inherited
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


def _stop(process: subprocess.Popen) -> None:
    """End the process, and whatever is left of its group."""
    for number, patience in ((signal.SIGINT, 0.8 * GRACE), (signal.SIGTERM, 0.2 * GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number if process.poll() is None else signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            if number == signal.SIGKILL or not _alive(process.pid):
                return


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def junit_summary(path: Path) -> dict[str, Any] | None:
    """Counts of pytest's JUnit report, and what did not pass with the first line of its message; None without a whole report."""
    try:
        suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    except (FileNotFoundError, ElementTree.ParseError):
        return None
    count = {key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")}
    wrong = [
        {"test": case.get("name"), "message": (found.get("message") or "").partition("\n")[0][:300]}
        for suite in suites
        for case in suite.iter("testcase")
        for found in (*case.findall("failure"), *case.findall("error"))
    ]
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    seconds = round(sum(float(suite.get("time", 0)) for suite in suites), 1)
    return {"passed": passed, **count, "seconds": seconds, "wrong": wrong}


def slug(name: str) -> str:
    """A file name: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def read_state(out: Path, profile: str) -> dict[str, Any]:
    """The state below `out`, a new one where there is none. Raises ValueError if it is of another profile or format."""
    path = out / "state.json"
    if not path.exists():
        return {"format": FORMAT, "profile": profile, "units": {}}
    state = record.read(path, {"units": dict})
    if (state.get("format"), state.get("profile")) != (FORMAT, profile):
        raise ValueError(
            f"{path} is of profile {state.get('profile')}, format {state.get('format')}, not of {profile}, {FORMAT}; "
            "name another folder with out=, or start over with fresh=true"
        )
    return state


def forget(out: Path) -> None:
    """Remove what batteries left below `out`."""
    for path in (*(out / name for name in OURS), *out.glob("battery-*.tar.gz")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
