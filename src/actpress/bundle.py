"""The archive of a battery: packed where it ran, taken apart where results are kept.

`pack` puts all but checkpoints and images into one .tar.gz. `read` takes it apart in memory: only plain files under the names that `pack`
gives, nothing is unpacked to disk. `merge` adds them to results/:

runs/<run_id>.json                    records of training runs
kernels/<device>.csv                  times of kernels
battery/<device>/<stage>.json, .csv   tests, memory, throughput, largest; units.json: how each unit ended

Nothing is overwritten in silence. What is there already is left alone, what grew (a later archive of the same battery) is taken,
anything else is a conflict. Where the machine had no git, the commit is found by the id of the source. Paths of the machine are cut to
their last part.
"""

import csv
import io
import json
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from actpress import battery, record, source

LARGEST = 16 * 2**20  # bytes of an archive
MOST = 256 * 2**20  # bytes of what is in it
TAILS = (65536, 4096, 0)  # bytes of each log, fewer if the archive gets too large
MEMBERS = re.compile(
    r"(?:state|environment)\.json|(?:units|runs)/[\w.+-]+\.json|kernels/[\w.+-]+\.(?:csv|md|png)|logs/[\w.+-]+\.log"
)
STAGES = ("tests", "memory", "throughput", "largest")
KERNEL_KEY = ("case", "dtype", "what", "config")
PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+([\w.+@-]+)")


def pack(out: Path, device: str) -> Path:
    """Write out/battery-<device>.tar.gz, at once. Raises ValueError if it is larger than LARGEST even without logs."""
    path = out / f"battery-{battery.slug(device)}.tar.gz"
    for tail in TAILS:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            for file in sorted(out.rglob("*")):
                name = file.relative_to(out).as_posix()
                if file.is_file() and MEMBERS.fullmatch(name):
                    content = file.read_bytes()
                    content = content[max(len(content) - tail, 0) :] if name.startswith("logs/") else content
                    member = tarfile.TarInfo(name)
                    member.size, member.mtime = len(content), int(file.stat().st_mtime)
                    archive.addfile(member, io.BytesIO(content))
        if packed.tell() <= LARGEST:
            with record.replacing(path) as file:
                file.write(packed.getvalue())
            return path
    raise ValueError(f"{path} would have {packed.tell()} bytes, allowed: up to {LARGEST}")


def read(path: Path) -> dict[str, bytes]:
    """Name -> content of an archive's members. Raises ValueError for anything that `pack` does not write."""
    members: dict[str, bytes] = {}
    size = 0
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                size += member.size
                if not member.isreg() or not MEMBERS.fullmatch(member.name) or member.name in members:
                    raise ValueError(f"{path} holds {member.name!r}, which no battery packs; nothing was imported")
                if size > MOST:
                    raise ValueError(f"{path} unpacks to more than {MOST} bytes; nothing was imported")
                members[member.name] = archive.extractfile(member).read()
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read as a battery's archive ({error})") from error
    if "state.json" not in members or "environment.json" not in members:
        raise ValueError(f"{path} has no state.json or no environment.json: not a battery's archive")
    return members


def restore(path: Path, out: Path) -> None:
    """Lay an archive out below `out`, so that a battery goes on from it elsewhere. Checkpoints are not in it."""
    for name, content in read(path).items():
        with record.replacing(out / name) as file:
            file.write(content)


class Merge:
    """What importing would write, gathered before anything is written. conflicts: a line each."""

    def __init__(self, results: Path, root: Path, replace: bool):
        self.results, self.root, self.replace = results, root, replace
        self.files: dict[Path, bytes] = {}  # to write
        self.conflicts: list[str] = []
        self._commits: dict[str, str | None] = {}

    def commit(self, name: str | None) -> str | None:
        """The commit with this source id, if it is known."""
        if name and name not in self._commits:
            self._commits[name] = source.commit_of(name, self.root)
        return self._commits.get(name)

    def located(self, environment: Mapping[str, Any], name: str | None) -> dict[str, Any]:
        """An environment with its commit, where the machine could not tell it."""
        if environment.get("commit") or not (found := self.commit(name)):
            return dict(environment)
        return {**environment, "commit": found, "dirty": False}

    def put(self, path: Path, content: Any) -> None:
        """Plan to write JSON, unless the file says so already."""
        text = json.dumps(content, indent=1) + "\n"
        if not path.exists() or path.read_text() != text:
            self.files[path] = text.encode()

    def conflict(self, path: Path, what: str) -> None:
        self.conflicts.append(f"{path.relative_to(self.results)}: {what} differs from what is there")

    def write(self) -> None:
        for path, content in self.files.items():
            with record.replacing(path) as file:
                file.write(content)


