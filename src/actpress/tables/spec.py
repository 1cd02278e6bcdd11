"""A table as its YAML file in configs/tables describes it: metrics, rows, the numbers of the paper, tolerances.

`load` reads a file, checks it, and expands its rows over networks and the swept label. What a kind of table adds to the file (for
instance `measure` of kind `function`) is checked by the kind, see `actpress.tables.kinds`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from actpress.tables import kinds

UNITS = {"GiB": 2.0**30, "MiB": 2.0**20, "%": 1.0, "images/s": 1.0, "absolute": 1.0, "epochs": 1.0, "s": 1.0}
UNITS |= {"x": 1.0, "cosine": 1.0, "": 1.0}  # x: a ratio; "": words
FORMATS = {"GiB": ".3f", "MiB": ".1f", "%": ".2f", "images/s": ".0f", "absolute": ".2e", "epochs": ".1f", "s": ".0f"}
FORMATS |= {"x": ".2f", "cosine": ".4f", "": ""}
NEEDS = {  # what a machine may have or lack -> in words
    "gpu": "a GPU",
    "imagenet": "ImageNet",
    "cifar10": "CIFAR-10 as image files",
    "transformers": "transformers, the extra `text`",
}
VERSUS = ("ratio", "difference", "change")
# here: only records of this device and this commit count, and new ones go to outputs/. For tables that take seconds to measure anew.
REUSE = ("any", "here")
# Keys that a YAML file may have whatever its kind. A kind adds its own: Kind.settings.
KEYS = ("title", "source", "kind", "metrics", "rows", "common", "sweep", "networks", "baselines", "seeds")
KEYS += ("notes", "default", "reuse", "headlines")


@dataclass(frozen=True)
class Metric:
    """A metric, which is a column of measured numbers.

    tolerance: largest relative difference to the paper that counts as reproduced. versus_baseline: how a row is compared with each
    baseline row: "ratio" (baseline / row), "difference" (row - baseline) or "change" (row / baseline - 1). reduction_of: name of another
    metric; this one is then not measured but computed, the reduction of the other against the first baseline, in percent. reference: head
    of the paper's column where its numbers are not the paper's. at_most: a number counts as reproduced if it is not above the reference,
    whatever the tolerance; for errors.
    """

    label: str
    unit: str
    tolerance: float | None = None
    versus_baseline: str | None = None
    reduction_of: str | None = None
    reference: str = "paper"
    at_most: bool = False

    @property
    def title(self) -> str:
        """Label and unit; the label alone where the values are words."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: Any) -> str:
        """A number in the metric's unit, formatted. Words ("OOM") stay as they are; None is "not available"."""
        if value is None:
            return "not available"
        return value if isinstance(value, str) else f"{value:{FORMATS[self.unit]}}"

    def printed(self, value: Any) -> str:
        """A number of the paper, in the metric's unit, with the digits that the paper printed."""
        return self.text(value) if value is None or isinstance(value, str) else f"{value:g}"

    def show(self, value: Any) -> str:
        """A measured value (bytes, percent, images/s), converted to the metric's unit, with the unit."""
        return (
            f"{self.text(value / UNITS[self.unit])} {self.unit}"
            if isinstance(value, (int, float))
            else self.text(value)
        )


@dataclass(frozen=True)
class Row:
    """One row of a table.

    labels: head of a column -> text of the row's cell. overrides: Hydra overrides that make the row's config. paper: metric -> number in
    the metric's unit, or a word. requires: what measuring the row needs, names of NEEDS; other words ("method actnn") name what the
    project does not have, so that the row is never measured.
    """

    labels: dict[str, Any]
    overrides: tuple[str, ...]
    paper: dict[str, Any]
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table. baselines: labels; the row that has them, and otherwise the labels of another row, is that row's baseline."""

    name: str
    title: str
    source: str
    kind: str
    metrics: dict[str, Metric]
    rows: list[Row]
    baselines: list[dict[str, Any]]
    seeds: tuple[int, ...] = (0,)
    notes: tuple[str, ...] = ()
    default: bool = False  # measured by `make reproduce-table` without a name
    reuse: str = "any"  # one of REUSE
    headlines: tuple[dict[str, Any], ...] = ()  # claims of the paper, see actpress.tables.headlines
    settings: dict[str, Any] = field(default_factory=dict)  # what only this kind of table has


