"""Curves of a run: log.jsonl beside its checkpoint always, Weights & Biases unless logger.name is none.

Keys: train/loss, train/accuracy, train/images_per_s, lr, epoch at every report; test/loss, test/accuracy,
memory/peak_bytes, memory/saved_bytes after every epoch. Steps are counted over the whole run, so a resumed run continues at the step
of its checkpoint.

Tables are made from the record, not from this log: damaged lines of log.jsonl, as after a power cut, are dropped with a message.

W&B offline: every start of a run creates a folder of its own, and sending two folders of one run may lose the content of the first. So
a resumed run's folder first gets the curves so far, from log.jsonl, and the older folders move to outputs/<run_id>/superseded. One
folder remains to be sent; it holds the whole run.
"""

import importlib.util
import json
import netrc
import os
import secrets
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig, ListConfig

from actpress.train.config import shown
from actpress.train.files import atomic_write, write_errors
from actpress.train.record import method_name, portable

WANDB_FOLDERS = ("wandb", ".wandb")  # W&B takes the second if it exists
NAMES = ("wandb", "none")
MODES = ("auto", "online", "offline")
WANDB_MODES = ("online", "offline", "disabled", "dryrun", "run")  # of the environment variable


class Log:
    """The curves of a run. path: log.jsonl, which is appended to. wandb: a started W&B run, or None."""

    def __init__(self, path: Path, wandb: Any = None):
        self._path, self._wandb = path, wandb
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Append values, those that are not None, at global step `step`. Raises WriteError, a full disk for instance."""
        known = {key: value for key, value in values.items() if value is not None}
        line = (json.dumps({"step": step, **known}) + "\n").encode()
        with write_errors(self._path):
            while line:  # a full disk takes a part of the line, and raises an error for the rest
                line = line[self._file.write(line) :]
        if self._wandb:
            self._wandb.log(known, step=step)

    @property
    def url(self) -> str | None:
        """Address of the run in W&B, if it is online."""
        return self._wandb.url if self._wandb else None

    @property
    def id(self) -> str | None:
        """The run's id in W&B, to resume it with."""
        return self._wandb.id if self._wandb else None

    @property
    def whereabouts(self) -> str:
        """What W&B holds of the run, see the function `whereabouts`."""
        return whereabouts(_folder(self._wandb).parents[1], self.id, self.url) if self._wandb else whereabouts("", None)

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close the log; `summary` becomes the W&B run's summary."""
        self._file.close()
        if self._wandb:
            self._wandb.summary.update({"status": status, **summary})
            self._wandb.finish(exit_code=0 if status == "ok" else 1)


def whereabouts(outputs: Path | str, wandb_id: str | None, url: str | None = None) -> str:
    """What W&B holds of run `wandb_id`, in a few words: its address, how to send its offline folder below `outputs`, or that W&B is off."""
    if wandb_id is None:
        return "W&B off"
    if url:
        return f"W&B {url}"
    folders = [found for name in WANDB_FOLDERS for found in _offline(Path(outputs) / name, wandb_id)]
    if not folders:
        return "W&B offline, its folder is gone"
    if any(folders[-1].glob("*.synced")):
        return "W&B offline, sent since"
    return f"W&B offline, to send it: wandb sync {shlex.quote(os.path.relpath(folders[-1]))}"


def _offline(folder: Path, wandb_id: str) -> list[Path]:
    """The offline folders of run `wandb_id` in W&B's folder, oldest first: their names begin with the time."""
    return sorted(folder.glob(f"offline-run-*-{wandb_id}"))


def _folder(wandb: Any) -> Path:
    """The folder of a started W&B run, <outputs>/wandb/offline-run-<time>-<id> for instance."""
    return Path(wandb.dir).parent  # wandb.dir is the folder of its files


def check(cfg: DictConfig) -> None:
    """Raise ValueError if the logger of cfg is unknown or not installed, or does not accept the names in cfg."""
    options = cfg.logger
    _text("name", cfg.name, 128)
    if not isinstance(cfg.tags, ListConfig):
        raise ValueError(f"tags={shown(cfg.tags)} must be a list of texts, such as [a,b]")
    for tag in cfg.tags:
        _text("tags", tag, 64, optional=False)
    if options.name not in NAMES:
        raise ValueError(f"logger.name={shown(options.name)} must be one of {', '.join(NAMES)}")
    if options.name == "none":
        return
    if options.mode not in MODES:
        raise ValueError(f"logger.mode={shown(options.mode)} must be one of {', '.join(MODES)}")
    if wandb_mode(options.mode) not in WANDB_MODES:
        raise ValueError(f"WANDB_MODE={wandb_mode(options.mode)} must be one of {', '.join(WANDB_MODES)}")
    _text("logger.project", options.project, 128, without="/\\#?%:")
    _text("logger.entity", options.entity, 128)
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("logger=wandb, but the package wandb is not installed; pip install wandb, or set logger=none")


