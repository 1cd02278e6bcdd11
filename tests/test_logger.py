"""Logging: without W&B, with a stand-in that notes what it is told, and with W&B itself, offline."""

import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from actpress import logger, run
from training import config, interrupt


def test_without_a_logger_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    assert run.run(config(tmp_path, "recipe.epochs=1"))["status"] == "ok"
    with pytest.raises(run.InputError, match="logger=none"):
        run.run(config(tmp_path, "recipe.epochs=1", "logger=wandb"))


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "k"}, None, "online"),
        ({}, "machine api.wandb.ai login user password k", "online"),
        ({}, "machine elsewhere.org login user password k", "offline"),
        ({"WANDB_BASE_URL": "https://elsewhere.org"}, "machine elsewhere.org login user password k", "online"),
        ({}, "no netrc at all", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
    ],
    ids=["nothing", "key", "netrc", "netrc of another host", "own server", "broken netrc", "WANDB_MODE"],
)
def test_wandb_goes_online_only_with_an_account(tmp_path, monkeypatch, environment, netrc, mode):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    assert logger.wandb_mode("auto") == mode
    assert logger.wandb_mode("online") == "online"


class FakeWandb(types.ModuleType):
    """Records what it is called with."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.started, self.logged, self.summary, self.exits = [], [], {}, []

    def Settings(self, **options):
        return options

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            id=options["id"],
            url=None,
            summary=self.summary,
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda exit_code: self.exits.append(exit_code),
        )


def test_wandb_gets_config_curves_and_summary_and_is_resumed(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = config(tmp_path, "logger=wandb", "logger.mode=offline", "tags=[mine]", "seed=4", "data.train_size=160")
    with interrupt(16, KeyError("power cut")), pytest.raises(KeyError):
        run.run(cfg)
    finished = run.run(cfg)
    first, second = wandb.started
    assert first["id"].startswith(finished["run_id"])
    assert (second["id"], first["resume"], second["resume"]) == (first["id"], None, "allow")
    assert (first["group"], first["mode"]) == ("resnet20-digits-stock", "offline")
    assert first["tags"] == ["resnet20", "digits", "stock", "seed4", "mine"]
    assert first["config"]["recipe"]["batch_size"] == 16
    assert Path(first["dir"]) == tmp_path / "outputs"
    assert wandb.exits == [1, 0]
    assert wandb.summary["top1_last"] == finished["metrics"]["top1_last"]
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps) == [10, 20, 20, 30]
    assert {key for _, values in wandb.logged for key in values} == {
        *("train/loss", "train/accuracy", "train/images_per_s", "lr", "epoch"),
        *("test/loss", "test/accuracy", "memory/peak_bytes", "memory/saved_bytes"),
    }


def test_wandb_offline_for_real(tmp_path, capfd):
    cfg = config(tmp_path, "recipe.epochs=1", "logger=wandb", "logger.mode=offline")
    run.run(cfg)
    captured = capfd.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 2
    assert list((tmp_path / "outputs" / "wandb").glob("offline-run-*/*.wandb"))
