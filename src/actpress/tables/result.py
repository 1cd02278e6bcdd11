"""The result of a table: what every page of it, in Markdown, HTML or a terminal, is rendered from.

Result -> sections -> rows -> one Summary for each metric: mean and spread over seeds, difference to the paper, comparison with the
baseline rows. A kind of table makes a Result from its measurements or reads it from the table's JSON page, see actpress.tables.kind.
"""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from scipy import stats

from actpress.tables.spec import UNITS, Metric, Row, Table

Values = list[dict[str, Any]]  # one {metric: value in bytes, percent or images/s, or a word} for each seed


@dataclass
class Summary:
    """One metric of one row: mean and standard deviation over the seeds that gave a number, in the metric's unit."""

    mean: float | str | None = None  # a word ("OOM", "diverged") if no seed gave a number; None if nothing was measured
    deviation: float | None = None
    n: int = 0
    difference: float | None = None  # relative, to the paper
    within: bool | None = None  # the metric's tolerance
    versus: list[float | None] = field(default_factory=list)  # one for each baseline, as Metric.versus_baseline says
    paired: list[dict[str, float] | None] = field(default_factory=list)  # one for each baseline, see `paired`


@dataclass
class RowResult:
    """A row, the values that were measured for it (none if it was not run) and their summaries by metric."""

    row: Row
    values: Values = field(default_factory=list)
    summaries: dict[str, Summary] = field(default_factory=dict)

    @property
    def records(self) -> list[str]:
        """Files of the records behind the values, relative to the folder of results."""
        files = (value.get("record") or ("run_id" in value and f"runs/{value['run_id']}.json") for value in self.values)
        return [file for file in files if file]


@dataclass
class Details:
    """A smaller table that a page shows on demand, and a remark below it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    remark: str = ""


@dataclass
class Section:
    """Rows that stand together. A table of one section has no title; sections with a title show only rows that were measured."""

    name: str
    title: str
    rows: list[RowResult]
    details: Details | None = None

    @property
    def measured(self) -> list[RowResult]:
        return [row for row in self.rows if row.values]


@dataclass
class Result:
    """columns: the metrics of the rows' summaries. environments: where the numbers were measured, see train.provenance.environment.
    claims: claims of the paper beside what was measured, see actpress.tables.headlines. measured: "3 of 4" rows."""

    table: Table
    columns: dict[str, Metric]
    sections: list[Section]
    environments: list[dict[str, Any]]
    claims: list[dict[str, str]]
    measured: str

    @property
    def rows(self) -> list[RowResult]:
        return [row for section in self.sections for row in section.rows]


def summarise(table: Table, rows: list[Row], values: list[Values]) -> list[RowResult]:
    """Summaries of the rows. values: for each row the measured dicts, one for each seed; an empty list where nothing was run."""
    results = [RowResult(row, measured) for row, measured in zip(rows, values, strict=True)]
    _add_reductions(table, results)
    for result in results:
        for name, metric in table.metrics.items():
            result.summaries[name] = _summary(metric, [v.get(name) for v in result.values], result.row.paper.get(name))
    for result in results:
        for labels in table.baselines:
            base = _baseline(results, result, labels)
            for name, metric in table.metrics.items():
                versus = (
                    None if base is result else _versus(metric, result.summaries[name].mean, base.summaries[name].mean)
                )
                result.summaries[name].versus.append(versus)
                pairs = None if base is result or metric.versus_baseline != "difference" else paired(name, result, base)
                result.summaries[name].paired.append(pairs)
    return results


def paired(metric: str, result: RowResult, base: RowResult) -> dict[str, float] | None:
    """Differences to the baseline seed by seed: mean, sd, n and the p-value of a two-sided paired t-test; None with less than two seeds."""
    own, stock = ({v.get("seed"): v.get(metric) for v in r.values} for r in (result, base))
    pairs = [(own[seed], stock[seed]) for seed in own if seed is not None and seed in stock]
    gaps = [a - b for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
    if len(gaps) < 2:
        return None
    deviation = statistics.stdev(gaps)
    p = float(stats.ttest_1samp(gaps, 0.0).pvalue) if deviation > 0 else float(statistics.fmean(gaps) == 0)
    return {"mean": statistics.fmean(gaps), "sd": deviation, "n": len(gaps), "p": p}


def _baseline(results: list[RowResult], result: RowResult, labels: Mapping[str, Any]) -> RowResult:
    """The row that differs from `result` in the baseline's labels; `result` itself if it is the baseline or has none."""
    return next((r for r in results if r.row.labels == result.row.labels | labels), result)


def _add_reductions(table: Table, results: list[RowResult]) -> None:
    """Fill in, seed by seed, the metrics that are reductions of others."""
    derived = {name: metric.reduction_of for name, metric in table.metrics.items() if metric.reduction_of}
    for result in results if table.baselines else ():
        base = _baseline(results, result, table.baselines[0])
        for (own, stock), (name, of) in product(zip(result.values, base.values, strict=False), derived.items()):
            if all(isinstance(values.get(of), int | float) for values in (own, stock)):
                own[name] = 100 * (1 - own[of] / stock[of])


def _summary(metric: Metric, values: list[Any], paper: Any) -> Summary:
    numbers = [value / UNITS[metric.unit] for value in values if isinstance(value, (int, float))]
    if not numbers:
        words = [value for value in values if isinstance(value, str)]
        return Summary(words[0] if words else None)
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    summary = Summary(statistics.fmean(numbers), deviation, len(numbers))
    if isinstance(paper, (int, float)):
        summary.difference = summary.mean / paper - 1
        if metric.at_most:
            summary.within = summary.mean <= paper
        elif metric.tolerance is not None:
            summary.within = abs(summary.difference) <= metric.tolerance
    return summary


def _versus(metric: Metric, mean: Any, base: Any) -> float | None:
    """A mean compared with the baseline's; None where one of them is no number, or the divisor is zero (offloading saves 0 bytes)."""
    if not isinstance(mean, float) or not isinstance(base, float):
        return None
    match metric.versus_baseline:
        case "ratio":
            return base / mean if mean else None
        case "difference":
            return mean - base
        case "change":
            return mean / base - 1 if base else None
    return None
