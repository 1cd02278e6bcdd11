"""Logging: without W&B, with a stand-in that notes what it is told, and with W&B itself, offline."""

import os
import re
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

import pytest

from actpress.train import logger, run
from actpress.train.errors import InputError
from actpress.train.files import WriteError
from training import config, files_up_to, interrupt


def test_without_a_logger_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    assert run.train(config(tmp_path, "recipe.epochs=1"))["status"] == "ok"
    with pytest.raises(InputError, match="logger=none"):
        run.train(config(tmp_path, "recipe.epochs=1", "logger=wandb"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logger.project=5", "logger.project=5 must be a text of 1 to 128 characters without / \\ # ? % :, or null"),
        ("logger.project='a/b'", "logger.project=a/b must be a text"),
        ("logger.project=''", "logger.project= must be a text"),
        ("logger.entity=5", "logger.entity=5 must be a text of 1 to 128 characters, or null"),
        ("logger.mode=auto", "WANDB_MODE=sometimes must be one of online, offline, disabled"),
        ("name=5", "name=5 must be a text"),
    ],
)
def test_what_wandb_would_refuse_is_named_before_anything_is_touched(tmp_path, monkeypatch, override, message):
    monkeypatch.setenv("WANDB_MODE", "sometimes" if "mode" in override else "offline")
    cfg = config(tmp_path, "logger=wandb", "resume=false", override)
    files = run.files_of(cfg)
    files.folder.mkdir(parents=True)
    files.resume_file.write_text("a checkpoint")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run.train(cfg)
    assert "\n" not in str(caught.value)
    assert os.listdir(files.folder) == ["last.pt"]


def test_a_logger_that_does_not_start_leaves_checkpoint_and_log(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = config(tmp_path, "recipe.epochs=1", "logger=wandb", "logger.mode=offline")
    run.train(cfg)
    files = run.files_of(cfg)
    before = files.resume_file.read_bytes(), files.log.read_bytes(), files.record.read_bytes()
    monkeypatch.setattr(wandb, "init", mock.Mock(side_effect=wandb.Error("no server")))
    cfg.resume = False
    with pytest.raises(InputError, match="W&B did not start \\(no server\\)"):
        run.train(cfg)
    assert before == (files.resume_file.read_bytes(), files.log.read_bytes(), files.record.read_bytes())


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
        self.started, self.logged, self.summary, self.exits, self.server = [], [], {}, [], set()

    def Settings(self, **options):
        return options

    def init(self, **options):
        self.started.append(options)
        self.logged.append([])
        logged, id = self.logged[-1], options["id"]
        files = Path(options["dir"]) / "wandb" / f"offline-run-{len(self.started)}-{id}" / "files"
        files.mkdir(parents=True)
        return types.SimpleNamespace(
            id=id,
            url=None,
            dir=str(files),
            resumed=options["mode"] == "online" and id in self.server,
            summary=self.summary,
            log=lambda values, step: logged.append((step, values)),
            finish=lambda exit_code: self.exits.append(exit_code),
        )


def resumed(cfg, monkeypatch) -> tuple[FakeWandb, dict]:
    """A run that is interrupted in its second epoch and started again: (what W&B was told, the record)."""
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with interrupt(16, KeyError("power cut")), pytest.raises(KeyError):
        run.train(cfg)
    if cfg.logger.mode == "online":
        wandb.server.add(wandb.started[0]["id"])
    return wandb, run.train(cfg)


def test_wandb_gets_config_curves_and_summary_and_is_resumed(tmp_path, monkeypatch):
    options = ("logger=wandb", "logger.mode=online", "tags=[mine]", "seed=4", "data.train_size=160")
    wandb, finished = resumed(config(tmp_path, *options), monkeypatch)
    first, second = wandb.started
    assert first["id"].startswith(finished["run_id"])
    assert (second["id"], first["resume"], second["resume"]) == (first["id"], None, "allow")
    assert (first["group"], first["mode"]) == ("resnet20-digits-stock", "online")
    assert first["tags"] == ["resnet20", "digits", "stock", "seed4", "mine"]
    assert first["config"]["recipe"]["batch_size"] == 16
    assert Path(first["dir"]) == tmp_path / "outputs"
    assert wandb.exits == [1, 0]
    assert wandb.summary["top1_last"] == finished["metrics"]["top1_last"]
    assert [[step for step, _ in logged] for logged in wandb.logged] == [[10], [20, 20, 30]]
    assert {key for logged in wandb.logged for _, values in logged for key in values} == {
        *("train/loss", "train/accuracy", "train/images_per_s", "lr", "epoch"),
        *("test/loss", "test/accuracy", "memory/peak_bytes", "memory/saved_bytes"),
    }


@pytest.mark.slow
def test_a_run_resumed_offline_lies_in_one_folder_as_a_whole(tmp_path, monkeypatch, capsys):
    options = ("logger=wandb", "logger.mode=offline", "data.train_size=160")
    cfg = config(tmp_path, *options)
    wandb, finished = resumed(cfg, monkeypatch)
    first, second = wandb.started
    assert (second["id"], second["resume"]) == (first["id"], None)
    assert [[step for step, _ in logged] for logged in wandb.logged] == [[10], [10, 20, 20, 30]]
    assert wandb.logged[1][0] == wandb.logged[0][0]
    name = f"offline-run-2-{first['id']}"
    assert os.listdir(tmp_path / "outputs" / "wandb") == [name]
    assert os.listdir(run.files_of(cfg).folder / "superseded") == [f"offline-run-1-{first['id']}"]
    folder = os.path.relpath(tmp_path / "outputs" / "wandb" / name)
    last = f"W&B offline, to send it: wandb sync {folder}"
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" | {last}")
    assert run.train(cfg) == finished  # complete
    assert capsys.readouterr().out.splitlines()[-1].endswith(f" | {last}")


