"""Rows of published tables: where the numbers of a row are recorded, and how they are measured where there is no record.

A kind of table is an entry of KINDS. What a kind needs is two functions of a row: `stored`, which reads a record, and `measure`, which
makes one. A row of kind `function` calls a Python function, so a table of a new kind of measurement needs a YAML file and that function.
"""

import copy
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from actpress import tables
from actpress.measure import derivatives, predicted_memory
from actpress.tables import fidelity
from actpress.train import cli, config, data, engine, provenance, record
from actpress.train.errors import UNHAPPY_END, InputError
from actpress.train.run import files_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
FINISHED = ("ok", "oom", "diverged")

# Records of kinds fidelity and function, see record.read; those of training are record.RUN.
GRADIENTS = {
    "id": str,
    "figures": {"total": dict},
    "layers": list,
    "saved_share": (int, float),
    "environment": record.ENVIRONMENT,
}
CALL = {"values": dict, "seconds": (int, float), "environment": record.ENVIRONMENT}


class Place(NamedTuple):
    """A folder with the pages of tables (tables/) and the records that they are made of (runs/, fidelity/, <table>/)."""

    root: Path

    @property
    def pages(self) -> Path:
        return self.root / "tables"


RESULTS = Place(ROOT / "results")  # tracked by git
LOCAL = Place(ROOT / "outputs" / "reproduced")  # of this machine, ignored by git


@dataclass(frozen=True, eq=False)  # a key of dictionaries by identity: its cell holds dictionaries itself
class Row:
    """What is measured at once: a cell of a table for one seed and, in a fidelity table, at initial or at trained weights."""

    table: tables.Table
    cell: tables.Cell
    seed: int
    place: Place = RESULTS
    weights: str = ""

    @property
    def name(self) -> str:
        words = [*map(str, self.cell.labels.values()), *([f"{self.weights} weights"] if self.weights else [])]
        return ", ".join([*words, *([f"seed {self.seed}"] if len(self.table.seeds) > 1 and not self.weights else [])])


class Entry(NamedTuple):
    """What was measured for a row, and where: see provenance.environment."""

    values: dict[str, Any]
    environment: dict[str, Any]


class Kind(NamedTuple):
    """stored: the row's numbers from its record, None without one. measure: measures them and writes the record. plan: what measuring
    takes, in words. seconds: how long measuring took elsewhere, None if unknown. recorded: a row with a record is not measured again."""

    stored: Callable[[Row], Entry | None]
    measure: Callable[[Row], Entry]
    plan: Callable[[Row], str]
    seconds: Callable[[Row], float | None] = lambda row: None
    recorded: bool = True


def rows_of(table: tables.Table, place: Place = RESULTS) -> list[Row]:
    """All rows of a table, in the order of its page."""
    if table.kind != "fidelity":
        return [Row(table, cell, seed, place) for cell in table.cells for seed in table.seeds]
    networks = dict.fromkeys(cell.labels.get("network", "") for cell in table.cells)
    return [
        Row(table, cell, table.seeds[0], place, weights)
        for network in networks
        for weights in table.fidelity["weights"]
        for cell in table.cells
        if cell.labels.get("network", "") == network
    ]


def stored(row: Row) -> Entry | None:
    """The row's numbers from a record that was made anywhere; None without one."""
    return KINDS[row.table.kind].stored(row) if exists(row.cell) else None


def reusable(row: Row) -> Entry | None:
    """The record that makes measuring the row superfluous; a table that says `reuse: here` wants it of this device and source."""
    if not KINDS[row.table.kind].recorded or (found := stored(row)) is None:
        return None
    if row.table.reuse == "any":
        return found
    here = provenance.environment(config.device(compose(row.cell, row.seed).runtime.device))
    same = all(here[key] == found.environment[key] for key in ("device", "torch", "commit", "dirty"))
    return found if same and not here["dirty"] else None


def measure(row: Row) -> Entry:
    return KINDS[row.table.kind].measure(row)


def exists(cell: tables.Cell) -> bool:
    """False for rows that no machine can run, of methods that are not part of the project."""
    return all(need in tables.NEEDS for need in cell.requires)


def lacking(cell: tables.Cell) -> tuple[str, ...]:
    """What the cell requires and this machine lacks."""
    return tuple(need for need in cell.requires if not _here(need, cell))


def _here(need: str, cell: tables.Cell) -> bool:
    if need == "gpu":
        return torch.cuda.is_available()
    if need in ("imagenet", "cifar10"):
        root, tests = Path(compose(cell, seed=0).data.root), {"imagenet": ("val", "validation"), "cifar10": ("test",)}
        return (root / "train").is_dir() and any((root / name).is_dir() for name in tests[need])
    if need == "transformers":
        return find_spec(need) is not None
    return False


def compose(cell: tables.Cell, seed: int) -> DictConfig:
    """The training config of a cell."""
    cfg = copy.deepcopy(_compose(cell.overrides))
    cfg.seed = seed
    return cfg


@cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    return cli.compose(list(overrides), CONFIGS)


def _read(row: Row, file: str, shape: dict[str, Any]) -> dict[str, Any] | None:
    """A record below the row's place or, where any will do, below results/; None if it is in neither. shape: see record.read."""
    places = (row.place,) if row.table.reuse == "here" else (row.place, RESULTS)
    paths = [place.root / file for place in places]
    return next((record.read(path, shape) for path in paths if path.is_file()), None)


# Kinds memory and error: computed in seconds, so every time anew; the table's own JSON holds the numbers.


def _from_page(row: Row) -> Entry | None:
    path = row.place.pages / f"{row.table.name}.json"
    page = record.read(path, {"rows": list, "environment": dict}) if path.is_file() else {"rows": []}
    found = [r for r in page["rows"] if r["labels"] == row.cell.labels and r["overrides"] == list(row.cell.overrides)]
    if not found or not found[0]["values"]:
        return None
    derived = {name for name, metric in row.table.metrics.items() if metric.reduction_of}
    values = found[0]["values"][row.table.seeds.index(row.seed)]
    return Entry({k: v for k, v in values.items() if k not in derived} | {"seed": row.seed}, page["environment"])


def _predict(row: Row) -> Entry:
    """Predicted bytes."""
    cfg = compose(row.cell, row.seed)
    numbers = predicted_memory(
        lambda: hydra.utils.instantiate(cfg.model),
        hydra.utils.instantiate(cfg.method),
        cfg.recipe.batch_size,
        cfg.data.image_size,
        cfg.runtime.precision,
    )
    return Entry(numbers | {"seed": row.seed}, provenance.environment("cpu"))


def _derivative_error(row: Row) -> Entry:
    """How exact the derivative of the method's activations is."""
    cfg = compose(row.cell, row.seed)
    replacement = hydra.utils.instantiate(cfg.method).rules()[nn.GELU]
    found = derivatives.derivative_error(replacement.codec, cfg.derivative.variant, cfg.derivative.dtype)
    return Entry(found._asdict() | {"seed": row.seed}, provenance.environment("cpu"))


# Kind training: the record of a run, which is trained where it has none.


def _trained(row: Row) -> Entry | None:
    found = _read(row, f"runs/{record.run_id(compose(row.cell, row.seed))}.json", record.RUN)
    if found is None or found["status"] not in FINISHED:
        return None
    metrics = found["metrics"] | {"train_images_per_s": (found["metrics"]["train_images_per_s"] or {}).get("median")}
    if row.table.reach is not None:
        metrics |= tables.time_to(found["history"], row.table.reach)
    if found["status"] != "ok":
        metrics = dict.fromkeys(metrics, found["status"].upper())
    return Entry(metrics | {"run_id": found["run_id"], "seed": row.seed}, found["environment"])


def _train(row: Row) -> Entry:
    path = row.place.root / "runs" / f"{record.run_id(compose(row.cell, row.seed))}.json"
    _run_training(row, anew=row.table.reuse == "here" or path.exists())
    found = _trained(row)
    if found is None:
        raise InputError(f"training left no record of a finished run at {path}")
    return found


def _run_training(row: Row, anew: bool) -> None:
    """Train the row's run in a process of its own. anew: also where a checkpoint says that the run is complete."""
    settings = [f"seed={row.seed}", "logger=none", f"resume={'false' if anew else 'true'}"]
    if row.place != RESULTS:
        settings.append(f"paths.records={(row.place.root / 'runs').relative_to(ROOT)}")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *row.cell.overrides, *settings]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code not in (0, UNHAPPY_END):
        name = record.run_id(compose(row.cell, row.seed))
        raise InputError(f"training {name} failed with exit code {code}; its message is above")


def _plan_training(row: Row) -> str:
    cfg = compose(row.cell, row.seed)
    return f"to train, {cfg.recipe.epochs} epochs: {record.run_id(cfg)}"


def _seconds_of_training(row: Row) -> float | None:
    """How long the run took wherever its record was made."""
    path = RESULTS.root / "runs" / f"{record.run_id(compose(row.cell, row.seed))}.json"
    if not path.is_file() or (found := record.read(path, record.RUN))["status"] != "ok":
        return None
    return sum(epoch["train_seconds"] + epoch["test_seconds"] for epoch in found["history"])


# Kind fidelity: gradients of one method on one network, at initial or at trained weights.


def stock_of(cell: tables.Cell) -> tables.Cell:
    """The cell without its method and what it sets of it."""
    kept = (override for override in cell.overrides if not override.lstrip("+~").startswith("method"))
    return replace(cell, overrides=(*kept, "method=none"))


def gradient_id(row: Row) -> str:
    """Name of the record of a row of gradients."""
    network = record.run_id(compose(stock_of(row.cell), row.seed))
    return fidelity.record_id(network, record.portable(compose(row.cell, row.seed))["method"], _settings(row))


