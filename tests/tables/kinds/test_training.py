"""Tables of training runs: their records, and how a missing one is trained."""

import subprocess
from dataclasses import replace

import pytest

import small_tables
from actpress.tables import kinds
from actpress.tables.kinds import training
from actpress.train import record


@pytest.fixture
def project(tmp_path):
    return small_tables.create(tmp_path)


def test_a_row_is_found_by_its_run_and_a_run_that_did_not_end_well_gives_a_word(project):
    project.write("training")
    project.write_runs(90.0)
    kind, (first, second, *_) = kinds.get("training"), project.measurements("training")
    assert kind.find(second).values["top1_last"] == 91.0
    assert kind.seconds(first) == 35.0
    path = project.results.root / "runs" / f"{record.run_id(first.config)}.json"
    record.write(path, record.read(path) | {"status": "diverged"})
    assert kind.find(first).values["top1_last"] == "DIVERGED"
    record.write(path, record.read(path) | {"status": "failed"})
    assert kind.find(first) is None


def test_training_anew_leaves_records_of_elsewhere_alone(project, monkeypatch):
    project.write("training", **{"seeds: [0, 1]": "seeds: [0]\nreuse: here"})
    commands = []
    monkeypatch.setattr(
        training.subprocess,
        "run",
        lambda command, **_: commands.append(command) or subprocess.CompletedProcess([], 1),
    )
    first = replace(project.measurements("training")[0], folder=project.local)
    with pytest.raises(ValueError, match=r"training resnet20-digits-stock-s0-.* failed with exit code 1"):
        kinds.get("training").measure(first)
    assert commands[0][-4:] == ["seed=0", "logger=none", "resume=false", "paths.records=outputs/reproduced/runs"]


def test_time_to_accuracy_is_that_of_the_first_epoch_that_reaches_it():
    history = [
        {"epoch": epoch, "train_seconds": 10.0, "test_accuracy": accuracy}
        for epoch, accuracy in ((1, 40.0), (2, 52.0), (3, 49.0))
    ]
    assert training.time_to(history, 50) == {"epochs_to_reach": 2, "seconds_to_reach": 20.0}
    assert training.time_to(history, 60)["epochs_to_reach"] == "not reached"
