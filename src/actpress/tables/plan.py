"""What making a table takes: which measurements have a record, which are to be made, and which cannot be made on this machine."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from actpress.tables import kinds
from actpress.tables.kind import Folder, Measured, Measurement, Project, compose
from actpress.tables.progress import clock
from actpress.tables.spec import NEEDS, Row, Table, needs
from actpress.train import config, provenance


def measurements(table: Table, project: Project, folder: Folder | None = None) -> list[Measurement]:
    """All measurements of a table, in the order of its page. folder: of new records, by default the project's results."""
    return kinds.get(table.kind).measurements(table, project, folder or project.results)


def find(measurement: Measurement) -> Measured | None:
    """The values from the measurement's record, made on whatever machine; None without one."""
    return kinds.get(measurement.table.kind).find(measurement) if can_exist(measurement.row) else None


def reusable(measurement: Measurement) -> Measured | None:
    """The values if measuring is superfluous; for a table with `reuse: here` their record must be of this device and this commit."""
    if not kinds.get(measurement.table.kind).recorded or (found := find(measurement)) is None:
        return None
    if measurement.table.reuse == "any":
        return found
    here = provenance.environment(config.device(measurement.config.runtime.device))
    same = all(here[key] == found.environment[key] for key in ("device", "torch", "commit", "dirty"))
    return found if same and not here["dirty"] else None


def can_exist(row: Row) -> bool:
    """False for a row of a method that the project does not have: no machine can measure it."""
    return all(need in NEEDS for need in row.requires)


def lacking(row: Row) -> tuple[str, ...]:
    """What the row requires and this machine does not have."""
    return tuple(need for need in row.requires if not _here(need, row))


def _here(need: str, row: Row) -> bool:
    if need == "gpu":
        return torch.cuda.is_available()
    if need in ("imagenet", "cifar10"):
        root, tests = Path(compose(row, seed=0).data.root), {"imagenet": ("val", "validation"), "cifar10": ("test",)}
        return (root / "train").is_dir() and any((root / name).is_dir() for name in tests[need])
    if need == "transformers":
        return find_spec(need) is not None
    return False


def with_overrides(table: Table, overrides: list[str]) -> Table:
    """The table with more overrides in every row."""
    return replace(table, rows=[replace(row, overrides=(*row.overrides, *overrides)) for row in table.rows])


def check(table: Table, project: Project) -> None:
    """Raise ValueError where a row that can be measured here has a setting that no training run can have."""
    for measurement in measurements(table, project) if kinds.get(table.kind).composes else []:
        if not lacking(measurement.row):
            cfg = measurement.config
            cfg.runtime.precision = str(cfg.runtime.precision).removesuffix("-true")  # which memory tables know too
            config.check(cfg)


def destination(table: Table, project: Project, overridden: bool, publish: bool) -> Folder:
    """Where the table's page and new records go."""
    return project.local if (table.reuse == "here" or overridden) and not publish else project.results


def lines(table: Table, project: Project, folder: Folder) -> list[str]:
    """What making the table would do, a line for each measurement."""
    kind, found, counts, seconds = kinds.get(table.kind), [], {"to measure": 0, "recorded": 0, "not run": 0}, 0.0
    for measurement in measurements(table, project, folder):
        if reusable(measurement):
            what, words = "recorded", "a record is there"
        elif missing := lacking(measurement.row):
            what, words = "not run", f"not run here, needs {needs(missing)}"
        else:
            took = kind.seconds(measurement)
            seconds += took or 0
            what = "to measure"
            words = kind.cost(measurement) + (f", {clock(took)} where it was recorded" if took else "")
        counts[what] += 1
        found.append(f"  {measurement.name}: {words}  [{' '.join(measurement.row.overrides)}]")
    total = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    known = f", {clock(seconds)} where they were recorded" if seconds else ""
    place = folder.pages.relative_to(project.root)
    return [f"{table.name}: {table.title}", *found, f"  rows: {total}{known}; to {place}"]
