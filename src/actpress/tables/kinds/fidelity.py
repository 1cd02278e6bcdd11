"""Tables of gradient fidelity: gradients of one network under each method compared with the exact ones, see tables.gradients.

One network at initial weights, or at the weights that training it without a method ends with, is a section of the page. Records are in
results/fidelity/, one for each network, weights and method.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, ClassVar

import hydra
import torch

from actpress.tables import gradients
from actpress.tables.gradients import Figures
from actpress.tables.kind import Folder, Found, Kind, Measured, Measurement, Page, Project
from actpress.tables.kinds import training
from actpress.tables.result import Details, Result, RowResult, Section, Summary
from actpress.tables.spec import Metric, Row, Table, allowed
from actpress.train import data, engine, provenance, record
from actpress.train.run import files_of

SETTINGS = {  # keys of `fidelity` in a table's YAML -> defaults
    "batches": 2,  # number of training batches
    "examples": None,  # of each batch, the first so many; None: all
    "draws": 100,  # gradients of a stochastic method on each batch
    "weights": ["trained"],  # init, trained or both
    "pair": None,  # two methods; a remark counts the layers in which the first is closer
}
RECORD = {
    "id": str,
    "figures": {"total": dict},
    "layers": list,
    "saved_share": (int, float),
    "environment": record.ENVIRONMENT,
}
COLUMNS = (  # of words: see `_cells`
    "saved, of stock",
    "total: cosine",
    "norm ratio",
    "bias",
    "noise",
    "bias / its standard error",
    "layers: lowest cosine",
    "median",
    "n",
)


class Fidelity(Kind):
    """A row's values are its record. settings: see SETTINGS."""

    settings: ClassVar[Mapping[str, Any]] = {"fidelity": {}}
    page_shape: ClassVar[Mapping[str, type]] = {"gradients": dict}

    def read_settings(self, table: str, given: dict[str, Any]) -> dict[str, Any]:
        wanted = given.get("fidelity", {})
        for key in wanted:
            allowed(table, "fidelity setting", key, SETTINGS)
        return SETTINGS | wanted

    def measurements(self, table: Table, project: Project, folder: Folder) -> list[Measurement]:
        networks = dict.fromkeys(_network(row) for row in table.rows)
        return [
            Measurement(table, row, table.seeds[0], project, folder, weights)
            for network in networks
            for weights in table.settings["weights"]
            for row in table.rows
            if _network(row) == network
        ]

    def find(self, measurement: Measurement) -> Measured | None:
        found = measurement.read(f"fidelity/{id_of(measurement)}.json", RECORD)
        return None if found is None else Measured(found, found["environment"])

    def cost(self, measurement: Measurement) -> str:
        return f"to compare gradients: {id_of(measurement)}"

    def outcome(self, measurement: Measurement, measured: Measured) -> str:
        return f"cosine {measured.values['figures']['total']['cosine']:.4f}"

    def measure(self, measurement: Measurement) -> Measured:
        cfg, own = stock_of(measurement).config, measurement.config
        wanted = _settings(measurement)
        state = _trained_weights(measurement) if measurement.weights == "trained" else None
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
        figures = gradients.compare(model, {"": method}, batches, wanted["draws"])[""]
        entry = {
            "id": id_of(measurement),
            "network": record.run_id(cfg),
            "label": images.label,
            "method": record.portable(own)["method"],
            **wanted,
            "layers": [n for n, p in model.named_parameters() if n in figures and gradients.is_layer_weight(n, p)],
            "figures": figures,
            "saved_share": gradients.saved_share(model, method, batches[0]),
            "seconds": time.perf_counter() - start,
            "environment": provenance.environment("cpu"),
        }
        record.write(measurement.folder.root / "fidelity" / f"{entry['id']}.json", entry)
        return Measured(entry, entry["environment"])

    def columns(self, table: Table) -> dict[str, Metric]:
        return {name: Metric(name, "") for name in COLUMNS}

    def sections(self, table: Table, found: Found) -> list[Section]:
        groups: dict[tuple[str, str], list[RowResult]] = {}
        for measurement, measured in found.items():
            row = _result(_method(measurement.row), measurement.row.requires, measured and measured.values)
            groups.setdefault((_network(measurement.row), measurement.weights), []).append(row)
        return [_section(table, *where, rows) for where, rows in groups.items()]

    def page(self, result: Result) -> Page:
        ids = {
            section.name: {row.row.labels["method"]: row.values[0]["id"] for row in section.measured}
            for section in result.sections
        }
        table = result.table
        return {
            "table": table.name,
            "title": table.title,
            "kind": table.kind,
            "measured": result.measured,
            "gradients": ids,
        }

    def from_page(self, table: Table, page: Page, folder: Folder) -> Result:
        """The page names records; the numbers are theirs. Sections hold the rows that were measured."""
        sections = []
        for name, ids in page["gradients"].items():
            found = {
                method: record.read(folder.root / "fidelity" / f"{file}.json", RECORD) for method, file in ids.items()
            }
            sections.append(Section(name, name, [_result(method, (), entry) for method, entry in found.items()]))
        environments = [row.values[0]["environment"] for section in sections for row in section.rows]
        return Result(table, self.columns(table), sections, environments, [], page["measured"])

    def shown(self, measurement: Measurement, page: Page) -> str | None:
        name = _name(_network(measurement.row), measurement.weights)
        return page["gradients"].get(name, {}).get(_method(measurement.row))


