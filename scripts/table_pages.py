"""Pages of tables: each table's Markdown and JSON from what its rows gave, the index pages, and whether they fit the records.

A page is a function of its records alone, so making it again changes nothing. The exceptions are tables that are computed in seconds
(memory, error), whose JSON is their record: it stays as it is when the same numbers are computed again.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import table_rows
from actpress import tables
from actpress.report import headlines, terminal
from actpress.tables import fidelity
from actpress.train import files, record
from table_rows import Entry, Place, Row

Entries = Mapping[Row, Entry | None]  # None: not run
SAME = (
    1e-4  # relative; float32 sums differ by 1e-6 between processors and numbers of threads, and pages show three digits
)


@dataclass(frozen=True)
class Page:
    """markdown and data are written; results and gradients are what a terminal shows."""

    table: tables.Table
    markdown: str
    data: dict[str, Any]
    provenance: str
    results: list[tables.Result]
    gradients: dict[str, dict[str, dict[str, Any]]]  # kind fidelity: "network weights" -> method -> record

    def text(self, width: int) -> str:
        """The page for a terminal of so many columns."""
        if self.table.kind == "fidelity":
            return terminal.fidelity(self.table, self.gradients, self.provenance, width)
        return terminal.table(self.table, self.results, self.data["headlines"], self.provenance, width)


def page_of(table: tables.Table, entries: Entries) -> Page:
    """The page of a table. entries: in the order of table_rows.rows_of."""
    provenance = _provenance(table, [entry.environment for entry in entries.values() if entry is not None])
    if table.kind == "fidelity":
        return _page_of_gradients(table, entries, provenance)
    measured = [
        [dict(entry.values) for row, entry in entries.items() if row.cell is cell and entry is not None]
        for cell in table.cells
    ]
    results = tables.summarise(table, measured)
    first = next((entry.environment for entry in entries.values() if entry is not None), {})
    data = tables.as_json(table, results, first) | {"headlines": headlines.fill(table.headlines, results)}
    return Page(table, tables.render(table, results, provenance), data, provenance, results, {})


def _page_of_gradients(table: tables.Table, entries: Entries, provenance: str) -> Page:
    groups: dict[tuple[str, str], dict[Row, Entry | None]] = {}
    for row, entry in entries.items():
        groups.setdefault((row.cell.labels.get("network", ""), row.weights), {})[row] = entry
    body, measured = [], {}
    for (network, weights), group in groups.items():
        found = {name_of(row.cell): entry.values for row, entry in group.items() if entry is not None}
        measured[f"{network} {weights}".strip()] = found
        body += [f"### {', '.join(filter(None, (network, f'{weights} weights')))}", ""]
        missing = [row for row, entry in group.items() if entry is None]
        if missing:
            needs = tables.needs(tuple(dict.fromkeys(need for row in missing for need in row.cell.requires)))
            which = ": " + "; ".join(name_of(row.cell) for row in missing) if found else ""
            body += [f"not run{which}{f' (needs {needs})' if needs else ''}", ""]
        if found:
            body += _gradient_tables(table, found)
    head = [f"## {table.title}", "", f"Source: {table.source}.", ""]
    text = "\n".join([*head, *body, *(f"- {note}" for note in table.notes), "", provenance, ""])
    count = sum(entry is not None for entry in entries.values())
    data = {"table": table.name, "title": table.title, "kind": table.kind, "measured": f"{count} of {len(entries)}"}
    ids = {where: {method: values["id"] for method, values in found.items()} for where, found in measured.items()}
    return Page(table, text, data | {"gradients": ids}, provenance, [], measured)


def _gradient_tables(table: tables.Table, found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown of the methods on one network: the summary, then layer by layer."""
    figures = {method: values["figures"] for method, values in found.items()}
    layers = next(iter(found.values()))["layers"]
    pair = tuple(table.fidelity["pair"]) if table.fidelity["pair"] else None
    shares = {method: values["saved_share"] for method, values in found.items()}
    lines = [fidelity.summary(figures, layers, shares), "", "<details><summary>layer by layer</summary>", ""]
    return [*lines, fidelity.render(figures, layers, pair), "", "</details>", ""]


def name_of(cell: tables.Cell) -> str:
    """What a line of a fidelity table is called."""
    return ", ".join(str(value) for label, value in cell.labels.items() if label != "network")


def _provenance(table: tables.Table, environments: list[dict[str, Any]]) -> str:
    """One line: how the numbers came about, where, with which versions."""
    seeds = f"Measured, seeds {', '.join(map(str, table.seeds))}"
    how = {"memory": "Predicted with fake tensors", "error": "Computed"}.get(table.kind, seeds)
    places = sorted(
        {
            f"{e['device']} ({e['device_type']}), torch {e['torch']}, Python {e['python']}, "
            f"commit {(e['commit'] or 'unknown')[:10]}{' with changes' if e['dirty'] else ''}"
            for e in environments
        }
    )
    return f"{how}: {'; '.join(places)}." if places else "Nothing was run."


