"""Regenerate published tables: measured | paper | difference.

python scripts/reproduce_table.py                      what this machine can do, on one page: results/tables/index.md
python scripts/reproduce_table.py division_memory      tables by name (configs/tables/*.yaml)
python scripts/reproduce_table.py [NAME] dry=true      print what would be run, and run nothing
python scripts/reproduce_table.py division_accuracy data.source=folder data.root=DIR      overrides for every row

Memory tables are predicted with fake tensors, error tables computed. Training tables are made of the records of runs; runs that
have none are trained first, so an interrupted table goes on where it stopped. Writes results/tables/NAME.md and NAME.json, and the index of
all tables, results/README.md.
"""

import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

from actpress import cli, data, engine, errors, fidelity, headlines, record, tables
from actpress.run import InputError, bad_input, files_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
PAGES = ROOT / "results" / "tables"
GRADIENTS = ROOT / "results" / "fidelity"
FINISHED = ("ok", "oom", "diverged")
HOW = {
    "memory": "predicted with fake tensors, seconds, no data",
    "fidelity": "gradients at trained weights",
    "error": "computed for every input, seconds, no data",
}


def main(arguments: list[str]) -> None:
    with bad_input():
        names, overrides, dry = parse(arguments)
        folder = CONFIGS / "tables"
        wanted = [tables.load(folder, name) for name in names or tables.names(folder)]
    wanted = [with_overrides(table, overrides) for table in wanted if names or table.default]
    if dry:
        print("\n".join(line for table in wanted for line in plan(table)))
        return
    pages = [make(table) for table in wanted]
    if not names:
        write_text(PAGES / "index.md", "# Reproduced on one machine\n\n" + "\n".join(pages))
    write_text(PAGES.parent / "README.md", headlines.index(PAGES))


def parse(arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """(table names, overrides, dry) of the command line."""
    names = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("dry=")]
    dry = [argument.removeprefix("dry=") for argument in arguments if argument.startswith("dry=")] or ["false"]
    if dry[-1] not in ("true", "false"):
        raise ValueError(f"dry={dry[-1]}, allowed: true, false")
    return names, overrides, dry[-1] == "true"


def with_overrides(table: tables.Table, overrides: list[str]) -> tables.Table:
    """The table with more overrides in every row."""
    cells = [replace(cell, overrides=(*cell.overrides, *overrides)) for cell in table.cells]
    return replace(table, cells=cells)


def plan(table: tables.Table) -> list[str]:
    """What making the table would do, a line for each cell."""
    lines = [f"{table.name}: {table.title}"]
    for cell in table.cells:
        name = ", ".join(map(str, cell.labels.values()))
        if missing := lacking(cell):
            lines.append(f"  {name}: not run here, needs {tables.needs(missing)}")
        elif table.kind != "training":
            lines.append(f"  {name}: {HOW[table.kind]}  [{' '.join(cell.overrides)}]")
        else:
            for seed in table.seeds:
                cfg = compose(cell, seed)
                todo = "a record is there" if usable(table, cfg) else f"to train, {cfg.recipe.epochs} epochs"
                lines.append(f"  {name}, seed {seed}: {record.run_id(cfg)}, {todo}  [{' '.join(cell.overrides)}]")
    return lines


def make(table: tables.Table) -> str:
    """Measure, render and write one table; returns its Markdown."""
    print(table.title, flush=True)
    if table.kind == "fidelity":
        return make_fidelity(table)
    measuring = {"memory": predict, "error": derivative_error}.get(table.kind, train)
    measured: list[tables.Values] = []
    environments: list[dict[str, Any]] = []
    for cell in table.cells:
        values = []
        for seed in table.seeds:
            if lacking(cell) and not (
                table.kind == "training" and cell.overrides and usable(table, compose(cell, seed))
            ):
                continue
            numbers, environment = measuring(table, cell, seed)
            values.append(numbers | {"seed": seed})
            environments.append(environment)
            shown = ", ".join(
                f"{m.label} {m.show(numbers.get(key))}" for key, m in table.metrics.items() if not m.reduction_of
            )
            print(f"  {', '.join(map(str, cell.labels.values()))}: {shown}", flush=True)
        measured.append(values)
    results = tables.summarise(table, measured)
    text = tables.render(table, results, provenance(table, environments))
    about = tables.as_json(table, results, environments[0] if environments else {})
    record.write(PAGES / f"{table.name}.json", about | {"headlines": headlines.fill(table.headlines, results)})
    write_text(PAGES / f"{table.name}.md", text)
    return text


def lacking(cell: tables.Cell) -> tuple[str, ...]:
    """What the cell requires and this machine lacks."""
    return tuple(need for need in cell.requires if not here(need, cell))