def merge(members: Mapping[str, bytes], results: Path, root: Path, replace: bool = False) -> Merge:
    """Plan the import. Raises ValueError for a member that is not what its name says; see Merge.conflicts for the rest."""
    state, environment = (_json(members, f"{name}.json") for name in ("state", "environment"))
    if state.get("format") != battery.FORMAT or not isinstance(environment.get("device"), str):
        raise ValueError(f"state.json is of format {state.get('format')}, allowed: {battery.FORMAT}")
    plan = Merge(results, root, replace)
    for name in sorted(members):
        folder, _, file = name.partition("/")
        if folder == "runs":
            _merge_run(plan, file, _json(members, name), state)
        elif folder == "kernels" and file.endswith(".csv"):
            _merge_kernels(plan, file, members[name].decode(), state)
    place = results / "battery" / place_of(environment["device"], state["profile"])
    for stage in STAGES:
        found = {
            Path(name).stem: _located(plan, _json(members, name))
            for name in sorted(members)
            if name.startswith(f"units/{stage}-")
        }
        _merge_stage(plan, place / f"{stage}.json", found)
    _merge_units(plan, place / "units.json", state)
    return plan


def place_of(device: str, profile: str) -> str:
    """The name of a device's folder."""
    return battery.slug(device if profile == "full" else f"{device} {profile}")


def _json(members: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(members[name])
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON ({error}); nothing was imported") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must hold a JSON object; nothing was imported")
    return content


def _merge_run(plan: Merge, file: str, incoming: dict[str, Any], state: Mapping[str, Any]) -> None:
    """A record whose name, run_id and configuration belong together."""
    run_id = file.removesuffix(".json")
    try:
        named = record.run_id(OmegaConf.create(incoming["config"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"runs/{file} has no configuration of a run ({error!r}); nothing was imported") from error
    if not run_id == incoming.get("run_id") == named:
        raise ValueError(f"runs/{file} is the record of {named}, not of {run_id}; nothing was imported")
    units = [entry for entry in state["units"].values() if entry.get("run_id") == run_id]
    latest = max(units, key=lambda entry: entry["date"], default={})
    incoming["environment"] = plan.located(incoming["environment"], latest.get("source"))
    path = plan.results / "runs" / file
    if path.exists() and not extends(record.read(path), incoming) and not plan.replace:
        plan.conflict(path, "the record")
    else:
        plan.put(path, incoming)


def _merge_kernels(plan: Merge, file: str, text: str, state: Mapping[str, Any]) -> None:
    """Rows that are not there yet are added, at the end."""
    path = plan.results / "kernels" / file
    incoming = list(csv.DictReader(io.StringIO(text)))
    sources = {entry["source"] for entry in state["units"].values() if entry["unit"].startswith("kernels/")}
    commit = plan.commit(sources.pop()) if len(sources) == 1 else None
    for row in incoming:
        row["commit"] = row.get("commit") or (commit or "")[:12]
    rows = {_kernel(row): row for row in csv.DictReader(io.StringIO(path.read_text()))} if path.exists() else {}
    for row in incoming:
        there = rows.get(_kernel(row), row)
        if {**there, "commit": row["commit"]} != row and not plan.replace:
            plan.conflict(path, " ".join(_kernel(row)).strip())
        rows[_kernel(row)] = row
    if incoming:
        written = io.StringIO()
        writer = csv.DictWriter(written, list(incoming[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows.values())
        if not path.exists() or path.read_text() != written.getvalue():
            plan.files[path] = written.getvalue().encode()


def _kernel(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[key] for key in KERNEL_KEY)


def _located(plan: Merge, unit: dict[str, Any]) -> dict[str, Any]:
    """A unit's file with commits, without paths of the machine."""
    for part in (unit, *unit.get("sessions", ())):
        if "environment" in part:
            part["environment"] = plan.located(part["environment"], part["environment"].get("source"))
    return without_paths(unit)


def _merge_stage(plan: Merge, path: Path, incoming: dict[str, Any]) -> None:
    there = record.read(path) if path.exists() else {}
    for name, unit in incoming.items():
        if name in there and not extends(there[name], unit) and not plan.replace:
            plan.conflict(path, name)
    if incoming:
        plan.put(path, dict(sorted({**there, **incoming}.items())))


def _merge_units(plan: Merge, path: Path, state: Mapping[str, Any]) -> None:
    """How units ended, the later word wins: one that was stopped is done in a later archive."""
    units = record.read(path) if path.exists() else {}
    for entry in sorted(state["units"].values(), key=lambda entry: entry["date"]):
        before = units.get(entry["unit"])
        if before is None or before["date"] <= entry["date"]:
            kept = {key: value for key, value in entry.items() if key not in ("unit", "tail", "incomplete")}
            units[entry["unit"]] = without_paths({**kept, "commit": plan.commit(entry["source"])})
    plan.put(path, units)


def extends(old: Any, new: Any) -> bool:
    """Whether `new` says all that `old` says: the same values, perhaps more keys, longer lists, or a value where there was none."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and extends(value, new[key]) for key, value in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) <= len(new) and all(extends(a, b) for a, b in zip(old, new, strict=False))
    return old is None or old == new


def without_paths(value: Any) -> Any:
    """Texts with absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return PATH.sub(r"\1", value) if isinstance(value, str) else value
