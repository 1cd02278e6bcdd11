"""Rename records whose name hashes that of a function which has moved: the function that builds a model, or that measures a table's row.

python scripts/dev/rename_records.py results      records of runs, of gradients and of function tables below that folder; then `make report`
"""

import argparse
import hashlib
import json
from pathlib import Path

from omegaconf import OmegaConf

from actpress.tables.kinds import fidelity
from actpress.train import record

MODELS = {"actpress.models.create": "actpress.train.models.create"}
MEASURES = {"networks": ("actpress.networks.measure", "actpress.tables.networks.measure")}  # folder -> before, now
SETTINGS = ("batches", "examples", "draws", "weights")


def runs(folder: Path) -> dict[str, str]:
    """Renames the records of runs -> {id before: id now}, of runs that were renamed already too."""
    ids = {}
    for path in sorted(folder.glob("*.json")):
        found = record.read(path)
        model = found["config"]["model"]
        if model["_target_"] in MODELS:
            model["_target_"] = MODELS[model["_target_"]]
            found["run_id"] = record.run_id(OmegaConf.create(found["config"]))
            move(path, found["run_id"], found)
            ids[path.stem] = found["run_id"]
    return ids


def gradients(folder: Path, ids: dict[str, str]) -> None:
    for path in sorted(folder.glob("*.json")):
        found = record.read(path)
        if found["network"] in ids:
            found["network"] = ids[found["network"]]
            settings = {key: found[key] for key in SETTINGS}
            found["id"] = fidelity.record_id(found["network"], found["method"], settings)
            move(path, found["id"], found)


def functions(folder: Path, before: str, now: str) -> None:
    for path in sorted(folder.glob("*.json")):
        found = record.read(path)
        words, _, digest = path.stem.rpartition("-")
        if digest == hashed(before, found["arguments"]):
            move(path, f"{words}-{hashed(now, found['arguments'])}", found)


def hashed(function: str, arguments: dict) -> str:
    return hashlib.sha256(json.dumps([function, arguments], sort_keys=True).encode()).hexdigest()[:8]


def move(path: Path, name: str, content: dict) -> None:
    record.write(path.with_name(f"{name}.json"), content)
    path.unlink()
    print(f"{path.stem} -> {name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a folder with runs/, fidelity/ or networks/")
    results = parser.parse_args().results
    if not results.is_dir():
        parser.error(f"{results} is no folder")
    gradients(results / "fidelity", runs(results / "runs"))
    for name, moved in MEASURES.items():
        functions(results / name, *moved)