def here(need: str, cell: tables.Cell) -> bool:
    if need == "gpu":
        return torch.cuda.is_available()
    if need in ("imagenet", "cifar10"):
        root, tests = Path(compose(cell, seed=0).data.root), {"imagenet": ("val", "validation"), "cifar10": ("test",)}
        return (root / "train").is_dir() and any((root / name).is_dir() for name in tests[need])
    if need == "transformers":
        return find_spec(need) is not None
    return False  # a method or a thing that does not exist here


def predict(table: tables.Table, cell: tables.Cell, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(predicted bytes, environment) of a cell of a memory table."""
    cfg = compose(cell, seed)
    numbers = tables.memory(
        lambda: hydra.utils.instantiate(cfg.model),
        hydra.utils.instantiate(cfg.method),
        cfg.recipe.batch_size,
        cfg.data.image_size,
        cfg.runtime.precision,
    )
    return numbers, record.environment("cpu")


def derivative_error(table: tables.Table, cell: tables.Cell, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(errors, environment) of a cell of an error table: how exact the derivative of the method's activations is."""
    cfg = compose(cell, seed)
    replacement = hydra.utils.instantiate(cfg.method).rules()[nn.GELU]
    found = errors.derivative_error(replacement.codec, cfg.derivative.variant, cfg.derivative.dtype)
    return found._asdict(), record.environment("cpu")


def make_fidelity(table: tables.Table) -> str:
    """Compare the gradients of the rows' methods on each network of a fidelity table, at its initial or trained weights."""
    body, environments, measured = [], [], {}
    for network in dict.fromkeys(cell.labels.get("network", "") for cell in table.cells):
        cells = [cell for cell in table.cells if cell.labels.get("network", "") == network]
        for weights in table.fidelity["weights"]:
            entries = {name_of(cell): gradients(table, cell, weights) for cell in cells}
            found = {name: entry for name, entry in entries.items() if entry is not None}
            measured[f"{network} {weights}".strip()] = found
            body += [f"### {', '.join(filter(None, (network, f'{weights} weights')))}", ""]
            if len(found) < len(entries):
                missing = tuple(dict.fromkeys(need for cell in cells for need in lacking(cell)))
                which = ": " + "; ".join(name for name in entries if name not in found) if found else ""
                body += [f"not run{which} (needs {tables.needs(missing)})", ""]
            if not found:
                continue
            environments += [entry["environment"] for entry in found.values()]
            figures = {method: entry["figures"] for method, entry in found.items()}
            layers = next(iter(found.values()))["layers"]
            pair = tuple(table.fidelity["pair"]) if table.fidelity["pair"] else None
            shares = {method: entry["saved_share"] for method, entry in found.items()}
            body += [fidelity.summary(figures, layers, shares), "", "<details><summary>layer by layer</summary>", ""]
            body += [fidelity.render(figures, layers, pair), "", "</details>", ""]
    head = [f"## {table.title}", "", f"Source: {table.source}.", ""]
    text = "\n".join([*head, *body, *(f"- {note}" for note in table.notes), "", provenance(table, environments), ""])
    count = sum(map(len, measured.values()))
    about = {"table": table.name, "title": table.title, "kind": table.kind}
    about["measured"] = f"{count} of {len(table.cells) * len(table.fidelity['weights'])}"
    ids = {where: {method: entry["id"] for method, entry in found.items()} for where, found in measured.items()}
    record.write(PAGES / f"{table.name}.json", about | {"gradients": ids})
    write_text(PAGES / f"{table.name}.md", text)
    return text


def name_of(cell: tables.Cell) -> str:
    """What a line of a fidelity table is called."""
    return ", ".join(str(value) for label, value in cell.labels.items() if label != "network")


def stock_of(cell: tables.Cell) -> tables.Cell:
    """The cell without its method and what it sets of it."""
    kept = (override for override in cell.overrides if not override.lstrip("+~").startswith("method"))
    return replace(cell, overrides=(*kept, "method=none"))


def gradients(table: tables.Table, cell: tables.Cell, weights: str) -> dict[str, Any] | None:
    """The record of one method's gradients on one network, results/fidelity/<id>.json; measured if there is none. None if this machine
    lacks what that needs."""
    stock = stock_of(cell)
    seed = table.seeds[0]
    cfg, own = compose(stock, seed), compose(cell, seed)
    settings = {key: table.fidelity[key] for key in ("batches", "examples", "draws")} | {"weights": weights}
    name = fidelity.record_id(record.run_id(cfg), record.portable(own)["method"], settings)
    path = GRADIENTS / f"{name}.json"
    if path.exists():
        return record.read(path)
    if lacking(cell):
        return None
    if weights == "trained":
        record_of_training(table, stock, seed)
        state = torch.load(ROOT / files_of(cfg).checkpoint, map_location="cpu", weights_only=True)["model"]
    start = time.perf_counter()
    images = data.create(cfg.data, cfg.recipe, device=torch.device("cpu"), seed=cfg.seed, workers=0)
    images.train.set_epoch(0)
    engine.seed_everything(cfg.seed)
    model = hydra.utils.instantiate(cfg.model).train()
    if weights == "trained":
        model.load_state_dict(state)
    examples = settings["examples"] or cfg.recipe.batch_size
    batches = [(x[:examples], y[:examples]) for x, y in islice(images.train, settings["batches"])]
    method = hydra.utils.instantiate(own.method)
    found = fidelity.compare(model, {"": method}, batches, settings["draws"])[""]
    entry = {
        "id": name,
        "network": record.run_id(cfg),
        "label": images.label,
        "method": record.portable(own)["method"],
        **settings,
        "layers": [n for n, p in model.named_parameters() if n in found and fidelity.is_layer_weight(n, p)],
        "figures": found,
        "saved_share": fidelity.saved_share(model, method, batches[0]),
        "seconds": time.perf_counter() - start,
        "environment": record.environment("cpu"),
    }
    record.write(path, entry)
    print(
        f"  {', '.join(map(str, cell.labels.values()))}, {weights}: cosine {found['total']['cosine']:.4f}", flush=True
    )
    return entry


def train(table: tables.Table, cell: tables.Cell, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(metrics, environment) of a cell of a training table, from its record; trained first if there is none."""
    found = record_of_training(table, cell, seed)
    metrics = found["metrics"] | {"train_images_per_s": (found["metrics"]["train_images_per_s"] or {}).get("median")}
    if table.reach is not None:
        metrics |= tables.time_to(found["history"], table.reach)
    if found["status"] != "ok":
        metrics = dict.fromkeys(metrics, found["status"].upper())
    return metrics | {"run_id": found["run_id"]}, found["environment"]


def record_of_training(table: tables.Table, cell: tables.Cell, seed: int) -> dict[str, Any]:
    """The record of a cell's run, which is trained unless it has one, and, for a fidelity table, unless its weights are there."""
    cfg = compose(cell, seed)
    files = files_of(cfg)
    path = ROOT / files.record
    if not usable(table, cfg) or (table.kind == "fidelity" and not (ROOT / files.checkpoint).exists()):
        anew = "resume=false" if path.exists() and table.kind != "fidelity" else "resume=true"
        command = [
            sys.executable,
            str(ROOT / "scripts" / "train.py"),
            *cell.overrides,
            f"seed={seed}",
            "logger=none",
            anew,
        ]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        if code not in (0, cli.UNHAPPY_END):
            raise InputError(f"training {record.run_id(cfg)} failed with exit code {code}; its message is above")
    return record.read(path)


def usable(table: tables.Table, cfg: DictConfig) -> bool:
    """Whether the run's record can stand in the table: it ended, and, where the table wants it, here and with this source."""
    path = ROOT / files_of(cfg).record
    if not path.exists() or (found := record.read(path))["status"] not in FINISHED:
        return False
    here, there = record.environment("cpu"), found["environment"]
    same = ("device", "torch", "commit", "dirty")
    return table.reuse == "any" or (not here["dirty"] and all(here[key] == there[key] for key in same))


def compose(cell: tables.Cell, seed: int) -> DictConfig:
    """The training config of a cell."""
    return _compose((*cell.overrides, f"seed={seed}"))


@cache
def _compose(overrides: tuple[str, ...]) -> DictConfig:
    return cli.compose(list(overrides), CONFIGS)


def provenance(table: tables.Table, environments: list[dict[str, Any]]) -> str:
    """One line: how the numbers came about, where, with which versions."""
    how = (
        "Predicted with fake tensors"
        if table.kind == "memory"
        else "Computed"
        if table.kind == "error"
        else f"Measured, seeds {', '.join(map(str, table.seeds))}"
    )
    places = sorted(
        {
            f"{e['device']} ({e['device_type']}), torch {e['torch']}, Python {e['python']}, "
            f"commit {(e['commit'] or 'unknown')[:10]}{' with changes' if e['dirty'] else ''}"
            for e in environments
        }
    )
    return f"{how}: {'; '.join(places)}." if places else "Nothing was run."


def write_text(path: Path, text: str) -> None:
    with record.replacing(path) as file:
        file.write(text.encode())
    print(f"wrote {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