def names(folder: Path) -> list[str]:
    """Names of the tables in a folder of YAML files."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(folder: Path, name: str) -> Table:
    """Read <folder>/<name>.yaml. Raises ValueError that names what is wrong and what is allowed."""
    if name not in names(folder):  # nor a path to one
        raise ValueError(f"table {name!r} not found, allowed: {', '.join(names(folder))}")
    raw = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"), resolve=True)
    allowed(name, "kind", raw.get("kind"), kinds.names())
    kind = kinds.get(raw["kind"])
    for key in raw:
        allowed(name, "key", key, (*KEYS, *kind.settings))
    metrics = {key: Metric(**value) for key, value in raw["metrics"].items()}
    for metric in metrics.values():
        allowed(name, "unit", metric.unit, UNITS)
        allowed(name, "versus_baseline", metric.versus_baseline, (None, *VERSUS))
        allowed(name, "reduction_of", metric.reduction_of, (None, *metrics))
    allowed(name, "reuse", raw.get("reuse", "any"), REUSE)
    common, sweep = raw.get("common", []), raw.get("sweep", {})
    on_networks = [row for row in raw["rows"] for row in _on_networks(name, row, raw.get("networks", []))]
    return Table(
        name=name,
        title=raw["title"],
        source=raw["source"],
        kind=raw["kind"],
        metrics=metrics,
        rows=[expanded for row in on_networks for expanded in _expand(name, row, common, sweep, metrics)],
        baselines=raw.get("baselines", []),
        seeds=tuple(raw.get("seeds", (0,))),
        notes=tuple(raw.get("notes", ())),
        default=raw.get("default", False),
        reuse=raw.get("reuse", "any"),
        headlines=tuple(raw.get("headlines", ())),
        settings=kind.read_settings(name, {key: raw[key] for key in kind.settings if key in raw}),
    )


def _on_networks(name: str, row: Mapping, networks: list[Mapping]) -> list[Mapping]:
    """One row of the file -> one for each of the networks (name, overrides, requires) that it lists, by default for all of them."""
    if not networks:
        return [row]
    known = {network["name"]: network for network in networks}
    wanted = row.get("networks", list(known))
    for network in wanted:
        allowed(name, "network", network, known)
    return [
        {
            **row,
            "labels": {"network": network, **row["labels"]},
            "overrides": [*known[network]["overrides"], *row.get("overrides", ())],
            "requires": [*_listed(row.get("requires", ())), *_listed(known[network].get("requires", ()))],
        }
        for network in wanted
    ]


def _listed(words: str | Sequence[str]) -> Sequence[str]:
    return [words] if isinstance(words, str) else words


def _expand(name: str, row: Mapping, common: list[str], sweep: Mapping, metrics: Mapping[str, Metric]) -> list[Row]:
    """One row of the file -> one for each value of the (single) swept label; one row if it has that label itself."""
    paper = row.get("paper", {})
    for metric in paper:
        allowed(name, "paper metric", metric, metrics)
    overrides = (*common, *row.get("overrides", ()))
    requires = tuple(_listed(row.get("requires", ())))
    if not sweep or sweep.keys() <= row["labels"].keys():
        return [Row(row["labels"], overrides, paper, requires)]
    ((label, swept),) = sweep.items()
    for metric, numbers in paper.items():
        if len(numbers) != len(swept["values"]):
            raise ValueError(
                f"table {name}: {len(numbers)} paper numbers of {metric} for {len(swept['values'])} values of {label}"
            )
    return [
        Row(
            row["labels"] | {label: value},
            (*overrides, f"{swept['override']}={value}"),
            {metric: numbers[i] for metric, numbers in paper.items()},
            requires,
        )
        for i, value in enumerate(swept["values"])
    ]


def allowed(table: str, what: str, value: Any, choices) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"table {table}: {what} {value!r}, allowed: {', '.join(map(str, choices))}")


def needs(requires: tuple[str, ...]) -> str:
    """What a row requires, in words."""
    return " and ".join(NEEDS.get(need, need) for need in requires)
