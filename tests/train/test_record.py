"""Records: names of runs, JSON files that are whole or not there, where a number was measured."""

import functools
import json
import os
import pickle
import re
import signal
import subprocess

import pytest
import torch

from actpress.train import cli, files, provenance, record, resume
from paths import CONFIGS
from training import files_up_to


@functools.cache
def name_of(*overrides: str) -> str:
    return record.run_id(cli.compose(list(overrides), CONFIGS))


def test_a_run_id_says_what_was_run():
    assert re.fullmatch(r"resnet20-digits-\w+-s0-[0-9a-f]{8}", name_of())
    assert name_of("method=division", "seed=3").startswith("resnet20-digits-division-s3-")


@pytest.mark.parametrize(
    "override",
    [
        "logger=none",
        "paths.outputs=elsewhere",
        "paths.records=elsewhere",
        "data.root=elsewhere",
        "resume=false",
        "name=mine",
        "tags=[a]",
        "runtime.workers=7",
        "runtime.threads=1",
        "runtime.progress=false",
    ],
)
def test_what_cannot_change_the_weights_does_not_change_the_run_id(override):
    assert name_of(override) == name_of()


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "recipe.optimizer.lr=0.07",
        "model.geometry=cifar",
        "data.train_size=64",
        "method=division",
        "runtime.precision=bf16",
        "runtime.device=cpu",
    ],
)
def test_what_can_change_the_weights_changes_the_run_id(override):
    assert name_of(override) != name_of()


def test_a_portable_config_holds_no_path_of_this_machine(tmp_path):
    cfg = cli.compose([f"data.root={tmp_path}", f"paths.outputs={tmp_path}"], CONFIGS)
    assert str(tmp_path) not in json.dumps(record.portable(cfg))
    assert record.portable(cfg)["recipe"]["batch_size"] == cfg.recipe.batch_size


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "new folder" / "run.json"
    written = {"run_id": "a", "metrics": {"top1_last": 93.25, "n": 3}, "history": [{"epoch": 1}], "url": None}
    record.write(path, written)
    assert record.read(path) == written
    assert os.listdir(path.parent) == ["run.json"]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    record.write(
        tmp_path / "run.json", {"loss": float("nan"), "all": [float("inf"), 1.0], "pair": (2.0, -float("inf"))}
    )
    assert record.read(tmp_path / "run.json") == {"loss": None, "all": [None, 1.0], "pair": [2.0, None]}


@pytest.mark.parametrize(
    "text", ["", '{"run_id": "a"', "[1, 2]", "\xff"], ids=["empty", "cut short", "a list", "no JSON"]
)
def test_a_record_that_is_none_is_named(tmp_path, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        record.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        ("{}", "run_id"),
        ('{"run_id": 3}', "run_id"),
        ('{"run_id": "a", "metrics": null}', "metrics"),
        ('{"run_id": "a", "metrics": {}}', "metrics.top1_last"),
    ],
)
def test_what_a_record_lacks_is_named(tmp_path, text, lacking):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(record.Unreadable, match=rf"run.json is damaged: it has no {lacking}; delete it and run again"):
        record.read(tmp_path / "run.json", {"run_id": str, "metrics": {"top1_last": object}})


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(ValueError, match="no record at"):
        record.read(tmp_path / "run.json")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    record.write(path, {"run_id": "old"})
    with pytest.raises(TypeError):
        record.write(path, {"run_id": object()})
    with pytest.raises(RuntimeError), files.atomic_write(path) as file:
        file.write(b"half of a rec")
        raise RuntimeError("stopped")
    assert record.read(path) == {"run_id": "old"}
    assert os.listdir(tmp_path) == ["run.json"]


@pytest.mark.parametrize("writer", ["record", "checkpoint", "many small writes"])
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, writer):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(files.WriteError) as caught, files_up_to(100_000):
        if writer == "record":
            record.write(path, {"history": ["x" * 100] * 2000})
        elif writer == "checkpoint":
            resume.save(path, {"model": torch.rand(100_000)})  # torch.save says: unexpected pos
        else:
            with files.atomic_write(path) as file:
                for _ in range(20_000):
                    file.write(b"a few bytes")
    assert str(caught.value) == f"{path} could not be written: File too large"
    assert isinstance(caught.value, OSError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_an_error_of_the_block_is_not_taken_for_one_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "file") as file:
        file.write(b"begun")
        (tmp_path / "missing").read_bytes()
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(files.WriteError, match=r"runs/a\.json could not be written: File exists"):
        record.write(tmp_path / "runs" / "a.json", {})


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    """The new bytes are in the temporary file, on their way to the disk, when SIGKILL comes."""
    path = tmp_path / "run.json"
    path.write_text('{"run_id": "old"}')
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        record.write(path, {"run_id": "new"})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert record.read(path) == {"run_id": "old"}
    record.write(path, {"run_id": "new"})
    assert os.listdir(tmp_path) == ["run.json"]


def test_the_environment_names_device_versions_and_commit():
    found = provenance.environment("cpu")
    assert found["device"]
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["cpu_threads"] == torch.get_num_threads()
    assert {"python", "torchvision", "timm", "triton", "date"} <= set(found)
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])


def test_a_changed_source_is_dirty_and_changed_results_are_not(tmp_path, monkeypatch):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True, capture_output=True)

    for name in ("src/provenance.py", "results/runs/a.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    git("init")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src/provenance.py"))
    assert provenance.commit() == {"commit": None, "dirty": None}
    git("add", ".")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit()["commit"])
    assert provenance.commit()["dirty"] is False
    (tmp_path / "results/runs/a.json").write_text("2")
    assert provenance.commit()["dirty"] is False
    (tmp_path / "src/new.py").write_text("2")
    assert provenance.commit()["dirty"] is True
