"""Training steps measured side by side, the search for the largest batch, and the arguments of scripts."""

import importlib
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actpress import arguments, limits, measure, source, workload
from actpress.run import InputError

ROOT = Path(__file__).resolve().parents[1]
SMALL = workload.Setting("resnet20", 2, 16, 10, "fp32", channels_last=False, device="cpu", steps=4)


@pytest.fixture
def script(monkeypatch):
    """A module of scripts/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def test_every_method_gets_a_row_beside_stock():
    written = []
    wanted = ["none", "division", "pruning", "checkpointing", "compile budget 0.5", workload.AGAIN]
    rows = workload.session(SMALL, wanted, ROOT / "configs", lambda rows: written.append(len(rows)))
    by_name = {row["method"]: row for row in rows}
    assert written == [1, 2, 3, 4, 5, 6]
    assert {name: row["status"] for name, row in by_name.items()} == {
        **dict.fromkeys(("none", "division", "checkpointing", workload.AGAIN), "ok"),
        **dict.fromkeys(("pruning", "compile budget 0.5"), "not applicable"),
    }
    assert by_name["pruning"]["message"].endswith("matches nothing in ResNet20")
    assert by_name["division"]["saved_bytes"] < by_name["none"]["saved_bytes"] / 5
    assert by_name["checkpointing"]["peak_bytes"] < by_name["none"]["peak_bytes"]
    assert by_name["none"]["images_per_s"]["median"] > 0
    assert by_name["none"]["peak_bytes"] == by_name[workload.AGAIN]["peak_bytes"]


def test_prediction_and_measurement_of_saved_bytes_agree():
    for method in ("none", "division"):
        row = workload.measure(replace(SMALL, predict=True), method, ROOT / "configs")
        assert row["predicted_saved_bytes"] == row["saved_bytes"] > 0


def test_running_out_of_memory_is_a_result():
    row = workload.measure(replace(SMALL, memory=1000), "none", ROOT / "configs")
    assert row["status"] == "oom" and "allowed here: 1000" in row["message"]
    assert measure.ran_out(RuntimeError("CUDNN_STATUS_ALLOC_FAILED")) and not measure.ran_out(RuntimeError("shapes"))


def test_a_method_that_fails_costs_its_own_row_alone(monkeypatch):
    original = workload._run

    def run_or_fail(setting, cfg, *rest):
        if "Division" in cfg.method["_target_"]:
            raise RuntimeError("kernel not right")
        return original(setting, cfg, *rest)

    monkeypatch.setattr(workload, "_run", run_or_fail)
    rows = workload.session(SMALL, ["none", "division", "pooling"], ROOT / "configs", lambda rows: None)
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    monkeypatch.setattr(workload, "BROKEN", ("kernel not right",))  # a device that is lost ends the session
    rows = workload.session(SMALL, ["none", "division", "pooling"], ROOT / "configs", lambda rows: None)
    assert [row["status"] for row in rows] == ["ok", "failed"]


def test_tf32_is_what_the_setting_says_and_only_for_its_time():
    def state():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = state()
    for precision, expected in (("tf32", ("high", True)), ("fp32", ("highest", False)), ("bf16", before)):
        with pytest.raises(ZeroDivisionError), workload.precision_of_products(precision):
            assert state() == expected
            raise ZeroDivisionError
        assert state() == before


def test_bench_training_goes_on_where_its_file_ends(script, tmp_path, capsys, monkeypatch):
    bench_training = script("bench_training")
    monkeypatch.setattr(workload, "measure", lambda setting, name, configs: {"status": "ok", "message": None})
    path = tmp_path / "out.json"
    given = ["model=resnet20", "device=cpu", "steps=4", f"out={path}"]

    def methods():
        return [[row["method"] for row in session["rows"]] for session in json.loads(path.read_text())["sessions"]]

    assert bench_training.main([*given, "methods=none,division"]) == 0
    assert bench_training.main([*given, "methods=none,division,pooling"]) == 0
    assert methods() == [["none", "division", "none again"], ["none", "pooling", "none again"]]
    assert capsys.readouterr().out.strip().endswith("3 rows measured, 3 were there, complete")
    assert bench_training.main([*given, "methods=none,division,pooling"]) == 0
    assert len(methods()) == 2
    monkeypatch.setattr(source, "source_id", lambda root: "another")
    assert bench_training.main([*given, "methods=division", "stock=false"]) == 0
    assert methods()[2] == ["division"]
    with pytest.raises(InputError, match="holds another setting"):
        bench_training.main([*given, "batch=8"])
    for argument, message in (
        ("methods=nosuch", "method 'nosuch'"),
        ("model=nosuch", "model=nosuch"),
        ("steps=1", "steps=1"),
    ):
        with pytest.raises(InputError, match=message):
            bench_training.main(["device=cpu", argument])


# the largest batch


def searched(true: int, start: int, step: int, highest: int, fixed: float = 1e9, each: float = 1e8, share: float = 1.0):
    """Probes of a search on a device that holds `true` images at `share` of the memory that peaks tell."""
    capacity, probes = int((fixed + true * each) / share), []
    while (batch := limits.next_batch(probes, start, step, highest, capacity)) is not None:
        assert batch not in [probe.batch for probe in probes], "probed twice"
        assert 1 <= batch <= highest
        probes.append(limits.Probe(batch, batch <= true, int(fixed + batch * each) if batch <= true else None))
    return probes


@pytest.mark.parametrize("true", [0, 1, 7, 63, 64, 197, 1021, 30011])
@pytest.mark.parametrize("share", [0.7, 0.95, 1.0, 1.3])
@pytest.mark.parametrize("step", [1, 8])
def test_the_search_ends_near_the_largest_batch_that_fits(true, share, step):
    probes = searched(true, start=64, step=step, highest=2**20, share=share)
    fits, fails = limits.bounds(probes)
    assert fits <= true < fails
    assert fails - fits <= max(step, fits / 32)
    assert len(probes) <= 16


def test_a_good_extrapolation_takes_few_probes():
    assert len(searched(1000, start=64, step=8, highest=2**16)) <= 5


def test_the_search_stops_at_the_highest_batch():
    assert limits.bounds(searched(10**6, start=64, step=8, highest=200)) == (200, None)


def test_an_interrupted_search_goes_on_where_it_was():
    probes = searched(777, start=64, step=8, highest=2**16)
    random.Random(0).shuffle(shuffled := probes[:3])
    assert limits.next_batch(shuffled, 64, 8, 2**16, int(1e9 + 777e8)) == probes[3].batch


def test_each_probe_of_the_largest_batch_is_kept(script, tmp_path, monkeypatch, capsys):
    """The search goes on from its file; a larger device is not pretended to be this one."""
    largest_batch = script("largest_batch")
    asked = []

    def probe(setting, method, batch):
        asked.append(batch)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {
            "batch": batch,
            "status": "ok" if batch <= 100 else "oom",
            "message": None,
            "peak_bytes": batch,
            "seconds": 1,
        }

    monkeypatch.setattr(largest_batch, "probe", probe)
    given = ["model=resnet20", "device=cpu", "memory=100", "start=64", f"out={tmp_path / 'out.json'}"]
    with pytest.raises(KeyboardInterrupt):
        largest_batch.main(given)
    assert largest_batch.main(given) == 0
    assert asked[0] == 64 and asked[3] == asked[2]  # the interrupted probe is made again, no other
    assert "batch 96 fits, 104 does not" in capsys.readouterr().out
    sessions = json.loads((tmp_path / "out.json").read_text())["sessions"]
    assert [len(session["probes"]) for session in sessions] == [2, len(asked) - 3]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("method=nosuch", "method=nosuch, allowed: none"),
        ("precision=fp8", "precision=fp8, allowed: fp32"),
        ("step=0", "step=0"),
    ],
)
def test_largest_batch_refuses(script, argument, message):
    with pytest.raises(InputError, match=message):
        script("largest_batch").main(["device=cpu", "memory=1", argument])


def test_a_cpu_has_no_largest_batch_of_its_own(script):
    with pytest.raises(InputError, match="memory=0, but a CPU"):
        script("largest_batch").main(["device=cpu"])


# arguments


def test_arguments_take_the_type_of_their_default():
    defaults = {"batch": 64, "share": 0.5, "compile": False, "methods": (), "out": None}
    given = ["batch=8", "compile=true", "methods=none, some", "out=x=y", "share=1"]
    expected = {"batch": 8, "share": 1.0, "compile": True, "methods": ("none", "some"), "out": "x=y"}
    assert arguments.read(given, defaults) == expected


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("batches=8", "argument 'batches=8', allowed: batch=..., compile=..."),
        ("batch", "argument 'batch', allowed"),
        ("batch=many", "batch=many, allowed: whole numbers from 0"),
        ("batch=-1", "batch=-1, allowed: numbers from 0"),
        ("compile=maybe", "compile=maybe, allowed: true, false"),
    ],
)
def test_a_wrong_argument_is_named(argument, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        arguments.read([argument], {"batch": 64, "compile": False})
