"""Tables: what a paper printed beside what was measured here.

A table is a YAML file in configs/tables: rows, the Hydra overrides that make them, the paper's numbers, tolerances. `load` checks it
and expands it into cells; scripts/table_rows.py measures them, or reads their records; `render` writes Markdown, report.terminal the
same for a terminal. A number that was not measured reads "not run" and says what it needs; the paper's "OOM" is a value like any other.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from scipy import stats

KINDS = ("memory", "training", "fidelity", "error", "function")
UNITS = {"GiB": 2.0**30, "MiB": 2.0**20, "%": 1.0, "images/s": 1.0, "absolute": 1.0, "epochs": 1.0, "s": 1.0}
UNITS |= {"x": 1.0, "cosine": 1.0, "": 1.0}  # a ratio; a cosine; words
FORMATS = {"GiB": ".3f", "MiB": ".1f", "%": ".2f", "images/s": ".0f", "absolute": ".2e", "epochs": ".1f", "s": ".0f"}
FORMATS |= {"x": ".2f", "cosine": ".4f", "": ""}
NEEDS = {
    "gpu": "a GPU",
    "imagenet": "ImageNet",
    "cifar10": "CIFAR-10 as image files",
    "transformers": "transformers, the extra `text`",
}  # what a machine may have or lack
FIDELITY = {  # what a fidelity table sets, and what it is otherwise
    "batches": 2,  # training batches
    "examples": None,  # of each batch, the first so many; None: all
    "draws": 100,  # of a stochastic method's noise, per batch
    "weights": ["trained"],  # init, trained or both
    "pair": None,  # two methods of which to count who is closer in how many layers
}
VERSUS = ("ratio", "difference", "change")
# "here": of this device and this commit only, for tables so short that they are better measured anew; these go to outputs/, not results/.
REUSE = ("any", "here")


@dataclass(frozen=True)
class Metric:
    """A column. tolerance: relative difference to the paper that counts as reproduced. versus_baseline: how a cell is set against
    each baseline row: "ratio" (baseline / cell), "difference" (cell - baseline) or "change" (cell / baseline - 1).
    reduction_of: the metric of which this one is the reduction against the first baseline, in percent; it is not measured by itself.
    reference: what the "paper" column is called where its numbers are not the paper's. at_most: a number counts as reproduced when it
    is not above the reference, as errors do, whatever the tolerance."""

    label: str
    unit: str
    tolerance: float | None = None
    versus_baseline: str | None = None
    reduction_of: str | None = None
    reference: str = "paper"
    at_most: bool = False

    @property
    def title(self) -> str:
        """The head of its column: label, unit; of words the label alone."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: Any) -> str:
        """A value in the metric's unit; words ("OOM") as they are, None as "not available"."""
        if value is None:
            return "not available"
        return value if isinstance(value, str) else f"{value:{FORMATS[self.unit]}}"

    def printed(self, value: Any) -> str:
        """A number of the paper's, which is in the metric's unit and has the paper's own precision."""
        return self.text(value) if value is None or isinstance(value, str) else f"{value:g}"

    def show(self, value: Any) -> str:
        """A measured value (bytes, percent, images/s) with its unit."""
        return (
            f"{self.text(value / UNITS[self.unit])} {self.unit}"
            if isinstance(value, (int, float))
            else self.text(value)
        )


@dataclass(frozen=True)
class Cell:
    """One row of the rendered table. paper: metric -> number in the metric's unit, or a word. requires: what it takes to run it, names
    of NEEDS or words ("method actnn") for what is not there at all."""

    labels: dict[str, Any]
    overrides: tuple[str, ...]
    paper: dict[str, Any]
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    source: str
    kind: str
    metrics: dict[str, Metric]
    cells: list[Cell]
    baselines: list[dict[str, Any]]  # the labels that make a row the baseline of the rows with the same other labels
    seeds: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()
    default: bool = False  # part of what `make reproduce-table` does without a name
    reuse: str = "any"  # which records of finished runs may stand in it
    headlines: tuple[dict[str, Any], ...] = ()  # see actpress.report.headlines
    measure: str | None = None  # kind function: dotted name of the function that measures a row
    fidelity: dict[str, Any] = field(default_factory=dict)  # kind fidelity, see FIDELITY
    reach: float | None = (
        None  # kind training: the test accuracy, percent, of metrics epochs_to_reach and seconds_to_reach
    )


