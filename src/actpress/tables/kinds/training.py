"""Tables of training runs: each row is trained for each seed unless results/runs holds the record of a finished run."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from actpress.tables.kind import Folder, Kind, Measured, Measurement, Page
from actpress.tables.result import Result
from actpress.tables.spec import Table
from actpress.train import record
from actpress.train.errors import UNHAPPY_END, InputError

FINISHED = ("ok", "oom", "diverged")


class Training(Kind):
    """Metrics are those of a run's record, see actpress.train; train_images_per_s is its median.

    settings: reach, a test accuracy in percent; the table may then have the metrics epochs_to_reach and seconds_to_reach.
    """

    settings: ClassVar[Mapping[str, Any]] = {"reach": None}

    def find(self, measurement: Measurement) -> Measured | None:
        found = measurement.read(_file(measurement), record.RUN)
        if found is None or found["status"] not in FINISHED:
            return None
        speed = found["metrics"]["train_images_per_s"] or {}
        metrics = found["metrics"] | {"train_images_per_s": speed.get("median")}
        if (reach := measurement.table.settings["reach"]) is not None:
            metrics |= time_to(found["history"], reach)
        if found["status"] != "ok":
            metrics = dict.fromkeys(metrics, found["status"].upper())
        return Measured(metrics | {"run_id": found["run_id"], "seed": measurement.seed}, found["environment"])

    def measure(self, measurement: Measurement) -> Measured:
        path = measurement.folder.root / _file(measurement)
        train(measurement, anew=measurement.table.reuse == "here" or path.exists())
        found = self.find(measurement)
        if found is None:
            raise InputError(f"training left no record of a finished run at {path}")
        return found

    def cost(self, measurement: Measurement) -> str:
        cfg = measurement.config
        return f"to train, {cfg.recipe.epochs} epochs: {record.run_id(cfg)}"

    def seconds(self, measurement: Measurement) -> float | None:
        path = measurement.project.results.root / _file(measurement)
        if not path.is_file() or (found := record.read(path, record.RUN))["status"] != "ok":
            return None
        return sum(epoch["train_seconds"] + epoch["test_seconds"] for epoch in found["history"])

    def from_page(self, table: Table, page: Page, folder: Folder) -> Result:
        """Its environments are those of all records that the page names."""
        result = super().from_page(table, page, folder)
        found = [record.read(folder.root / file, record.RUN) for row in result.rows for file in row.records]
        result.environments = [entry["environment"] for entry in found] or result.environments
        return result


def train(measurement: Measurement, anew: bool) -> None:
    """Train the measurement's run in a process of its own. anew: also where a resume file says that the run is complete."""
    project = measurement.project
    settings = [f"seed={measurement.seed}", "logger=none", f"resume={'false' if anew else 'true'}"]
    if measurement.folder != project.results:
        settings.append(f"paths.records={(measurement.folder.root / 'runs').relative_to(project.root)}")
    command = [sys.executable, str(project.root / "scripts" / "train.py"), *measurement.row.overrides, *settings]
    code = subprocess.run(command, cwd=project.root, check=False).returncode
    if code not in (0, UNHAPPY_END):
        name = record.run_id(measurement.config)
        raise InputError(f"training {name} failed with exit code {code}; its message is above")


def time_to(history: Sequence[Mapping[str, float]], reach: float) -> dict[str, Any]:
    """Epochs, and seconds of training, until the test accuracy is `reach` percent for the first time; "not reached" otherwise."""
    seconds = 0.0
    for epoch in history:
        seconds += epoch["train_seconds"]
        if epoch["test_accuracy"] >= reach:
            return {"epochs_to_reach": epoch["epoch"], "seconds_to_reach": seconds}
    return {"epochs_to_reach": "not reached", "seconds_to_reach": "not reached"}


def _file(measurement: Measurement) -> str:
    return f"runs/{record.run_id(measurement.config)}.json"


KIND = Training()
