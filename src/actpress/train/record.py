"""Records: the JSON file of a run is the truth about it; tables and plots are made from nothing else.

A run is named by what it computes: `run_id` hashes the resolved config without what cannot change the result. A record
holds no path of the machine that wrote it, so that it can be committed.
"""

import copy
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from omegaconf import DictConfig, OmegaConf

from actpress.train import provenance

STATUSES = ("ok", "oom", "diverged", "failed")
PACKAGES = ("torch", "torchvision", "timm", "triton", "numpy")

# What readers of a run's record rely on, see `read`.
ENVIRONMENT = dict.fromkeys(("device", "device_type", "torch", "python", "commit", "dirty", "date"), object)
RUN = {"run_id": str, "status": str, "history": list, "environment": ENVIRONMENT}
RUN |= {"metrics": dict.fromkeys(("top1_last", "top1_best", "epochs", "train_images_per_s", "peak_bytes"), object)}

# Paths of one machine: in no record, in no hash.
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
    return "-".join([*(re.sub(r"[^\w.]+", "_", str(word)) for word in words), digest])


def method_name(cfg: DictConfig) -> str:
    """Lower-case name of the class that cfg.method instantiates."""
    return str(cfg.method["_target_"]).rpartition(".")[2].lower()


def _without(config: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    """A copy of `config` without the entries that `keys` name with dots; a key that is not there is no error."""
    kept = copy.deepcopy(config)
    for key in keys:
        *path, last = key.split(".")
        functools.reduce(lambda node, name: node.get(name, {}), path, kept).pop(last, None)
    return kept


class Unreadable(ValueError):
    """A record that is missing or damaged. The message is one line that names the file."""


class WriteError(OSError):
    """A file could not be written. The message, one line, names the file and the cause, such as "No space left on device"."""

    def __init__(self, path: Path | str, cause: OSError):
        super().__init__(f"{path} could not be written: {cause.strerror or cause}")
        self.path, self.cause = path, cause

    def __reduce__(self):  # OSError's own would pass the message alone when the error comes from another process
        return type(self), (self.path, self.cause)


class _Raw(io.FileIO):
    """A file that remembers why it could not be written: torch.save hides that behind an error of its own."""

    failure: OSError | None = None

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = error
            raise


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """Turn an OSError of the block into a WriteError that names `path`."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from error


@contextmanager
def replacing(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, at once and on disk; if the block raises, or
    the process dies, `path` stays as it was. Two processes must not write one path at the same time.

    Raises WriteError if the file cannot be written, a full disk for instance, also where the block raised an error because of that.
    """
    path = Path(path)
    temporary = _temporary(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = _Raw(temporary, "wb")
    try:
        with io.BufferedWriter(raw) as file:
            yield file
            with naming(path):
                file.flush()
                os.fsync(file.fileno())
        with naming(path):
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        if raw.failure is None or isinstance(error, WriteError):
            raise
        raise WriteError(path, raw.failure) from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")


def check_file(path: Path) -> None:
    """Raise ValueError where a folder is in the way of writing the file `path`."""
    for place in (path, _temporary(path)):
        if place.is_dir():
            raise ValueError(f"{place} must be a file, but it is a folder; move it away")


def check_folder(key: str, folder: Path | str) -> None:
    """Raise ValueError, naming `key` and what is in the way, unless `folder` is one that can be written to, or could be made.

    Nothing is created.
    """
    if not isinstance(folder, str | Path) or not str(folder):
        raise ValueError(f"{key}={folder} must be the path of a folder")
    folder = Path(folder)
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"{key}={folder} must be a folder, but {nearest} is a file; move it away or set another {key}")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={folder} must be writable, but {nearest} is read-only; set another {key}")


def make_folder(key: str, folder: Path | str) -> None:
    """Make `folder` and try to write to it. Raises ValueError, naming `key` and the cause, where that fails."""
    check_folder(key, folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise ValueError(f"{key}={folder} must be writable, but: {error.strerror}; set another {key}") from error


def write(path: Path | str, record: dict[str, Any]) -> None:
    """Write a record as JSON, atomically. Numbers that are not finite become null."""
    with replacing(path) as file:
        file.write(_text(record).encode() + b"\n")


def as_read(record: dict[str, Any]) -> dict[str, Any]:
    """The record as `read` gives it back once it is written."""
    return json.loads(_text(record))


def _text(record: dict[str, Any]) -> str:
    return json.dumps(_finite(record), indent=1, allow_nan=False)


def read(path: Path | str, shape: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a record. shape: the keys it must have, each with the type of its value or with a shape of its own.

    Raises Unreadable, a ValueError that names the path, if the record is not there, is no JSON object or lacks a key.
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
    """The keys of `shape` that the record lacks, or has with a value of another type."""
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


def environment(device: torch.device | str) -> dict[str, Any]:
    """Where a number was measured: device, a GPU's memory, versions, commit of this source and whether it was changed since, time."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "device_type": device.type,
        "cuda": torch.version.cuda if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "cpu_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        **{name: _version(name) for name in PACKAGES},
        **provenance.source(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    listing = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", listing.read_text(), re.MULTILINE) if listing.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
