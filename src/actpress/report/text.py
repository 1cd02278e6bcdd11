"""Numbers of a table as text, as Markdown, HTML and the terminal show them."""

from collections.abc import Mapping
from typing import Any

from actpress.tables import kinds
from actpress.tables.result import Result, Summary
from actpress.tables.spec import FORMATS, Metric


def mean_and_spread(metric: Metric, summary: Summary) -> str:
    """Mean ± standard deviation; "not run" without a value."""
    if summary.mean is None:
        return "not run"
    spread = "" if summary.deviation is None else f" ± {metric.text(summary.deviation)}"
    return f"{metric.text(summary.mean)}{spread}"


def measured(metric: Metric, summary: Summary, seeds: int) -> str:
    """Mean ± standard deviation (n), "not run" without a value. seeds: number of seeds that were run."""
    text = mean_and_spread(metric, summary)
    if 0 < summary.n < seeds:
        return f"{text} (n={summary.n} of {seeds})"
    return f"{text} (n={summary.n})" if summary.n > 1 else text


def difference(summary: Summary) -> str:
    """The relative difference to the paper, with its sign."""
    return "" if summary.difference is None else f"{summary.difference:+.1%}"


def versus(metric: Metric, value: float | None, pairs: Mapping[str, float] | None) -> str:
    """A comparison with a baseline; pairs: the paired one, which is shown instead if there is one."""
    if value is None:
        return ""
    if pairs is not None:
        sd = f"{pairs['sd']:{FORMATS[metric.unit]}}"
        return f"{pairs['mean']:+{FORMATS[metric.unit]}} ± {sd} (paired, n={pairs['n']}, p={pairs['p']:.2g})"
    formats = {"ratio": "{:.2f}x", "difference": f"{{:+{FORMATS[metric.unit]}}}", "change": "{:+.1%}"}
    return formats[metric.versus_baseline].format(value)


def versus_heads(result: Result) -> list[str]:
    """Heads of the columns that compare with baselines."""
    return [f"vs {', '.join(map(str, labels.values()))}" for labels in result.table.baselines]


def has_paper(result: Result, metric: str) -> bool:
    """Whether the paper gives a number of this metric for any row."""
    return any(metric in row.row.paper for row in result.rows)


def provenance(result: Result) -> str:
    """One line: how the numbers were made, where, with which versions."""
    places = sorted(
        {
            f"{e['device']} ({e['device_type']}), torch {e['torch']}, Python {e['python']}, {commit(e)}"
            for e in result.environments
        }
    )
    how = kinds.get(result.table.kind).how or f"Measured, seeds {', '.join(map(str, result.table.seeds))}"
    return f"{how}: {'; '.join(places)}." if places else "Nothing was run."


def commit(environment: Mapping[str, Any]) -> str:
    """The commit of an environment, and whether files differed from it."""
    return f"commit {(environment['commit'] or 'unknown')[:10]}{' with changes' if environment['dirty'] else ''}"
