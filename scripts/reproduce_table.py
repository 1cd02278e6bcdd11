"""Reproduce published tables: measured | paper | difference | verdict.

python scripts/reproduce_table.py                      the default tables: what this machine can do in minutes
python scripts/reproduce_table.py division_memory      tables by name (configs/tables/*.yaml)
python scripts/reproduce_table.py [NAME] dry=true      print what would be measured, and measure nothing
python scripts/reproduce_table.py division_accuracy data.source=folder data.root=DIR      overrides for every row
python scripts/reproduce_table.py digits_training publish=true                            into results/, whatever the table says

Memory tables are predicted with fake tensors, error tables computed. All other tables are made of records; rows that have none are
measured first, so an interrupted table goes on where it stopped. Each table is printed and written, as Markdown and JSON:
into results/tables, where the overviews (index.md, README.md, report.html) are made again with it; files change only if numbers do;
into outputs/reproduced, which git ignores, if the numbers belong to this machine alone (`reuse: here`) or overrides were given.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import table_pages
import table_rows
from actpress import tables
from actpress.train import command, config
from actpress.train.run import bad_input
from progress import Progress, clock
from table_rows import LOCAL, RESULTS, ROOT, Entry, Place, Row

TABLES = ROOT / "configs" / "tables"


def main(arguments: list[str]) -> None:
    with bad_input():
        names, overrides, switches = parse(arguments)
        wanted = [tables.load(TABLES, name) for name in names or tables.names(TABLES)]
        wanted = [with_overrides(table, overrides) for table in wanted if names or table.default]
        for table in wanted if overrides else []:
            check(table)
    places = [place_of(table, bool(overrides), switches["publish"]) for table in wanted]
    if switches["dry"]:
        print("\n".join(line for pair in zip(wanted, places, strict=True) for line in plan(*pair)))
        return
    reproduce(list(zip(wanted, places, strict=True)))


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


def with_overrides(table: tables.Table, overrides: list[str]) -> tables.Table:
    """The table with more overrides in every row."""
    cells = [replace(cell, overrides=(*cell.overrides, *overrides)) for cell in table.cells]
    return replace(table, cells=cells)


def check(table: tables.Table) -> None:
    """Raise ValueError where a row that can be measured here has a setting that no run can have; kind function checks its own."""
    for row in table_rows.rows_of(table) if table.kind != "function" else []:
        if not table_rows.lacking(row.cell):
            cfg = table_rows.compose(row.cell, row.seed)
            cfg.runtime.precision = str(cfg.runtime.precision).removesuffix("-true")  # which memory tables know too
            config.check(cfg)


def place_of(table: tables.Table, overridden: bool, publish: bool) -> Place:
    """Where the table's page and new records go."""
    return LOCAL if (table.reuse == "here" or overridden) and not publish else RESULTS


def plan(table: tables.Table, place: Place) -> list[str]:
    """What making the table would do, a line for each row."""
    kind, lines, counts, seconds = table_rows.KINDS[table.kind], [], {"to measure": 0, "recorded": 0, "not run": 0}, 0.0
    for row in table_rows.rows_of(table, place):
        if table_rows.reusable(row):
            what, words = "recorded", "a record is there"
        elif missing := table_rows.lacking(row.cell):
            what, words = "not run", f"not run here, needs {tables.needs(missing)}"
        else:
            took = kind.seconds(row)
            seconds += took or 0
            what, words = "to measure", kind.plan(row) + (f", {clock(took)} where it was recorded" if took else "")
        counts[what] += 1
        lines.append(f"  {row.name}: {words}  [{' '.join(row.cell.overrides)}]")
    total = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    known = f", {clock(seconds)} where they were recorded" if seconds else ""
    return [f"{table.name}: {table.title}", *lines, f"  rows: {total}{known}; to {place.pages.relative_to(ROOT)}"]


def reproduce(wanted: list[tuple[tables.Table, Place]]) -> None:
    """Make the tables one after the other, print each, and say what is being done, the time so far and what is left."""
    rows = [row for table, place in wanted for row in table_rows.rows_of(table, place)]
    print(f"{count(len(wanted), 'table')} of {count(len(rows), 'row')}: reading records", flush=True)
    entries = {row: table_rows.reusable(row) for row in rows}
    todo = [row for row in rows if entries[row] is None and not table_rows.lacking(row.cell)]
    progress = Progress(todo, lambda row: row.name, alike, lambda row: table_rows.KINDS[row.table.kind].seconds(row))
    found = sum(entry is not None for entry in entries.values())
    absent = len(rows) - found - len(todo)
    print(
        f"{count(len(todo), 'row')} to measure, {found} recorded already, {absent} need what this machine or this project lacks",
        flush=True,
    )
    changed = []
    for number, (table, place) in enumerate(wanted, 1):
        print(f"\n[{number}/{len(wanted)}] {table.name}: {table.title}", flush=True)
        own = {row: entry for row, entry in entries.items() if row.table is table}
        changed += make(table, place, own, progress)
    if any(path.is_relative_to(RESULTS.root) for path in changed):
        from report import write_overviews  # here, since drawing takes its time to import

        changed += write_overviews()
    print(f"\n{count(len(wanted), 'table')} done, {count(len(todo), 'row')} measured, in {clock(progress.elapsed)}")
    tracked = [str(path.relative_to(ROOT)) for path in changed if path.is_relative_to(RESULTS.root)]
    print(f"changed in results/: {', '.join(tracked)}" if tracked else "results/ is as it was")


def make(table: tables.Table, place: Place, entries: dict[Row, Entry | None], progress: Progress) -> list[Path]:
    """Measure what has no entry, print the table and write it. Returns the files that changed."""
    for row in entries:
        if row in progress.todo:
            with progress.item(row, prints=table_rows.KINDS[table.kind].recorded) as said:
                entries[row] = table_rows.measure(row)
                said.append(words(row, entries[row]))
    if not table_rows.KINDS[table.kind].recorded:
        entries = table_pages.keep_same(entries)
    page = table_pages.page_of(table, entries)
    print("\n" + page.text(shutil.get_terminal_size((140, 24)).columns) + "\n")
    changed = table_pages.write(page, place)
    where = (place.pages / table.name).relative_to(ROOT)
    print(f"{'written' if changed else 'as before'}: {where}.md (with notes) and {where}.json", flush=True)
    return changed


def alike(row: Row) -> tuple[str, ...]:
    """Rows of which this is equal take about as long; the first part counts most."""
    return (row.table.kind, row.table.name, str(row.cell.labels.get("network", "")), row.weights)


def words(row: Row, entry: Entry) -> str:
    """What was measured, in a few words: of a table with several metrics the first."""
    if row.table.kind == "fidelity":
        return f"cosine {entry.values['figures']['total']['cosine']:.4f}"
    name, metric = next(iter(row.table.metrics.items()))
    return f"{metric.label} {metric.show(entry.values.get(name))}"


def count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
