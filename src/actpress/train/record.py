"""Records: one JSON file a run, from which all tables and plots are made.

`run_id` hashes the resolved config without the settings that cannot change the result. A record holds no path of the machine that
wrote it, so that it can be committed.
"""

import copy
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from actpress.train.errors import Unreadable
from actpress.train.files import id_word, write_text

# Keys that readers of a run's record need, see `read`.
ENVIRONMENT = dict.fromkeys(("device", "device_type", "torch", "python", "commit", "dirty", "date"), object)
RUN = {"run_id": str, "status": str, "history": list, "environment": ENVIRONMENT}
RUN |= {"metrics": dict.fromkeys(("top1_last", "top1_best", "epochs", "train_images_per_s", "peak_bytes"), object)}

# Paths of one machine: neither in the record nor in the hash.
MACHINE = ("paths", "data.root")
# Settings that do not change what is computed: in the record, not in the hash.
INERT = ("logger", "name", "tags", "resume", "runtime.workers", "runtime.progress", "runtime.threads")


def portable(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain Python, without paths of this machine."""
    return _without(OmegaConf.to_container(cfg, resolve=True), MACHINE)


def run_id(cfg: DictConfig) -> str:
    """Name of the run that `cfg` describes: <model>-<data>-<method>-s<seed>-<hash>, the method being the class it names.

    The hash, 8 hexadecimal digits, covers the resolved config but for paths, logger, name, tags, resume and
    runtime.{workers,progress,threads}: configs with equal names train the same weights.
    """
    identity = json.dumps(_without(portable(cfg), INERT), sort_keys=True)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    words = (cfg.model.name, cfg.data.name, method_name(cfg), f"s{cfg.seed}")
    return "-".join([*map(id_word, words), digest])


def method_name(cfg: DictConfig) -> str:
    """Lower-case name of the class that cfg.method instantiates."""
    return str(cfg.method["_target_"]).rpartition(".")[2].lower()


def _without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A copy of `config` without the entries that `keys` name with dots; missing keys are ignored."""
    kept = copy.deepcopy(config)
    for key in keys:
        *path, last = key.split(".")
        functools.reduce(lambda node, name: node.get(name, {}), path, kept).pop(last, None)
    return kept


def write(path: Path | str, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically. Numbers that are not finite become null."""
    write_text(path, _text(record) + "\n")


def as_read(record: dict[str, Any]) -> dict[str, Any]:
    """The record as `read` returns it after `write`."""
    return json.loads(_text(record))


def _text(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), indent=1, allow_nan=False)


def read(path: Path | str, shape: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a record. shape: the keys it must have, each with the type of its value or with a shape of its own.

    Raises Unreadable, a ValueError that names the path, if the record is missing, is no JSON object or lacks a key.
    """
    path = Path(path)
    if not path.is_file():
        raise Unreadable(f"no record at {path}")
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError, brackets without end
        raise Unreadable(f"record {path} is not valid JSON ({error}); delete it and run again") from error
    if not isinstance(record, dict):
        raise Unreadable(f"record {path} must hold a JSON object, got {type(record).__name__}; delete it and run again")
    if lacking := next(_lacking(record, shape or {}), None):
        raise Unreadable(f"record {path} is damaged: it has no {lacking}; delete it and run again")
    return record


def _lacking(record: Any, shape: dict[str, Any], above: str = "") -> Iterator[str]:
    """The keys of `shape` that the record lacks, or whose value has another type."""
    for key, kind in shape.items():
        inner = isinstance(kind, dict)
        if key not in record or not isinstance(record[key], dict if inner else kind):
            yield f"{above}{key}"
        elif inner:
            yield from _lacking(record[key], kind, f"{above}{key}.")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
