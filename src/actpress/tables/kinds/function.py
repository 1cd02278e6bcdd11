"""Tables of a Python function: `measure: module.function` in the YAML names it; it is called once for each row.

The function takes a dict, the row's overrides (key=value) and `seed`, and returns {metric: number or word}. Results are kept in
results/<table>/, under a name that hashes the function's dotted name and its arguments.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import hydra
from omegaconf import OmegaConf

from actpress.tables.kind import Kind, Measured, Measurement
from actpress.train import provenance, record
from actpress.train.errors import InputError
from actpress.train.files import id_word

CALL = {"values": dict, "seconds": (int, float), "environment": record.ENVIRONMENT}


class Function(Kind):
    """settings: measure, the function's dotted name."""

    settings: ClassVar[Mapping[str, Any]] = {"measure": None}
    composes = False

    def read_settings(self, table: str, given: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(given.get("measure"), str):
            raise ValueError(f"table {table}: measure {given.get('measure')!r}, allowed: a function's dotted name")
        return given

    def find(self, measurement: Measurement) -> Measured | None:
        file = file_of(measurement)
        found = measurement.read(file, CALL)
        return found and Measured(found["values"] | {"record": file, "seed": measurement.seed}, found["environment"])

    def measure(self, measurement: Measurement) -> Measured:
        name, metrics = measurement.table.settings["measure"], measurement.table.metrics
        start = time.perf_counter()
        values = hydra.utils.get_method(name)(arguments(measurement))
        if unknown := sorted(values.keys() - metrics.keys()):
            raise InputError(f"{name} gave {', '.join(unknown)}, allowed: {', '.join(metrics)}")
        entry = {"arguments": arguments(measurement), "values": values, "seconds": time.perf_counter() - start}
        path = measurement.folder.root / file_of(measurement)
        record.write(path, entry | {"environment": provenance.environment("cpu")})
        return self.find(measurement)

    def cost(self, measurement: Measurement) -> str:
        return f"to measure with {measurement.table.settings['measure']}"

    def seconds(self, measurement: Measurement) -> float | None:
        path = measurement.project.results.root / file_of(measurement)
        return record.read(path, CALL)["seconds"] if path.is_file() else None


def arguments(measurement: Measurement) -> dict[str, Any]:
    """What the function is called with."""
    pairs = OmegaConf.from_dotlist(list(measurement.row.overrides))
    return {**OmegaConf.to_container(pairs, resolve=True), "seed": measurement.seed}


def file_of(measurement: Measurement) -> str:
    """The record, <table>/<labels>-<hash of the function's name and arguments>.json."""
    table = measurement.table
    identity = json.dumps([table.settings["measure"], arguments(measurement)], sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    labels = (*measurement.row.labels.values(), f"s{measurement.seed}")
    return f"{table.name}/{'-'.join([*map(id_word, labels), digest])}.json"


KIND = Function()
