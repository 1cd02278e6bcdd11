"""Curves of a run: log.jsonl beside its checkpoint always, Weights & Biases unless logger.name is none.

Keys: train/loss, train/accuracy, train/images_per_s, lr, epoch at every report; test/loss, test/accuracy,
memory/peak_bytes, memory/saved_bytes after every epoch. Steps are counted over the whole run, so a resumed run goes on
where its checkpoint stands.
"""

import importlib.util
import json
import netrc
import os
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig

from actpress.record import method_name, portable, replacing

NAMES = ("wandb", "none")
MODES = ("auto", "online", "offline")


class Log:
    """Where a run's curves go. wandb: a started W&B run, or None."""

    def __init__(self, path: Path, step: int, wandb: Any = None):
        self._path, self._wandb = path, wandb
        _keep_until(path, step)
        self._file = path.open("a")

    def log(self, step: int, values: dict[str, float | None]) -> None:
        """Append values, those that are not None, at global step `step`."""
        known = {key: value for key, value in values.items() if value is not None}
        self._file.write(json.dumps({"step": step, **known}) + "\n")
        self._file.flush()
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

    def finish(self, status: str, summary: dict[str, Any]) -> None:
        """Close the log; `summary` becomes the W&B run's summary."""
        self._file.close()
        if self._wandb:
            self._wandb.summary.update({"status": status, **summary})
            self._wandb.finish(exit_code=0 if status == "ok" else 1)


def check(cfg: DictConfig) -> None:
    """Raise ValueError if the logger that cfg asks for is unknown or not installed."""
    options = cfg.logger
    if options.name not in NAMES:
        raise ValueError(f"logger.name={options.name} must be one of {', '.join(NAMES)}")
    if options.name == "none":
        return
    if options.mode not in MODES:
        raise ValueError(f"logger.mode={options.mode} must be one of {', '.join(MODES)}")
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("logger=wandb, but the package wandb is not installed; pip install wandb, or set logger=none")


def create(cfg: DictConfig, run_id: str, path: Path, step: int = 0, wandb_id: str | None = None) -> Log:
    """Open the log of run `run_id` at global step `step`.

    path: the log.jsonl, whose lines after `step` are dropped. wandb_id: the W&B run to go on with, None for a new one.
    """
    check(cfg)
    return Log(path, step, _start_wandb(cfg, run_id, wandb_id) if cfg.logger.name == "wandb" else None)


def _start_wandb(cfg: DictConfig, run_id: str, wandb_id: str | None) -> Any:
    import wandb  # not needed, and perhaps not installed, with logger=none

    os.environ.setdefault("WANDB_SILENT", "true")
    method = method_name(cfg)
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
            mode=wandb_mode(cfg.logger.mode),
            resume="allow" if wandb_id else None,
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.Error as error:
        raise ValueError(f"W&B did not start ({error}); set logger.mode=offline or logger=none") from error


def wandb_mode(mode: str) -> str:
    """online or offline. auto: what WANDB_MODE says, else online if there is an account, which is WANDB_API_KEY or a netrc entry."""
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


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines of a log that lie after `step`, and a last one cut short: the run will write them again."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    with replacing(path) as file:
        file.writelines(line.encode() for line in whole if json.loads(line)["step"] <= step)