Values = list[dict[str, Any]]  # one {metric: value in bytes, percent or images/s, or a word} for each seed


def names(folder: Path) -> list[str]:
    """Names of the tables in a folder."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(folder: Path, name: str) -> Table:
    """Read and expand configs/tables/<name>.yaml. Raises ValueError naming what is wrong and what is allowed."""
    if name not in names(folder):  # nor a path to one
        raise ValueError(f"table {name!r} not found, allowed: {', '.join(names(folder))}")
    raw = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=True)
    _allowed(name, "kind", raw.get("kind"), KINDS)
    metrics = {key: Metric(**value) for key, value in raw["metrics"].items()}
    for metric in metrics.values():
        _allowed(name, "unit", metric.unit, UNITS)
        _allowed(name, "versus_baseline", metric.versus_baseline, (None, *VERSUS))
        _allowed(name, "reduction_of", metric.reduction_of, (None, *metrics))
    common, sweep = raw.get("common", []), raw.get("sweep", {})
    rows = [row for row in raw["rows"] for row in _on_networks(name, row, raw.get("networks", []))]
    cells = [cell for row in rows for cell in _expand(name, row, common, sweep, metrics)]
    for key in raw.get("fidelity", {}):
        _allowed(name, "fidelity setting", key, FIDELITY)
    _allowed(name, "reuse", raw.get("reuse", "any"), REUSE)
    if (raw["kind"] == "function") != ("measure" in raw):
        raise ValueError(
            f"table {name}: kind {raw['kind']!r} with measure {raw.get('measure')!r}; kind function, and no other, has one"
        )
    return Table(
        name=name,
        title=raw["title"],
        source=raw["source"],
        kind=raw["kind"],
        metrics=metrics,
        cells=cells,
        baselines=raw.get("baselines", []),
        seeds=tuple(raw.get("seeds", (0,))),
        notes=tuple(raw.get("notes", ())),
        default=raw.get("default", False),
        reuse=raw.get("reuse", "any"),
        headlines=tuple(raw.get("headlines", ())),
        fidelity=FIDELITY | raw.get("fidelity", {}),
        reach=raw.get("reach"),
        measure=raw.get("measure"),
    )


def _on_networks(name: str, row: Mapping, networks: list[Mapping]) -> list[Mapping]:
    """One row of the file -> one for each of the networks (name, overrides, requires) that it names, all of them by default."""
    if not networks:
        return [row]
    known = {network["name"]: network for network in networks}
    wanted = row.get("networks", list(known))
    for network in wanted:
        _allowed(name, "network", network, known)
    return [
        {
            **row,
            "labels": {"network": network, **row["labels"]},
            "overrides": [*known[network]["overrides"], *row.get("overrides", ())],
            "requires": [*_listed(row.get("requires", ())), *_listed(known[network].get("requires", ()))],
        }
        for network in wanted
    ]


def _listed(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _expand(name: str, row: Mapping, common: list[str], sweep: Mapping, metrics: Mapping[str, Metric]) -> list[Cell]:
    """One row of the file -> one cell for each value of the (single) swept label, or one if the row has that label itself."""
    paper = row.get("paper", {})
    for metric in paper:
        _allowed(name, "paper metric", metric, metrics)
    overrides = (*common, *row.get("overrides", ()))
    requires = tuple(_listed(row.get("requires", ())))
    if not sweep or sweep.keys() <= row["labels"].keys():
        return [Cell(row["labels"], overrides, paper, requires)]
    ((label, swept),) = sweep.items()
    for metric, numbers in paper.items():
        if len(numbers) != len(swept["values"]):
            raise ValueError(
                f"table {name}: {len(numbers)} paper numbers of {metric} for {len(swept['values'])} values of {label}"
            )
    return [
        Cell(
            row["labels"] | {label: value},
            (*overrides, f"{swept['override']}={value}"),
            {metric: numbers[i] for metric, numbers in paper.items()},
            requires,
        )
        for i, value in enumerate(swept["values"])
    ]


def _allowed(table: str, what: str, value: Any, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"table {table}: {what} {value!r}, allowed: {', '.join(map(str, allowed))}")


@dataclass
class Summary:
    """One metric of one cell: mean and deviation over the seeds that gave a number, in the metric's unit."""

    mean: float | str | None = None  # a word ("OOM", "diverged") if no seed gave a number
    deviation: float | None = None
    n: int = 0
    difference: float | None = None  # relative, to the paper
    within: bool | None = None
    versus: list[float | None] = field(default_factory=list)  # to each baseline, as the metric says
    paired: list[dict[str, float] | None] = field(default_factory=list)  # to each baseline, see `paired`


