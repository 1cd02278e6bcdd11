"""The pages of results/: every table's Markdown and JSON, the overviews of all tables, README.md's newest GPU, report.html.

A page depends on records alone, so making it again changes nothing. The exception are tables that are computed in seconds (Kind.recorded
is false): their JSON is their record, and it stays as it is when the same numbers are computed again.

A table is stale where its page shows a number that no record of today's configuration confirms, because the configuration was changed
after the number was measured. Its page is left as it is until it is measured again.
"""

import json
from pathlib import Path
from typing import Any

from actpress.report import battery, html, markdown
from actpress.tables import headlines, kinds, plan, spec
from actpress.tables.kind import Folder, Found, Page, Project
from actpress.tables.result import Result
from actpress.tables.spec import Table
from actpress.train import files, record
from actpress.train.errors import Unreadable
from actpress.train.run import bad_input

SHAPE = dict.fromkeys(("table", "title", "kind", "measured"), str)  # what every table's JSON holds


def main(project: Project, check_only: bool = False) -> int:
    """Write all pages, or check them alone, and print what was found. Returns the exit code: 1 for a page that does not fit its records.

    Raises InputError for a table or record that is wrong.
    """
    with bad_input():
        if check_only:
            found = check(project)
        else:
            changed, found = write_all(project)
            print("\n".join(f"wrote {path.relative_to(project.root)}" for path in changed) or "nothing to write")
    print("\n".join(found) if found else "all pages fit the records")
    return 1 if found else 0


def check(project: Project) -> list[str]:
    """Pages that do not fit the records, a line each."""
    names = spec.names(project.tables)
    found = [fault for name in names for fault in faults(spec.load(project.tables, name), project)]
    extra = [path for path in sorted(project.results.pages.glob("*.*")) if path.stem not in (*names, "index")]
    found += [f"{path.stem}: {path.name} belongs to no table of configs/tables; delete it" for path in extra]
    for path, text in overviews(project).items():
        if not path.is_file() or path.read_text() != text:
            found.append(f"{path.relative_to(project.root)} is not what the tables and records give; make report")
    return found


def write_all(project: Project) -> tuple[list[Path], list[str]]:
    """Write every page that differs from what is there. Returns (files that changed, what is stale: a line for each row)."""
    changed, found = [], []
    for name in spec.names(project.tables):
        table = spec.load(project.tables, name)
        lines = stale(table, project)
        found += lines
        changed += [] if lines else write(from_records(table, project), project.results)
    return changed + write_overviews(project), found


def from_records(table: Table, project: Project) -> Result:
    """The table's result from existing records; nothing is measured."""
    found = {measurement: plan.find(measurement) for measurement in plan.measurements(table, project)}
    return kinds.get(table.kind).result(table, found)


def keep_same(found: Found) -> Found:
    """What was computed anew; as the page has it where all values are the same, so that date and commit stay those of the numbers."""
    old = {measurement: plan.find(measurement) for measurement in found}
    values = [[measured and measured.values for measured in one.values()] for one in (found, old)]
    return old if values[0] == values[1] else found


def write(result: Result, folder: Folder) -> list[Path]:
    """Write the table's Markdown and JSON where they differ from what is there. Returns the files that changed."""
    path = folder.pages / result.table.name
    data = kinds.get(result.table.kind).page(result)
    changed = []
    if not _has_data(path.with_suffix(".json"), data):
        record.write(path.with_suffix(".json"), data)
        changed.append(path.with_suffix(".json"))
    return changed + write_text(path.with_suffix(".md"), markdown.page(result))


def _has_data(path: Path, data: dict[str, Any]) -> bool:
    return path.is_file() and record.read(path) == json.loads(json.dumps(data), parse_constant=lambda word: None)


def write_text(path: Path, text: str) -> list[Path]:
    """Write a text file unless it holds that text. Returns the files that changed."""
    if path.is_file() and path.read_text() == text:
        return []
    files.write_text(path, text)
    return [path]


def write_overviews(project: Project) -> list[Path]:
    """Write the pages over all tables where they changed. Returns these. Raises Unreadable for a record that is gone or damaged."""
    return [path for page in overviews(project).items() for path in write_text(*page)]


def overviews(project: Project) -> dict[Path, str]:
    """Path -> text of the pages over all tables: made from the tables' pages and from the records that these name."""
    results = project.results
    default = [name for name in spec.names(project.tables) if spec.load(project.tables, name).default]
    parts = [path.read_text() for name in default if (path := results.pages / f"{name}.md").is_file()]
    shown = {path.stem: read(path) for path in sorted(results.pages.glob("*.json"))}
    pages = {results.pages / "index.md": "# Reproduced on one machine\n\n" + "\n".join(parts)}
    pages[results.root / "README.md"] = markdown.overview([*shown.values()], headlines.by_paper(shown.values()))
    for identity in (results.root / "battery").glob("*/identity.json"):
        pages[identity.parent.with_suffix(".md")] = battery.render(identity.parent)
    readme = project.root / "README.md"
    pages[readme] = battery.in_readme(readme.read_text(), results.root / "battery")
    return pages | {results.root / "report.html": html.page(project, shown)}


def read(path: Path) -> Page:
    """The JSON of a table. Raises Unreadable, a ValueError that names the file, for a damaged one."""
    page = record.read(path, SHAPE)
    if page["kind"] not in kinds.names():
        raise Unreadable(f"page {path} is of kind {page['kind']!r}, allowed: {', '.join(kinds.names())}")
    return record.read(path, SHAPE | kinds.get(page["kind"]).page_shape)


def faults(table: Table, project: Project) -> list[str]:
    """What is wrong with a table's page, a line each: rows without a record of today's configuration, files that do not fit."""
    path = project.results.pages / f"{table.name}.json"
    if not path.is_file():
        return [f"{table.name}: no page; make reproduce-table TABLE={table.name}"]
    if found := stale(table, project):
        return found
    result = from_records(table, project)
    text = path.with_suffix(".md")
    fits = {path: _has_data(path, kinds.get(table.kind).page(result))}
    fits[text] = text.is_file() and text.read_text() == markdown.page(result)
    return [
        f"{table.name}: {file.name} is not what the records give; make report"
        for file, same in fits.items()
        if not same
    ]


def stale(table: Table, project: Project) -> list[str]:
    """Numbers on a page that no record of today's configuration confirms, a line for each row. A table without a page has none."""
    kind, path = kinds.get(table.kind), project.results.pages / f"{table.name}.json"
    page = (
        record.read(path, dict(kind.page_shape)) if path.is_file() else {key: t() for key, t in kind.page_shape.items()}
    )
    measurements, found = plan.measurements(table, project), []
    for m in measurements:
        shown = kind.shown(m, page)
        computable = not kind.recorded and not m.row.requires
        if plan.find(m) is None and (shown is not None or computable):
            found.append(f"{table.name}: {m.name} is stale: {_words(shown)}, and today's configuration has no record")
    labels = [m.row.labels for m in measurements]
    extra = [row["labels"] for row in page.get("rows", []) if row["labels"] not in labels]
    return [*found, *(f"{table.name}: the page has a row {row} that {table.name}.yaml has not" for row in extra)]


def _words(shown: str | None) -> str:
    if shown is None:
        return "the page has no numbers of it"
    return f"the page shows {shown}" if shown else "the page shows numbers without a record"