def test_what_wandb_holds_is_told(tmp_path):
    assert logger.whereabouts(tmp_path, None) == "W&B off"
    assert logger.whereabouts(tmp_path, "a", "https://wandb.ai/a") == "W&B https://wandb.ai/a"
    assert logger.whereabouts(tmp_path, "a") == "W&B offline, its folder is gone"
    for time in ("20260102_0000", "20260101_0000"):
        (tmp_path / "wandb" / f"offline-run-{time}-a").mkdir(parents=True)
    folder = tmp_path / "wandb" / "offline-run-20260102_0000-a"
    assert logger.whereabouts(tmp_path, "a").endswith(f"wandb sync {os.path.relpath(folder)}")
    (folder / "run-a.wandb.synced").touch()
    assert logger.whereabouts(tmp_path, "a") == "W&B offline, sent since"


def test_a_full_disk_names_the_log(tmp_path):
    log = logger.create(config(tmp_path), "a", tmp_path / "log.jsonl")
    with pytest.raises(WriteError, match=r"log.jsonl could not be written: File too large"), files_up_to(100):
        for step in range(10):
            log.log(step, {"loss": 1.0})
    log.finish("failed", {})  # nothing is left to be written, which would fail again


def test_wandb_offline_for_real(tmp_path, capfd):
    cfg = config(tmp_path, "recipe.epochs=2", "logger=wandb", "logger.mode=offline")
    with interrupt(5, KeyError("power cut")), pytest.raises(KeyError):
        run.train(cfg)
    (before,) = (tmp_path / "outputs" / "wandb").glob("offline-run-*")
    capfd.readouterr()
    finished = run.train(cfg)
    captured = capfd.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 3
    (after,) = (tmp_path / "outputs" / "wandb").glob("offline-run-*/*.wandb")
    assert captured.out.endswith(f" | W&B offline, to send it: wandb sync {os.path.relpath(after.parent)}\n")
    assert after.parent.name.partition("resnet20")[2] == before.name.partition("resnet20")[2]  # the same id
    for row in finished["history"]:  # numbers are text in W&B's file
        assert str(row["test_loss"]).encode() in after.read_bytes()