@dataclass
class Result:
    """A cell and what was measured for it."""

    cell: Cell
    values: Values = field(default_factory=list)
    summaries: dict[str, Summary] = field(default_factory=dict)


def summarise(table: Table, values: list[Values]) -> list[Result]:
    """values: for each cell of the table the measured dicts, one a seed; empty where nothing was run."""
    results = [Result(cell, measured) for cell, measured in zip(table.cells, values, strict=True)]
    _add_reductions(table, results)
    for result in results:
        for name, metric in table.metrics.items():
            result.summaries[name] = _summary(metric, [v.get(name) for v in result.values], result.cell.paper.get(name))
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


def paired(metric: str, result: "Result", base: "Result") -> dict[str, float] | None:
    """Differences to the baseline seed by seed: mean, sd, n and the p-value of a two-sided paired t-test; None with less than two seeds."""
    own, stock = ({v.get("seed"): v.get(metric) for v in r.values} for r in (result, base))
    pairs = [(own[seed], stock[seed]) for seed in own if seed is not None and seed in stock]
    gaps = [a - b for a, b in pairs if isinstance(a, int | float) and isinstance(b, int | float)]
    if len(gaps) < 2:
        return None
    deviation = statistics.stdev(gaps)
    p = float(stats.ttest_1samp(gaps, 0.0).pvalue) if deviation > 0 else float(statistics.fmean(gaps) == 0)
    return {"mean": statistics.fmean(gaps), "sd": deviation, "n": len(gaps), "p": p}


def _baseline(results: list[Result], result: Result, labels: Mapping[str, Any]) -> Result:
    """The row that differs from `result` in the baseline's labels; `result` itself if it is the baseline or has none."""
    return next((r for r in results if r.cell.labels == result.cell.labels | labels), result)


def _add_reductions(table: Table, results: list[Result]) -> None:
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
    if not isinstance(mean, float) or not isinstance(base, float) or metric.versus_baseline is None:
        return None
    return {"ratio": base / mean, "difference": mean - base, "change": mean / base - 1}[metric.versus_baseline]


