"""Markdown: the page of a table, results/tables/<name>.md, and the overview of all tables, results/README.md."""

from collections.abc import Iterator, Sequence
from typing import Any

from actpress.report import text
from actpress.tables import kinds
from actpress.tables.result import Result, RowResult, Section
from actpress.tables.spec import needs

VERDICTS = {None: "", True: "yes", False: "**no**"}


def page(result: Result) -> str:
    """The page of a table: for each metric measured | paper | difference | within tolerance, as far as the table has them."""
    table = result.table
    lines = [f"## {table.title}", "", f"Source: {table.source}.", ""]
    for section in result.sections:
        lines += _titled(result, section) if section.title else [*_rows(result, section.rows), ""]
    return "\n".join([*lines, *(f"- {note}" for note in table.notes), "", text.provenance(result), ""])


def _titled(result: Result, section: Section) -> Iterator[str]:
    """A section with a title: what is missing, the rows that were measured, details."""
    yield from (f"### {section.title}", "")
    missing = [row.row for row in section.rows if not row.values]
    if missing:
        needed = needs(tuple(dict.fromkeys(need for row in missing for need in row.requires)))
        which = ": " + "; ".join(", ".join(map(str, row.labels.values())) for row in missing)
        yield from (f"not run{which if section.measured else ''}{f' (needs {needed})' if needed else ''}", "")
    if section.measured:
        yield from (*_rows(result, section.measured), "")
    if details := section.details:
        yield from (f"<details><summary>{details.title}</summary>", "", *grid(details.head, details.rows))
        yield from (*(["", details.remark] if details.remark else []), "", "</details>", "")


def _rows(result: Result, rows: Sequence[RowResult]) -> list[str]:
    """Rows of results as lines of Markdown, under their head."""
    suffix, head = kinds.get(result.table.kind).suffix, list(rows[0].row.labels)
    for name, metric in result.columns.items():
        head.append(f"{metric.title}: measured{suffix}" if metric.unit else metric.title)
        head += [metric.reference] if text.has_paper(result, name) else []
        if text.has_paper(result, name) and (metric.tolerance or metric.at_most):
            head += ["difference", "no worse" if metric.at_most else f"within {metric.tolerance:.1%}"]
        head += text.versus_heads(result) if metric.versus_baseline else []
    return grid(head, [_cells(result, row) for row in rows])


def _cells(result: Result, row: RowResult) -> list[str]:
    cells = [str(label) for label in row.row.labels.values()]
    for name, metric in result.columns.items():
        summary = row.summaries[name]
        missing = summary.mean is None and row.row.requires and name == next(iter(result.columns))
        needed = f" (needs {needs(row.row.requires)})" if missing else ""
        cells.append(text.measured(metric, summary, len(row.values)) + needed)
        if text.has_paper(result, name):
            cells.append(metric.printed(row.row.paper.get(name)))
            if metric.tolerance or metric.at_most:
                cells += [text.difference(summary), VERDICTS[summary.within]]
        if metric.versus_baseline:
            cells += [text.versus(metric, *to) for to in zip(summary.versus, summary.paired, strict=True)]
    return cells


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def overview(pages: Sequence[dict[str, Any]], claims: Sequence[tuple[dict[str, str], dict[str, Any]]]) -> str:
    """results/README.md: the claims of papers, each with the page that it is on, then a line for each table. pages: JSON of the tables."""
    links = [f"[{page['table']}](tables/{page['table']}.md)" for _, page in claims]
    rows = [
        [claim["paper"], claim["claim"], claim["measured"], claim["verdict"], link]
        for (claim, _), link in zip(claims, links, strict=True)
    ]
    tables = [[f"[{page['table']}](tables/{page['table']}.md)", page["title"], page["measured"]] for page in pages]
    return "\n".join(
        [
            "# Results",
            "",
            "Made by `make reproduce-table` and `make tables` from what is in this folder; nothing is typed.",
            "",
            *grid(["paper", "claim", "measured here", "verdict", "table"], rows),
            "",
            *grid(["table", "what", "rows measured"], tables),
            "",
            "The records of training runs are in [runs](runs); dated notes, negative results too, in [LOG.md](LOG.md).",
            "",
        ]
    )
