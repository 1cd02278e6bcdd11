"""Training steps measured side by side, and the search for the largest batch."""

import json
from dataclasses import replace

import pytest
import torch

from actpress.bench import steps
from actpress.train.errors import InputError
from paths import ROOT

SMALL = steps.Setting("resnet20", 2, 16, 10, "fp32", channels_last=False, device="cpu", steps=4)


def test_every_method_gets_a_row_beside_stock():
    written = []
    wanted = ["none", "division", "pruning", "checkpoint", steps.AGAIN]
    rows = steps.measure_all(SMALL, wanted, ROOT / "configs", lambda rows: written.append(len(rows)))
    by_name = {row["method"]: row for row in rows}
    assert written == [1, 2, 3, 4, 5]
    assert {name: row["status"] for name, row in by_name.items()} == {
        **dict.fromkeys(("none", "division", "checkpoint", steps.AGAIN), "ok"),
        "pruning": "not applicable",
    }
    assert by_name["pruning"]["message"].endswith("matches nothing in ResNet20")
    assert by_name["division"]["saved_bytes"] < by_name["none"]["saved_bytes"] / 5
    assert by_name["checkpoint"]["peak_bytes"] < by_name["none"]["peak_bytes"]
    assert by_name["none"]["step_ms"]["median"] > 0 and by_name["none"]["host_ms"] is None  # on a CPU both are one
    assert by_name["none"]["peak_bytes"] == by_name[steps.AGAIN]["peak_bytes"]


@pytest.mark.slow
def test_a_method_that_compiles_is_measured_and_not_predicted():
    row = steps.measure(SMALL, "compile_budget", ROOT / "configs")
    assert row["status"] == "ok" and row["first_step_seconds"] > 0 and row["saved_bytes"] > 0
    row = steps.measure(replace(SMALL, predict=True), "compile_budget", ROOT / "configs")
    assert row["status"] == "not applicable" and row["message"].startswith("CompileBudget compiles the model")


@pytest.mark.slow
def test_prediction_and_measurement_of_saved_bytes_agree():
    for method in ("none", "division"):
        measured = steps.measure(SMALL, method, ROOT / "configs")
        predicted = steps.measure(replace(SMALL, predict=True), method, ROOT / "configs")
        assert predicted["status"] == "predicted" and "images_per_s" not in predicted
        assert predicted["predicted_bytes"] == measured["saved_bytes"] > 0


def test_running_out_of_memory_is_a_result():
    row = steps.measure(replace(SMALL, memory=1000), "none", ROOT / "configs")
    assert row["status"] == "oom" and "allowed here: 1000" in row["message"]


def test_a_method_that_fails_costs_its_own_row_alone(monkeypatch):
    original = steps._train_steps

    def run_or_fail(setting, cfg, *rest):
        if "Division" in cfg.method["_target_"]:
            raise RuntimeError("kernel not right")
        return original(setting, cfg, *rest)

    monkeypatch.setattr(steps, "_train_steps", run_or_fail)
    rows = steps.measure_all(SMALL, ["none", "division", "pooling"], ROOT / "configs", lambda rows: None)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    monkeypatch.setattr(steps, "LOST", ("kernel not right",))  # a device that is lost ends the session
    rows = steps.measure_all(SMALL, ["none", "division", "pooling"], ROOT / "configs", lambda rows: None)
    assert [row["status"] for row in rows] == ["ok", "failed"]


def test_tf32_is_what_the_setting_says_and_only_for_its_time():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    for precision, expected in (("tf32", ("high", True)), ("fp32", ("highest", False)), ("bf16", before)):
        with pytest.raises(ZeroDivisionError), steps.precision_of_products(precision):
            assert state() == expected
            raise ZeroDivisionError
        assert state() == before


def test_bench_training_goes_on_where_its_file_ends(script, tmp_path, capsys, monkeypatch):
    bench_training = script("bench_training")

    def row(setting, name, configs):
        return {"method": name, "batch": setting.batch, "status": "ok", "message": None}

    monkeypatch.setattr(steps, "measure", row)
    path = tmp_path / "out.json"
    given = ["--model=resnet20", "--device=cpu", "--steps=4", f"--out={path}"]

    def methods():
        return [[row["method"] for row in session["rows"]] for session in json.loads(path.read_text())["sessions"]]

    assert bench_training.main([*given, "--methods=none,division"]) == 0
    assert bench_training.main([*given, "--methods=none,division,pooling"]) == 0
    assert methods() == [["none", "division", "none again"], ["none", "pooling", "none again"]]
    assert capsys.readouterr().out.strip().endswith("3 of 3 rows measured, 3 were there")
    assert bench_training.main([*given, "--methods=none,division,pooling"]) == 0
    assert len(methods()) == 2
    for argument, message in (
        ("--batch=8", "holds another setting"),
        ("--methods=nosuch", "method 'nosuch'"),
        ("--model=nosuch", "model=nosuch"),
        ("--steps=1", "steps=1"),
        ("--precision=fp8", "precision=fp8, allowed: fp32"),
        ("--largest", "memory=0"),
        ("--batch=many", "argument --batch: many, allowed: whole numbers from 0"),
        ("--batch=0", "batch=0, allowed: whole numbers from 1"),
        ("--step=0", "argument --step: 0, allowed: whole numbers from 1"),
    ):
        with pytest.raises(InputError, match=message):
            bench_training.main([*given, argument])


def searched(true: int, step: int, fixed: float = 1e9, each: float = 1e8, share: float = 1.0):
    """Rows of a search on a device that holds `true` images at `share` of the memory that peaks tell."""
    capacity, rows = int((fixed + true * each) / share), []
    while (batch := steps.next_batch(rows, 64, step, capacity)) is not None:
        assert batch >= 1 and batch not in [row["batch"] for row in rows]
        rows.append({"batch": batch, "status": "ok" if batch <= true else "oom", "peak_bytes": fixed + batch * each})
    return rows


@pytest.mark.parametrize("true", [0, 1, 7, 63, 64, 197, 1021, 30011])
@pytest.mark.parametrize("share", [0.7, 0.95, 1.0, 1.3])
@pytest.mark.parametrize("step", [1, 8])
def test_the_search_ends_near_the_largest_batch_that_fits(true, share, step):
    rows = searched(true, step, share=share)
    fits = max((row["batch"] for row in rows if row["status"] == "ok"), default=0)
    fails = min(row["batch"] for row in rows if row["status"] == "oom")
    assert fits <= true < fails
    assert fails - fits <= max(step, fits / 32)
    assert len(rows) <= 18 and len(searched(1000, 8)) <= 5


def test_each_probe_is_kept_and_the_search_goes_on_from_its_file(script, tmp_path, monkeypatch):
    asked = []

    def probe(setting, method, configs):
        asked.append(setting.batch)
        if len(asked) == 3:
            raise KeyboardInterrupt
        status = "ok" if setting.batch <= 100 else "oom"
        row = {"method": method, "batch": setting.batch, "status": status, "message": None}
        return row | {"peak_bytes": setting.batch}

    monkeypatch.setattr(steps, "measure", probe)
    bench_training, path = script("bench_training"), tmp_path / "out.json"
    given = ["--model=resnet20", "--device=cpu", "--memory=100", "--largest", "--methods=none", f"--out={path}"]
    with pytest.raises(KeyboardInterrupt):
        bench_training.main(given)
    assert bench_training.main(given) == 0
    assert asked[0] == 64 and asked[3] == asked[2]  # the interrupted probe is made again, no other
    sessions = json.loads(path.read_text())["sessions"]
    assert [len(session["rows"]) for session in sessions] == [2, len(asked) - 3]
