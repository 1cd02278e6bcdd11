"""Records: names of runs, and their JSON files."""

import functools
import json
import os
import re

import pytest

from actpress.train import cli, files, record
from paths import CONFIGS


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
