"""A kind of table: how one row is measured, where its record lies, and what the table's result and its JSON page hold.

Measurement: one row of a table for one seed, which is what is measured at once. Measured: what it gave. Kind: the interface; its defaults
suit a table whose columns are its metrics, so that a new kind defines `find`, `measure` and `cost` alone.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from omegaconf import DictConfig

from actpress.tables import headlines
from actpress.tables.result import Result, RowResult, Section, summarise
from actpress.tables.spec import Metric, Row, Table
from actpress.train import cli, record

CHECKOUT = Path(__file__).resolve().parents[3]
CONFIGS = CHECKOUT / "configs"
Page = dict[str, Any]  # a table's JSON


class Folder(NamedTuple):
    """A folder of results: pages of tables (tables/) and the records that they are made from (runs/, fidelity/, <table>/)."""

    root: Path

    @property
    def pages(self) -> Path:
        return self.root / "tables"


@dataclass(frozen=True)
class Project:
    """The folders of a checkout."""

    root: Path = CHECKOUT

    @property
    def tables(self) -> Path:
        """YAML files of tables."""
        return self.root / "configs" / "tables"

    @property
    def results(self) -> Folder:
        """Tracked by git."""
        return Folder(self.root / "results")

    @property
    def local(self) -> Folder:
        """Results of this machine alone, ignored by git."""
        return Folder(self.root / "outputs" / "reproduced")


@dataclass(frozen=True, eq=False)  # hashed by identity: rows hold dictionaries
class Measurement:
    """One row of a table for one seed; in a fidelity table at initial or at trained weights. folder: where its record is written."""

    table: Table
    row: Row
    seed: int
    project: Project
    folder: Folder
    weights: str = ""

    @property
    def name(self) -> str:
        words = [*map(str, self.row.labels.values()), *([f"{self.weights} weights"] if self.weights else [])]
        return ", ".join([*words, *([f"seed {self.seed}"] if len(self.table.seeds) > 1 and not self.weights else [])])

    @property
    def config(self) -> DictConfig:
        """The training config of the row, with this seed."""
        return compose(self.row, self.seed)

    def read(self, file: str, shape: dict[str, Any]) -> dict[str, Any] | None:
        """The record `file` below `folder`, else below the project's results unless the table wants records of this machine only.

        None if there is none. shape: see record.read.
        """
        folders = (self.folder,) if self.table.reuse == "here" else (self.folder, self.project.results)
        paths = [folder.root / file for folder in folders]
        return next((record.read(path, shape) for path in paths if path.is_file()), None)


class Measured(NamedTuple):
    """values: metric -> bytes, percent, images/s or a word; also `seed`, and `run_id` or `record` where a record holds them.
    environment: where they were measured, see provenance.environment."""

    values: dict[str, Any]
    environment: dict[str, Any]


Found = Mapping[Measurement, Measured | None]  # in the order of the page; None: not measured


def compose(row: Row, seed: int) -> DictConfig:
    """The training config of a row."""
    cfg = copy.deepcopy(_compose(row.overrides))
    cfg.seed = seed
    return cfg


@cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    return cli.compose(list(overrides), CONFIGS)


class Kind:
    """A kind of table. A subclass defines `find`, `measure` and `cost`, and overrides what else is different."""

    settings: ClassVar[Mapping[str, Any]] = {}  # keys that only this kind has in a table's YAML -> defaults
    recorded = (
        True  # a measurement with a record is not repeated; False: measuring takes a second, and the page is the record
    )
    origin = "measured"  # or "predicted", which HTML shows in another colour
    suffix = ""  # of "measured" in a column's head
    how: str | None = None  # the beginning of the provenance line; None: "Measured, seeds ..."
    composes = True  # a row's overrides are those of a training config
    page_shape: ClassVar[Mapping[str, type]] = {
        "rows": list,
        "environment": dict,
    }  # what the JSON page must hold, see record.read

    def find(self, measurement: Measurement) -> Measured | None:
        """The values from the measurement's record, None without one."""
        raise NotImplementedError

    def measure(self, measurement: Measurement) -> Measured:
        """Measure, and write the record."""
        raise NotImplementedError

    def cost(self, measurement: Measurement) -> str:
        """What measuring takes, in words: "to train, 5 epochs: <run id>"."""
        raise NotImplementedError

    def seconds(self, measurement: Measurement) -> float | None:
        """How long measuring took where it was recorded; None if unknown."""
        return None

    def outcome(self, measurement: Measurement, measured: Measured) -> str:
        """What was measured, in a few words: the first metric."""
        name, metric = next(iter(measurement.table.metrics.items()))
        return f"{metric.label} {metric.show(measured.values.get(name))}"

    def read_settings(self, table: str, given: dict[str, Any]) -> dict[str, Any]:
        """Settings of a table from what its YAML gives of them. Raises ValueError for a wrong one."""
        return {**self.settings, **given}

    def measurements(self, table: Table, project: Project, folder: Folder) -> list[Measurement]:
        """All measurements of a table, in the order of its page."""
        return [Measurement(table, row, seed, project, folder) for row in table.rows for seed in table.seeds]

    def columns(self, table: Table) -> dict[str, Metric]:
        """Columns of measured numbers: name -> Metric."""
        return table.metrics

    def sections(self, table: Table, found: Found) -> list[Section]:
        """The table's rows with what was found for them."""
        values = [
            [dict(measured.values) for m, measured in found.items() if m.row is row and measured is not None]
            for row in table.rows
        ]
        return [Section("", "", summarise(table, table.rows, values))]

    def result(self, table: Table, found: Found) -> Result:
        """The table's result. found: in the order of `measurements`."""
        sections = self.sections(table, found)
        rows = [row for section in sections for row in section.rows]
        environments = [measured.environment for measured in found.values() if measured is not None]
        claims = headlines.fill(table.headlines, rows)
        return Result(table, self.columns(table), sections, environments, claims, _count(rows))

    def page(self, result: Result) -> Page:
        """The table's JSON: everything that Markdown shows, and the values behind it."""
        table = result.table
        return {
            "table": table.name,
            "title": table.title,
            "source": table.source,
            "kind": table.kind,
            "measured": result.measured,
            "units": {name: metric.unit for name, metric in table.metrics.items()},
            "rows": [
                {
                    "labels": row.row.labels,
                    "overrides": list(row.row.overrides),
                    "requires": list(row.row.requires),
                    "paper": row.row.paper,
                    "values": row.values,
                    "summary": {name: vars(summary) for name, summary in row.summaries.items()},
                }
                for row in result.rows
            ],
            "environment": dict(next(iter(result.environments), {})),
            "headlines": result.claims,
        }

    def from_page(self, table: Table, page: Page, folder: Folder) -> Result:
        """The result that a JSON page in `folder` holds, whatever the records say now; its environment is that of the first number."""
        rows = [Row(r["labels"], tuple(r["overrides"]), r["paper"], tuple(r["requires"])) for r in page["rows"]]
        section = Section("", "", summarise(table, rows, [r["values"] for r in page["rows"]]))
        environments = [page["environment"]] if page["environment"] else []
        return Result(table, self.columns(table), [section], environments, page["headlines"], page["measured"])

    def shown(self, measurement: Measurement, page: Page) -> str | None:
        """The record that a JSON page names for a measurement, "" where it shows numbers and names none, None where it shows none."""
        values = [v for row in page["rows"] if row["labels"] == measurement.row.labels for v in row["values"]]
        own = [value for value in values if value.get("seed", measurement.seed) == measurement.seed]
        return own[0].get("run_id", own[0].get("record", "")) if own else None


def _count(rows: Sequence[RowResult]) -> str:
    return f"{sum(bool(row.values) for row in rows)} of {len(rows)}"


class Computed(Kind):
    """A kind that is computed in seconds: always anew, and the table's JSON page is the record."""

    recorded = False

    def find(self, measurement: Measurement) -> Measured | None:
        table, row = measurement.table, measurement.row
        path = measurement.folder.pages / f"{table.name}.json"
        page = record.read(path, dict(self.page_shape)) if path.is_file() else {"rows": []}
        same = [r for r in page["rows"] if r["labels"] == row.labels and r["overrides"] == list(row.overrides)]
        if not same or not same[0]["values"]:
            return None
        derived = {name for name, metric in table.metrics.items() if metric.reduction_of}
        values = same[0]["values"][table.seeds.index(measurement.seed)]
        kept = {name: value for name, value in values.items() if name not in derived}
        return Measured(kept | {"seed": measurement.seed}, page["environment"])