def stock_of(measurement: Measurement) -> Measurement:
    """The same measurement without the method and the options that the row sets for it."""
    kept = (o for o in measurement.row.overrides if not o.lstrip("+~").startswith("method"))
    return replace(measurement, row=replace(measurement.row, overrides=(*kept, "method=none")))


def id_of(measurement: Measurement) -> str:
    """Name of the measurement's record."""
    network = record.run_id(stock_of(measurement).config)
    return record_id(network, record.portable(measurement.config)["method"], _settings(measurement))


def record_id(network: str, method: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Name of a record: <run id of the network>-<weights>-<class of the method>-<hash of all that the result depends on>."""
    digest = hashlib.sha256(json.dumps([network, method, settings], sort_keys=True).encode()).hexdigest()[:8]
    return f"{network}-{settings['weights']}-{method['_target_'].rpartition('.')[2].lower()}-{digest}"


def _settings(measurement: Measurement) -> dict[str, Any]:
    settings = measurement.table.settings
    return {key: settings[key] for key in ("batches", "examples", "draws")} | {"weights": measurement.weights}


def _trained_weights(measurement: Measurement) -> dict[str, torch.Tensor]:
    """Weights of the network at the end of training without a method; trained now if no resume file holds them."""
    stock, project = stock_of(measurement), measurement.project
    path = project.root / files_of(stock.config).resume_file
    if not path.exists() or torch.load(path, map_location="cpu", weights_only=True)["record"] is None:
        # A record of the same training on another machine stays as it is: tables are made from it.
        known = (project.results.root / "runs" / f"{record.run_id(stock.config)}.json").is_file()
        training.train(replace(stock, folder=project.local) if known else stock, anew=False)
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


def _network(row: Row) -> str:
    return row.labels.get("network", "")


def _method(row: Row) -> str:
    """The row's labels but for the network: what its line is called."""
    return ", ".join(str(value) for label, value in row.labels.items() if label != "network")


def _name(network: str, weights: str) -> str:
    return f"{network} {weights}".strip()


def _result(method: str, requires: tuple[str, ...], entry: Mapping[str, Any] | None) -> RowResult:
    row = Row({"method": method}, (), {}, requires)
    if entry is None:
        return RowResult(row, [], {name: Summary() for name in COLUMNS})
    summaries = {name: Summary(text) for name, text in zip(COLUMNS, _cells(entry), strict=True)}
    return RowResult(row, [{**entry, "record": f"fidelity/{entry['id']}.json"}], summaries)


def _cells(entry: Mapping[str, Any]) -> list[str]:
    """Texts of COLUMNS: saved bytes, the total gradient, the layers."""
    figures = entry["figures"]
    total, cosines = figures["total"], sorted(figures[name]["cosine"] for name in entry["layers"])
    excess = "deterministic" if total["excess"] is None else f"{total['excess']:.1f}"
    texts = [f"{entry['saved_share']:.1%}", _cosine(total), _norm(total), f"{total['bias']:.4f}"]
    texts += [f"{total['noise']:.4f}", excess, f"{cosines[0]:.4f}", f"{statistics.median(cosines):.4f}"]
    return [*texts, str(total["n"])]


def _section(table: Table, network: str, weights: str, rows: list[RowResult]) -> Section:
    title = ", ".join(filter(None, (network, f"{weights} weights")))
    entries = {row.row.labels["method"]: row.values[0] for row in rows if row.values}
    figures = {method: entry["figures"] for method, entry in entries.items()}
    layers = next(iter(entries.values()))["layers"] if entries else []
    details = layer_by_layer(figures, layers, table.settings["pair"]) if entries else None
    return Section(_name(network, weights), title, rows, details)


def layer_by_layer(found: Mapping[str, Figures], layers: Sequence[str], pair: Sequence[str] | None = None) -> Details:
    """A line for each layer and the total: cosine ± sd and norm ratio of each method. The remark says in how many layers the mean cosine
    of pair[0] is at least that of pair[1]."""
    head = ["layer", *(f"{method}: {what}" for method in found for what in ("cosine", "norm ratio"))]
    rows = [
        [name, *(text(figures[name]) for figures in found.values() for text in (_cosine, _norm))]
        for name in (*layers, "total")
    ]
    remark = ""
    if pair and set(pair) <= found.keys():
        first, second = (found[method] for method in pair)
        gaps = [second[name]["cosine"] - first[name]["cosine"] for name in layers]
        wins = sum(gap <= 0 for gap in gaps)
        remark = f"{pair[0]} has at least the mean cosine of {pair[1]} in {wins} of {len(layers)} layers."
        remark += f" The largest shortfall in the others is {max(gaps):.1e}." if wins < len(layers) else ""
    return Details("layer by layer", head, rows, remark)


def _cosine(figures: Mapping[str, Any]) -> str:
    return f"{figures['cosine']:.4f} ± {figures['cosine_sd']:.4f}"


def _norm(figures: Mapping[str, Any]) -> str:
    return f"{figures['norm_ratio']:.3f}"


KIND = Fidelity()