def from_records(table: tables.Table, place: Place) -> Page:
    """The page that the existing records give; nothing is measured."""
    return page_of(table, {row: table_rows.stored(row) for row in table_rows.rows_of(table, place)})


def keep_same(entries: dict[Row, Entry | None]) -> dict[Row, Entry | None]:
    """Entries computed anew; as the page has them where all of them are the same, so that date and commit stay those of the numbers."""
    old = {row: table_rows.stored(row) for row in entries}
    values = [[entry and entry.values for entry in found.values()] for found in (entries, old)]
    return old if values[0] == values[1] else entries


def write(page: Page, place: Place) -> list[Path]:
    """Write a page's Markdown and JSON where they differ from what is there. Returns the files that changed."""
    path = place.pages / page.table.name
    return [
        *_write_data(path.with_suffix(".json"), page.data),
        *write_text(path.with_suffix(".md"), page.markdown),
    ]


def _write_data(path: Path, data: dict[str, Any]) -> list[Path]:
    if _has_data(path, data):
        return []
    record.write(path, data)
    return [path]


def _has_data(path: Path, data: dict[str, Any]) -> bool:
    return path.is_file() and record.read(path) == json.loads(json.dumps(data), parse_constant=lambda word: None)


def write_text(path: Path, text: str) -> list[Path]:
    """Write a text file unless it holds that text. Returns the files that changed."""
    if path.is_file() and path.read_text() == text:
        return []
    with files.atomic_write(path) as file:
        file.write(text.encode())
    return [path]


def indexes(configs: Path, place: Place) -> dict[Path, str]:
    """The text of the pages over all tables, from the tables' pages: results/README.md and the default tables on one page."""
    default = [name for name in tables.names(configs) if tables.load(configs, name).default]
    pages = [place.pages / f"{name}.md" for name in default]
    text = "# Reproduced on one machine\n\n" + "\n".join(page.read_text() for page in pages if page.is_file())
    return {place.pages / "index.md": text, place.root / "README.md": headlines.index(place.pages)}


def faults(table: tables.Table, place: Place) -> list[str]:
    """What is wrong with a table's page, a line each: rows that have no record under today's configuration, files that do not fit."""
    path = place.pages / f"{table.name}.json"
    if not path.is_file():
        return [f"{table.name}: no page; make reproduce-table TABLE={table.name}"]
    if found := stale(table, place):
        return found
    page = from_records(table, place)
    texts = {path: _has_data(path, page.data)}
    markdown = path.with_suffix(".md")
    texts[markdown] = markdown.is_file() and markdown.read_text() == page.markdown
    return [
        f"{table.name}: {path.name} is not what the records give; make report"
        for path, fits in texts.items()
        if not fits
    ]


def stale(table: tables.Table, place: Place) -> list[str]:
    """Numbers on a page that no record of today's configuration bears out, a line for each row. A table without a page has none."""
    path = place.pages / f"{table.name}.json"
    shape = {"gradients": dict} if table.kind == "fidelity" else {"rows": list}
    data = record.read(path, shape) if path.is_file() else {"rows": [], "gradients": {}}
    found = []
    computed = not table_rows.KINDS[table.kind].recorded
    for row in table_rows.rows_of(table, place):
        shown, entry = _shown(row, data), table_rows.stored(row)
        if entry is None and (shown is not None or (computed and not row.cell.requires)):
            found.append(f"{table.name}: {row.name} is stale: {_words(shown)}, and today's configuration has no record")
    labels = [row.cell.labels for row in table_rows.rows_of(table, place)]
    extra = [r["labels"] for r in data.get("rows", []) if r["labels"] not in labels]
    return [*found, *(f"{table.name}: the page has a row {row} that {table.name}.yaml has not" for row in extra)]


def _shown(row: Row, data: dict[str, Any]) -> str | None:
    """The name of the record of a row's number on the page, "" where the page names none, None where it has no number."""
    if row.table.kind == "fidelity":
        where = f"{row.cell.labels.get('network', '')} {row.weights}".strip()
        return data["gradients"].get(where, {}).get(name_of(row.cell))
    values = [value for r in data["rows"] if r["labels"] == row.cell.labels for value in r["values"]]
    own = [value for value in values if value.get("seed", row.seed) == row.seed]
    return own[0].get("run_id", own[0].get("record", "")) if own else None


def _words(shown: str | None) -> str:
    if shown is None:
        return "the page has no numbers of it"
    return f"the page shows {shown}" if shown else "the page shows numbers without a record"
