"""results/report.html: one page of all tables, kernels and findings that needs no other file and no network.

It shows what the JSON pages of the tables hold, and links each number to its record. Numbers that were measured, predicted with fake
tensors, taken from a paper, or not run have different colours.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt
from markupsafe import Markup

from actpress.report import plots, text
from actpress.tables import headlines, kinds, spec
from actpress.tables.kind import Page, Project
from actpress.tables.result import Result, RowResult, Section, Summary
from actpress.tables.spec import Metric

TEMPLATE = Path(__file__).with_name("report.html.j2")


def page(project: Project, pages: Mapping[str, Page]) -> str:
    """The page, the same for the same results. pages: JSON of the tables by name.

    Raises Unreadable, a ValueError, where a record that a page names is gone or damaged.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    claims = headlines.by_paper(pages.values())
    return environment.from_string(TEMPLATE.read_text()).render(
        claims=[(claim, shown["table"], kinds.get(shown["kind"]).origin) for claim, shown in claims],
        sections=[_table(project, name, shown) for name, shown in pages.items()],
        kernels=[_csv(path) for path in sorted((project.results.root / "kernels").glob("*.csv"))],
        log=Markup(MarkdownIt().enable("table").render((project.results.root / "LOG.md").read_text())),
    )


def _table(project: Project, name: str, shown: Page) -> dict[str, Any]:
    """What the template shows of one table."""
    table = spec.load(project.tables, name)
    result = kinds.get(table.kind).from_page(table, shown, project.results)
    part = {"name": name, "title": shown["title"], "source": table.source, "notes": table.notes}
    part |= {"measured": result.measured, "provenance": _provenance(result.environments)}
    if any(section.title for section in result.sections):
        head = [metric.title for metric in result.columns.values()]
        sections = [_section(result, section) for section in result.sections if section.measured]
        return part | {"figures": [], "head": head, "sections": sections}
    draw = plots.OF_TABLES.get(table.kind)
    figures = list(draw(result, project.results)) if draw else []
    return part | {"figures": figures, "head": _head(result), "rows": [_row(result, row) for row in result.rows]}


def _section(result: Result, section: Section) -> dict[str, Any]:
    """A section with a title: its figure, its rows with a link to the record of each."""
    rows = [
        {
            "method": ", ".join(map(str, row.row.labels.values())),
            "cells": [text.mean_and_spread(metric, row.summaries[name]) for name, metric in result.columns.items()],
            "link": row.records[0],
        }
        for row in section.measured
    ]
    draw = plots.OF_SECTIONS.get(result.table.kind)
    return {"name": section.name, "rows": rows, "figure": draw(section) if draw else ""}


def _provenance(environments: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where numbers come from, each place once."""
    return sorted(
        {
            f"{e['device']} ({e['device_type']}), torch {e['torch']}, {text.commit(e)}, {e['date'][:10]}"
            for e in environments
        }
    )


def _head(result: Result) -> list[str]:
    """Names of the columns."""
    names = list(result.table.rows[0].labels)
    for name, metric in result.columns.items():
        names.append(metric.title)
        names += [metric.reference, "difference"] if text.has_paper(result, name) else []
        names += text.versus_heads(result) if metric.versus_baseline else []
    return names


def _row(result: Result, row: RowResult) -> list[dict[str, Any]]:
    """Cells of one row: text, the class that says what kind of number it is, links to records."""
    origin = kinds.get(result.table.kind).origin
    cells = [{"text": str(label), "kind": "label"} for label in row.row.labels.values()]
    for name, metric in result.columns.items():
        summary = row.summaries[name]
        cells.append(_measured(metric, summary, row, origin))
        if text.has_paper(result, name):
            paper = row.row.paper.get(name)
            cells.append({"text": metric.printed(paper), "kind": "absent" if paper is None else "paper"})
            verdict = {True: "within", False: "outside", None: ""}[summary.within]
            cells.append({"text": text.difference(summary), "kind": verdict})
        if metric.versus_baseline:
            compared = zip(summary.versus, summary.paired, strict=True)
            cells += [{"text": text.versus(metric, *to), "kind": origin} for to in compared]
    return cells


def _measured(metric: Metric, summary: Summary, row: RowResult, origin: str) -> dict[str, Any]:
    if summary.mean is None:
        missing = f" (needs {spec.needs(row.row.requires)})" if row.row.requires else ""
        return {"text": f"not run{missing}", "kind": "not-run"}
    n = summary.n if summary.n in (0, len(row.values)) else f"{summary.n} of {len(row.values)}"
    return {"text": text.mean_and_spread(metric, summary), "n": n, "kind": origin, "links": row.records}


def _csv(path: Path) -> dict[str, Any]:
    """A CSV file of results/kernels: times on a device, or what compiling ahead of time says."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = _largest(rows) if path.stem == "aot" else rows
    return {"name": path.name, "head": list(rows[0]) if rows else [], "rows": [list(r.values()) for r in rows]}


def _largest(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One line for each kernel: what its default configuration takes on sm_90, the largest over dtypes."""
    cases = defaultdict(list)
    for row in rows:
        if row["config"].startswith("default") and row["arch"] == "sm_90":
            cases[row["case"], row["kernel"]].append(row)
    columns = ("registers", "spill_bytes", "dynamic_shared_bytes")
    return [
        {"case": case, "kernel": kernel} | {column: max(int(row[column]) for row in group) for column in columns}
        for (case, kernel), group in cases.items()
    ]
