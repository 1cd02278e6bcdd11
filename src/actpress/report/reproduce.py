"""Reproduce tables: measure what has no record, print each table, write it, and make the pages over all tables again."""

import shutil
from pathlib import Path

from actpress.report import pages, terminal
from actpress.tables import kinds, plan, spec
from actpress.tables.kind import Folder, Found, Measured, Measurement, Project
from actpress.tables.progress import Progress, clock
from actpress.tables.spec import Table
from actpress.train.run import bad_input


def main(arguments: list[str], project: Project) -> None:
    """The command line of scripts/reproduce_table.py. Raises InputError for bad input."""
    with bad_input():
        names, overrides, switches = parse(arguments)
        wanted = [spec.load(project.tables, name) for name in names or spec.names(project.tables)]
        wanted = [plan.with_overrides(table, overrides) for table in wanted if names or table.default]
        for table in wanted if overrides else []:
            plan.check(table, project)
    folders = [plan.destination(table, project, bool(overrides), switches["publish"]) for table in wanted]
    tables = list(zip(wanted, folders, strict=True))
    if switches["dry"]:
        print("\n".join(line for table, folder in tables for line in plan.lines(table, project, folder)))
    else:
        reproduce(tables, project)


def parse(arguments: list[str]) -> tuple[list[str], list[str], dict[str, bool]]:
    """(table names, overrides, {dry, publish}) of the command line. Raises ValueError."""
    switches = {"dry": False, "publish": False}
    names, overrides = [], []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in switches and equals:
            if value not in ("true", "false"):
                raise ValueError(f"{argument}, allowed: {key}=true, {key}=false")
            switches[key] = value == "true"
        else:
            if argument in names:
                raise ValueError(f"table {argument!r} is given twice; give each once")
            (overrides if equals else names).append(argument)
    return names, overrides, switches


def reproduce(tables: list[tuple[Table, Folder]], project: Project) -> None:
    """Make the tables one after the other. Prints what is being done, the time so far and about how much is left."""
    of_table = {table.name: plan.measurements(table, project, folder) for table, folder in tables}
    everything = [measurement for measurements in of_table.values() for measurement in measurements]
    print(f"{_count(len(tables), 'table')} of {_count(len(everything), 'row')}: reading records", flush=True)
    found: dict[Measurement, Measured | None] = {m: plan.reusable(m) for m in everything}
    todo = [m for m in everything if found[m] is None and not plan.lacking(m.row)]
    progress = Progress(todo, lambda m: m.name, _alike, lambda m: kinds.get(m.table.kind).seconds(m))
    recorded = sum(measured is not None for measured in found.values())
    absent = len(everything) - recorded - len(todo)
    print(
        f"{_count(len(todo), 'row')} to measure, {recorded} recorded already, "
        f"{absent} need what this machine or this project lacks",
        flush=True,
    )
    changed = []
    for number, (table, folder) in enumerate(tables, 1):
        print(f"\n[{number}/{len(tables)}] {table.name}: {table.title}", flush=True)
        changed += _make(table, folder, {m: found[m] for m in of_table[table.name]}, progress, project)
    if any(path.is_relative_to(project.results.root) for path in changed):
        with bad_input():
            changed += pages.write_overviews(project)
    print(f"\n{_count(len(tables), 'table')} done, {_count(len(todo), 'row')} measured, in {clock(progress.elapsed)}")
    tracked = [str(path.relative_to(project.root)) for path in changed if path.is_relative_to(project.results.root)]
    print(f"changed in results/: {', '.join(tracked)}" if tracked else "results/ is as it was")


def _make(table: Table, folder: Folder, found: Found, progress: Progress, project: Project) -> list[Path]:
    """Measure what was not found, print the table and write it. Returns the files that changed."""
    kind, found = kinds.get(table.kind), dict(found)
    for measurement in found:
        if measurement in progress.todo:
            with progress.item(measurement, prints=kind.recorded) as outcome:
                found[measurement] = kind.measure(measurement)
                outcome.append(kind.outcome(measurement, found[measurement]))
    if not kind.recorded:
        found = pages.keep_same(found)
    result = kind.result(table, found)
    print("\n" + terminal.page(result, shutil.get_terminal_size((140, 24)).columns) + "\n")
    changed = pages.write(result, folder)
    where = (folder.pages / table.name).relative_to(project.root)
    print(f"{'written' if changed else 'as before'}: {where}.md (with notes) and {where}.json", flush=True)
    return changed


def _alike(measurement: Measurement) -> tuple[str, ...]:
    """Measurements with equal keys take about as long; those that share the first parts more or less."""
    table, row = measurement.table, measurement.row
    return (table.kind, table.name, str(row.labels.get("network", "")), measurement.weights)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
