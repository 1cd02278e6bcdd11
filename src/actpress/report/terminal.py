"""Tables as text for a terminal: the columns of the Markdown pages, as wide as the terminal allows.

A metric's columns (measured, paper, difference, verdict) stay together under its name. Metrics stand side by side while the terminal has
room for them; the rest follow in further blocks, each of which repeats the labels of the rows.
"""

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actpress import tables
from actpress.tables import fidelity as gradients

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

    def align(self, text: str) -> str:
        return text.ljust(self.width) if self.left else text.rjust(self.width)


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


def wrapped(text: str, width: int) -> list[str]:
    """Prose on lines of at most so many columns."""
    return textwrap.wrap(text, min(max(width, WIDTH[0]), WIDTH[1]))


def _across(groups: Sequence[Group], text: Any) -> list[str]:
    return [GAP.join(c.align(text(c)) for c in g.columns).ljust(g.width) for g in groups]


def _nth(lines: Sequence[str], i: int, of: int) -> str:
    """Line i of `of` lines that end with `lines`."""
    i -= of - len(lines)
    return lines[i] if i >= 0 else ""


def table(
    table: tables.Table,
    results: Sequence[tables.Result],
    claims: Sequence[Mapping[str, str]],
    provenance: str,
    width: int,
) -> str:
    """A table as text. claims: what actpress.report.headlines made of it."""
    names = list(table.cells[0].labels)
    labels = Group("", [Column(name, [str(r.cell.labels[name]) for r in results], left=True) for name in names])
    groups = [_metric(table, name, metric, results) for name, metric in table.metrics.items()]
    lines = [table.title, f"Source: {table.source}.", "", layout(labels, groups, width), ""]
    lines += [f"{told['paper']}: {told['claim']}\n  here {told['measured']}: {told['verdict']}" for told in claims]
    missing = Counter(tables.needs(r.cell.requires) for r in results if not r.values)
    if missing:
        words = "; ".join(
            f"{count} {f'need {need}' if need else 'without a record'}" for need, count in missing.items()
        )
        lines.append(f"Rows not run: {sum(missing.values())} of {len(results)} ({words}).")
    return "\n".join([*lines, *wrapped(provenance, width)])


def _metric(table: tables.Table, name: str, metric: tables.Metric, results: Sequence[tables.Result]) -> Group:
    found = [result.summaries[name] for result in results]
    title = f"{metric.title}{' (fake tensors)' if table.kind == 'memory' else ''}"
    shown = [tables.measured_text(metric, s, len(r.values)) for s, r in zip(found, results, strict=True)]
    columns = [Column("measured", shown)]
    if any(name in result.cell.paper for result in results):
        papers = [result.cell.paper.get(name) for result in results]
        columns.append(Column(metric.reference, ["" if p is None else metric.printed(p) for p in papers]))
        if metric.tolerance or metric.at_most:
            words = ("no worse", "worse") if metric.at_most else ("within", "outside")
            columns.append(Column("difference", [tables.signed(summary.difference) for summary in found]))
            verdicts = ["" if s.within is None else words[not s.within] for s in found]
            verdict = "verdict" if metric.at_most else f"verdict ({metric.tolerance:.1%})"
            columns.append(Column(verdict, verdicts, left=True))
    if metric.versus_baseline:
        for i, base in enumerate(table.baselines):
            texts = [tables.versus_text(metric, s.versus[i], s.paired[i]) for s in found]
            columns.append(Column(f"vs {', '.join(map(str, base.values()))}", texts))
    return Group(title, columns)


def fidelity(
    table: tables.Table, measured: Mapping[str, Mapping[str, Mapping[str, Any]]], provenance: str, width: int
) -> str:
    """A table of gradients as text, its summaries. measured: "network weights" -> method -> record."""
    lines = [table.title, f"Source: {table.source}.", ""]
    for where, found in measured.items():
        if not found:
            lines += [f"{where} weights: not run", ""]
            continue
        cells = [gradients.cells(e["figures"], e["layers"], e["saved_share"]) for e in found.values()]
        labels = Group("", [Column("method", list(found), left=True)])
        columns = [
            Column(head, list(column)) for head, column in zip(gradients.HEAD, zip(*cells, strict=True), strict=True)
        ]
        lines += [f"{where} weights", layout(labels, [Group("", columns)], width), ""]
    return "\n".join([*lines, *wrapped(provenance, width)])