def _settings(row: Row) -> dict[str, Any]:
    return {key: row.table.fidelity[key] for key in ("batches", "examples", "draws")} | {"weights": row.weights}


def _gradients(row: Row) -> Entry | None:
    found = _read(row, f"fidelity/{gradient_id(row)}.json", GRADIENTS)
    return None if found is None else Entry(found, found["environment"])


def _compare(row: Row) -> Entry:
    cfg, own = compose(stock_of(row.cell), row.seed), compose(row.cell, row.seed)
    wanted = _settings(row)
    state = _trained_weights(row) if row.weights == "trained" else None
    start = time.perf_counter()
    images = data.create(cfg.data, cfg.recipe, device=torch.device("cpu"), seed=cfg.seed, workers=0)
    images.train.set_epoch(0)
    engine.seed_everything(cfg.seed)
    model = hydra.utils.instantiate(cfg.model).train()
    if state is not None:
        model.load_state_dict(state)
    examples = wanted["examples"] or cfg.recipe.batch_size
    batches = [(x[:examples], y[:examples]) for x, y in islice(images.train, wanted["batches"])]
    method = hydra.utils.instantiate(own.method)
    found = fidelity.compare(model, {"": method}, batches, wanted["draws"])[""]
    entry = {
        "id": gradient_id(row),
        "network": record.run_id(cfg),
        "label": images.label,
        "method": record.portable(own)["method"],
        **wanted,
        "layers": [n for n, p in model.named_parameters() if n in found and fidelity.is_layer_weight(n, p)],
        "figures": found,
        "saved_share": fidelity.saved_share(model, method, batches[0]),
        "seconds": time.perf_counter() - start,
        "environment": provenance.environment("cpu"),
    }
    record.write(row.place.root / "fidelity" / f"{entry['id']}.json", entry)
    return Entry(entry, entry["environment"])


def _trained_weights(row: Row) -> dict[str, torch.Tensor]:
    """The weights of the row's network at the end of its training without a method, which is repeated where they are not here."""
    stock = replace(row, cell=stock_of(row.cell))
    cfg = compose(stock.cell, row.seed)
    path = ROOT / files_of(cfg).resume_file
    if not path.exists() or torch.load(path, map_location="cpu", weights_only=True)["record"] is None:
        # A record of the same training on another machine stays as it is: tables are made of it.
        known = (RESULTS.root / "runs" / f"{record.run_id(cfg)}.json").is_file()
        _run_training(replace(stock, place=LOCAL) if known else stock, anew=False)
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


# Kind function: the table's `measure` names a function, called with the row's overrides as a dict, key=value each, and `seed`.


def arguments(row: Row) -> dict[str, Any]:
    """What the function of a row of kind `function` is called with."""
    pairs = OmegaConf.from_dotlist(list(row.cell.overrides))
    return {**OmegaConf.to_container(pairs, resolve=True), "seed": row.seed}


def function_file(row: Row) -> str:
    """The record of such a row, <table>/<labels>-<hash of the function's name and arguments>.json."""
    digest = hashlib.sha256(json.dumps([row.table.measure, arguments(row)], sort_keys=True).encode()).hexdigest()[:8]
    words = (re.sub(r"[^\w.]+", "_", str(label)) for label in (*row.cell.labels.values(), f"s{row.seed}"))
    return f"{row.table.name}/{'-'.join([*words, digest])}.json"


def _called(row: Row) -> Entry | None:
    file = function_file(row)
    found = _read(row, file, CALL)
    return found and Entry(found["values"] | {"record": file, "seed": row.seed}, found["environment"])


def _call(row: Row) -> Entry:
    start = time.perf_counter()
    values = hydra.utils.get_method(row.table.measure)(arguments(row))
    if unknown := sorted(values.keys() - row.table.metrics.keys()):
        raise InputError(f"{row.table.measure} gave {', '.join(unknown)}, allowed: {', '.join(row.table.metrics)}")
    entry = {"arguments": arguments(row), "values": values, "seconds": time.perf_counter() - start}
    record.write(row.place.root / function_file(row), entry | {"environment": provenance.environment("cpu")})
    return _called(row)


def _seconds_of_call(row: Row) -> float | None:
    path = RESULTS.root / function_file(row)
    return record.read(path, CALL)["seconds"] if path.is_file() else None


KINDS = {
    "memory": Kind(_from_page, _predict, lambda row: "to predict with fake tensors, a second, no data", recorded=False),
    "error": Kind(
        _from_page, _derivative_error, lambda row: "to compute for every input, a second, no data", recorded=False
    ),
    "training": Kind(_trained, _train, _plan_training, _seconds_of_training),
    "fidelity": Kind(_gradients, _compare, lambda row: f"to compare gradients: {gradient_id(row)}"),
    "function": Kind(_called, _call, lambda row: f"to measure with {row.table.measure}", _seconds_of_call),
}
