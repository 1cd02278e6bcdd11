"""Tables as text for a terminal: the columns of the Markdown pages, as many side by side as the terminal has room for.

The columns of a metric (measured, paper, difference, verdict) stay together under its name. Metrics that do not fit beside the others
follow in further blocks, each of which repeats the labels of the rows.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from actpress.report import text
from actpress.tables import kinds
from actpress.tables.result import Result, RowResult, Section
from actpress.tables.spec import Metric, needs

WIDTH = 100, 140  # the narrowest and the widest layout; a narrower terminal wraps lines
GAP = "  "
HEAD = 12  # columns to which the names of columns and metrics may widen what stands below them


@dataclass
class Column:
    """cells: one text for each row."""

    head: str
    cells: list[str]
    left: bool = False

    @property
    def heads(self) -> list[str]:
        return textwrap.wrap(self.head, max(HEAD, *map(len, self.cells)), break_long_words=False) or [""]

    @property
    def width(self) -> int:
        return max(map(len, (*self.heads, *self.cells)))

    def align(self, cell: str) -> str:
        return cell.ljust(self.width) if self.left else cell.rjust(self.width)


@dataclass
class Group:
    """Columns that stay together, under a title."""

    title: str
    columns: list[Column]

    @property
    def titles(self) -> list[str]:
        return textwrap.wrap(self.title, max(HEAD, self._inner), break_long_words=False)

    @property
    def _inner(self) -> int:
        return sum(column.width for column in self.columns) + len(GAP) * (len(self.columns) - 1)

    @property
    def width(self) -> int:
        return max(self._inner, *map(len, self.titles or [""]))


def layout(labels: Group, groups: Sequence[Group], width: int) -> str:
    """The groups beside the labels, in as many blocks as the width takes; a group wider than that has a block of its own."""
    width = min(max(width, WIDTH[0]), WIDTH[1])
    blocks: list[list[Group]] = []
    for group in groups:
        taken = labels.width + sum(g.width + len(GAP) + 1 for g in (*(blocks[-1] if blocks else ()), group))
        if blocks and taken <= width:
            blocks[-1].append(group)
        else:
            blocks.append([group])
    first, *more = blocks
    return "\n\n".join([_block([labels, *first]), *(_block(_filled([labels, *block])) for block in more)])


def _filled(groups: Sequence[Group]) -> list[Group]:
    """The groups without the rows that hold no number beside their labels."""
    columns = [column for group in groups[1:] for column in group.columns]
    rows = [i for i in range(len(columns[0].cells)) if any(c.cells[i] not in ("", "not run") for c in columns)]
    kept = rows or range(len(columns[0].cells))
    return [Group(g.title, [Column(c.head, [c.cells[i] for i in kept], c.left) for c in g.columns]) for g in groups]


def _block(groups: Sequence[Group]) -> str:
    titles = max(len(group.titles) for group in groups)
    heads = max(len(column.heads) for group in groups for column in group.columns)
    lines = [[_nth(g.titles, i, titles).ljust(g.width) for g in groups] for i in range(titles)]
    lines += [_across(groups, lambda c, i=i: _nth(c.heads, i, heads)) for i in range(heads)]
    lines.append(["-" * group.width for group in groups])
    rows = len(groups[0].columns[0].cells)
    lines += [_across(groups, lambda c, i=i: c.cells[i]) for i in range(rows)]
    return "\n".join((GAP + " ").join(line).rstrip() for line in lines)


def wrapped(prose: str, width: int) -> list[str]:
    """Prose on lines of at most so many columns."""
    return textwrap.wrap(prose, min(max(width, WIDTH[0]), WIDTH[1]))


def _across(groups: Sequence[Group], cell: Callable[[Column], str]) -> list[str]:
    return [GAP.join(c.align(cell(c)) for c in g.columns).ljust(g.width) for g in groups]


def _nth(lines: Sequence[str], i: int, of: int) -> str:
    """Line i of `of` lines that end with `lines`."""
    i -= of - len(lines)
    return lines[i] if i >= 0 else ""


def page(result: Result, width: int) -> str:
    """A table as text for a terminal of so many columns."""
    lines = [result.table.title, f"Source: {result.table.source}.", ""]
    for section in result.sections:
        lines += _titled(result, section, width) if section.title else _rows(result, section.rows, width)
    return "\n".join([*lines, *wrapped(text.provenance(result), width)])


def _titled(result: Result, section: Section, width: int) -> list[str]:
    """A section with a title: its measured rows, the columns side by side without heads of their own."""
    if not section.measured:
        return [f"{section.title}: not run", ""]
    rows = section.measured
    columns = [
        Column(metric.title, [text.measured(metric, row.summaries[name], len(row.values)) for row in rows])
        for name, metric in result.columns.items()
    ]
    return [section.title, layout(_labels(rows), [Group("", columns)], width), ""]


def _rows(result: Result, rows: Sequence[RowResult], width: int) -> list[str]:
    """All rows, then the claims, then how many rows were not run and why."""
    groups = [_metric(result, name, metric) for name, metric in result.columns.items()]
    lines = [layout(_labels(rows), groups, width), ""]
    lines += [f"{c['paper']}: {c['claim']}\n  here {c['measured']}: {c['verdict']}" for c in result.claims]
    missing = Counter(needs(row.row.requires) for row in rows if not row.values)
    if missing:
        words = "; ".join(
            f"{count} {f'need {need}' if need else 'without a record'}" for need, count in missing.items()
        )
        lines.append(f"Rows not run: {sum(missing.values())} of {len(rows)} ({words}).")
    return lines


def _labels(rows: Sequence[RowResult]) -> Group:
    names = rows[0].row.labels
    return Group("", [Column(name, [str(row.row.labels[name]) for row in rows], left=True) for name in names])


def _metric(result: Result, name: str, metric: Metric) -> Group:
    rows = result.rows
    found = [row.summaries[name] for row in rows]
    title = f"{metric.title}{kinds.get(result.table.kind).suffix}"
    shown = [text.measured(metric, summary, len(row.values)) for summary, row in zip(found, rows, strict=True)]
    columns = [Column("measured", shown)]
    if text.has_paper(result, name):
        papers = [row.row.paper.get(name) for row in rows]
        columns.append(Column(metric.reference, ["" if p is None else metric.printed(p) for p in papers]))
        if metric.tolerance or metric.at_most:
            words = ("no worse", "worse") if metric.at_most else ("within", "outside")
            columns.append(Column("difference", [text.difference(summary) for summary in found]))
            verdicts = ["" if s.within is None else words[not s.within] for s in found]
            verdict = "verdict" if metric.at_most else f"verdict ({metric.tolerance:.1%})"
            columns.append(Column(verdict, verdicts, left=True))
    if metric.versus_baseline:
        for i, head in enumerate(text.versus_heads(result)):
            columns.append(Column(head, [text.versus(metric, s.versus[i], s.paired[i]) for s in found]))
    return Group(title, columns)