def render(table: Table, results: list[Result], provenance: str) -> str:
    """The table as Markdown: for each metric measured | paper | difference | within tolerance, as far as it has them."""
    labels = list(table.cells[0].labels)
    columns = [(name, metric, any(name in r.cell.paper for r in results)) for name, metric in table.metrics.items()]
    head = list(labels)
    measured = "measured (fake tensors)" if table.kind == "memory" else "measured"
    for _, metric, has_paper in columns:
        head.append(f"{metric.title}: {measured}" if metric.unit else metric.title)
        head += [metric.reference] if has_paper else []
        if has_paper and (metric.tolerance or metric.at_most):
            head += ["difference", "no worse" if metric.at_most else f"within {metric.tolerance:.1%}"]
        baselines = table.baselines if metric.versus_baseline else []
        head += [f"vs {', '.join(map(str, labels.values()))}" for labels in baselines]
    lines = [f"## {table.title}", "", f"Source: {table.source}.", "", _row(head), _row(["---"] * len(head))]
    for result in results:
        row = [str(result.cell.labels[label]) for label in labels]
        for name, metric, has_paper in columns:
            summary = result.summaries[name]
            requires = result.cell.requires if name == columns[0][0] else ()
            row.append(_measured(metric, summary, requires, len(result.values)))
            if has_paper:
                row.append(metric.printed(result.cell.paper.get(name)))
            if has_paper and (metric.tolerance or metric.at_most):
                row += [signed(summary.difference), _verdict(summary.within)]
            if metric.versus_baseline:
                row += [versus_text(metric, *to) for to in zip(summary.versus, summary.paired, strict=True)]
        lines.append(_row(row))
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes), "", provenance, ""])


def time_to(history: list[Mapping[str, float]], reach: float) -> dict[str, float | str]:
    """Epochs, and seconds of training, until the test accuracy is `reach` percent for the first time; "not reached" otherwise."""
    seconds = 0.0
    for row in history:
        seconds += row["train_seconds"]
        if row["test_accuracy"] >= reach:
            return {"epochs_to_reach": row["epoch"], "seconds_to_reach": seconds}
    return {"epochs_to_reach": "not reached", "seconds_to_reach": "not reached"}


def needs(requires: tuple[str, ...]) -> str:
    """What a cell takes, in words."""
    return " and ".join(NEEDS.get(need, need) for need in requires)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _measured(metric: Metric, summary: Summary, requires: tuple[str, ...], runs: int) -> str:
    needed = f" (needs {needs(requires)})" if summary.mean is None and requires else ""
    return measured_text(metric, summary, runs) + needed


def measured_text(metric: Metric, summary: Summary, runs: int) -> str:
    """Mean ± standard deviation (n) of a metric, "not run" without a value. runs: how many seeds were run."""
    if summary.mean is None:
        return "not run"
    text = metric.text(summary.mean)
    if summary.deviation is not None:
        text += f" ± {metric.text(summary.deviation)}"
    if 0 < summary.n < runs:
        return f"{text} (n={summary.n} of {runs})"
    return f"{text} (n={summary.n})" if summary.n > 1 else text


def signed(difference: float | None) -> str:
    return "" if difference is None else f"{difference:+.1%}"


def _verdict(within: bool | None) -> str:
    return {None: "", True: "yes", False: "**no**"}[within]


def versus_text(metric: Metric, versus: float | None, pairs: Mapping[str, float] | None) -> str:
    if versus is None:
        return ""
    if pairs is not None:
        sd = f"{pairs['sd']:{FORMATS[metric.unit]}}"
        return f"{pairs['mean']:+{FORMATS[metric.unit]}} ± {sd} (paired, n={pairs['n']}, p={pairs['p']:.2g})"
    number = {"ratio": "{:.2f}x", "difference": f"{{:+{FORMATS[metric.unit]}}}", "change": "{:+.1%}"}
    return number[metric.versus_baseline].format(versus)


def as_json(table: Table, results: list[Result], environment: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the Markdown shows and the raw values behind it."""
    return {
        "table": table.name,
        "title": table.title,
        "source": table.source,
        "kind": table.kind,
        "measured": f"{sum(bool(result.values) for result in results)} of {len(results)}",
        "units": {name: metric.unit for name, metric in table.metrics.items()},
        "rows": [
            {
                "labels": result.cell.labels,
                "overrides": list(result.cell.overrides),
                "requires": list(result.cell.requires),
                "paper": result.cell.paper,
                "values": result.values,
                "summary": {name: vars(summary) for name, summary in result.summaries.items()},
            }
            for result in results
        ],
        "environment": dict(environment),
    }