def _text(key: str, value: Any, most: int, without: str = "", optional: bool = True) -> None:
    if value is None and optional:
        return
    if not isinstance(value, str) or not 1 <= len(value) <= most or set(value) & set(without):
        raise ValueError(
            f"{key}={shown(value)} must be a text of 1 to {most} characters"
            + (f" without {' '.join(without)}" if without else "")
            + (", or null" if optional else "")
            + (" (a number in quotes: '\"5\"')" if isinstance(value, int | float) else "")
        )


def create(cfg: DictConfig, run_id: str, path: Path, step: int = 0, wandb_id: str | None = None) -> Log:
    """Open the log of run `run_id` at global step `step`.

    path: the log.jsonl, whose lines after `step` are dropped. wandb_id: the W&B run to resume, None for a new one.
    """
    check(cfg)
    wandb = None if cfg.logger.name == "none" else _start_wandb(cfg, run_id, wandb_id)
    rows = _keep_until(path, step)  # after W&B has started: if it fails to, the log stays unchanged
    if wandb and wandb_id and not wandb.resumed:  # W&B has none of the run: it is offline, or was when the run began
        for row in rows:
            wandb.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
        _supersede(wandb, path.parent / "superseded")
    return Log(path, wandb)


def _supersede(wandb: Any, target: Path) -> None:
    """Move older offline folders of a W&B run to folder `target`, where `wandb sync` does not look."""
    ours = _folder(wandb)
    for older in _offline(ours.parent, wandb.id):
        if older != ours:
            target.mkdir(parents=True, exist_ok=True)
            shutil.move(older, target / older.name)


def _start_wandb(cfg: DictConfig, run_id: str, wandb_id: str | None) -> Any:
    import wandb  # not needed, and perhaps not installed, with logger=none

    os.environ.setdefault("WANDB_SILENT", "true")
    method = method_name(cfg)
    mode = wandb_mode(cfg.logger.mode)
    folder = Path(cfg.paths.outputs)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project=cfg.logger.project,
            entity=cfg.logger.entity,
            id=wandb_id or f"{run_id}-{secrets.token_hex(3)}",
            name=cfg.name or run_id,
            group="-".join((cfg.model.name, cfg.data.name, method)),
            tags=[cfg.model.name, cfg.data.name, method, f"seed{cfg.seed}", *cfg.tags],
            config={"run_id": run_id, **portable(cfg)},
            dir=folder,  # W&B adds its own folder, wandb
            mode=mode,
            # An offline folder holds the whole run, so it replaces what the server has.
            resume="allow" if wandb_id and mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ValueError(f"W&B did not start ({error}); set logger.mode=offline or logger=none") from error


def wandb_mode(mode: str) -> str:
    """online or offline. auto: the value of WANDB_MODE, else online if there is an account: WANDB_API_KEY or a netrc entry."""
    if mode != "auto":
        return mode
    if chosen := os.environ.get("WANDB_MODE"):
        return chosen
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    """Whether a netrc file holds a login for the W&B host."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    files = [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]
    for file in map(Path, files):
        file = file.expanduser()
        if file.is_file():
            try:
                return host in netrc.netrc(file).hosts
            except netrc.NetrcParseError:
                return False
    return False


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop damaged lines of a log, and those after `step`, which the run will write again. Returns the remaining rows."""
    if not path.exists():
        with write_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # a run that was killed may have cut its last line short
    rows = [_row(line) for line in lines]
    kept = [(line, row) for line, row in zip(lines, rows, strict=True) if row and row["step"] <= step]
    if damaged := rows.count(None):
        print(f"{path}: {damaged} damaged line(s) dropped; the curves have a gap, the record has none", file=sys.stderr)
    with atomic_write(path) as file:
        file.writelines(line + b"\n" for line, _ in kept)
    return [row for _, row in kept]


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or brackets without end
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
