"""scripts/bench_kernels.py and its page, on the tiny profile: what is measured, refused, survived and continued."""

import dataclasses
import os
import re
import subprocess
import sys

import pytest
import torch

import bench_kernels
from actpress.bench import kernel_rows, kernels
from actpress.kernels.common import launch
from actpress.kernels.masks.cases import cases as mask_cases
from actpress.kernels.proof import registry, verify
from actpress.train import files
from actpress.train.errors import InputError
from devices import INTERPRETED
from paths import ROOT

interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off: TRITON_INTERPRET is not 1")
RELU = next(case for case in mask_cases() if case.name == "relu")


def right(x, config):
    return x.relu()


def inputs(dtype, device):
    return (torch.randn(64, dtype=dtype, device=device),)


def made(name="made", kernel=right, **changes):
    """A case in plain PyTorch: 64 elements, one configuration."""
    case = launch.Case(name, inputs, kernel, torch.relu, moved, moved, ({"num_warps": 4},), tiny=inputs)
    return dataclasses.replace(case, **changes)


def moved(x):
    return 2 * launch.nbytes(x)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(*cases, options) -> (exit code, rows): the script's main with these cases alone, where nothing is compiled."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(kernels.provenance, "commit", lambda: {"commit": "some commit", "dirty": False})

    def run(*cases, options=()):
        monkeypatch.setattr(registry, "all_cases", lambda: {case.name: case for case in cases})
        code = bench_kernels.main(["--profile=tiny", f"--out={tmp_path}", *options])
        return code, kernel_rows.read(tmp_path / "triton-interpreter-cpu.csv")

    return run


def only(rows, **values):
    """The one row with these values."""
    (row,) = [row for row in rows if all(row[key] == value for key, value in values.items())]
    return row


@interpreted
def test_tiny_profile_end_to_end(bench, tmp_path, capsys):
    code, rows = bench(RELU, options=["--dtypes=float32,bfloat16"])
    assert code == 0 and capsys.readouterr().out.endswith("complete\n")
    assert {row["device"] for row in rows} == {"Triton interpreter, CPU"}
    assert only(rows, dtype="bfloat16")["status"].startswith("skipped: the interpreter")
    rows = [row for row in rows if row["dtype"] == "float32"]
    kernels = [row["config"] for row in rows if row["what"] == "kernel"]
    assert kernels == [registry.describe(RELU, config) for config in RELU.configs] and kernels[0].startswith("default")
    assert [row["what"] for row in rows if row["what"] != "kernel"] == ["copy", "stock", "reference", "compiled"]
    for row in rows:
        assert row["status"] == "ok" and float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
    page = (tmp_path / "triton-interpreter-cpu.md").read_text()
    assert "they say nothing about speed" in page and "| relu | float32 | 1 |" in page
    assert (tmp_path / "triton-interpreter-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_of_a_row(bench, monkeypatch):
    """10 single runs of 1 .. 10 ms; the copy takes twice, stock four times as long."""
    slower = {"copy": 2, "stock": 4}
    times = {}

    def contestants(*arguments):
        for what, config, prepare in original(*arguments):
            times[prepare] = [float(i * slower.get(what, 1)) for i in range(1, 11)]
            yield what, config, lambda prepare=prepare: prepare

    original = kernels.contestants
    monkeypatch.setattr(kernels, "contestants", contestants)
    monkeypatch.setattr(kernels, "timings", lambda function, device: times[function])
    case = made(stock=torch.relu, flops=lambda x: 11_000_000, floor=lambda x: 2**20, moved=lambda x: 2**21)
    _, rows = bench(case, options=["--dtypes=float32"])
    kernel = only(rows, what="kernel")
    assert (kernel["n"], kernel["p20_ms"], kernel["p50_ms"], kernel["p80_ms"]) == ("10", "2.8", "5.5", "8.2")
    assert float(kernel["gib_per_s"]) == pytest.approx(2**-10 / 5.5e-3, rel=1e-4)
    assert float(kernel["moved_gib_per_s"]) == pytest.approx(2**-9 / 5.5e-3, rel=1e-4)
    assert (kernel["fraction_of_copy"], kernel["speedup_over_stock"], kernel["tflops"]) == ("2", "4", "0.002")
    assert (only(rows, what="stock")["fraction_of_copy"], only(rows, what="copy")["tflops"]) == ("0.5", "")


def overflowing(x, config):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")


def crashing(x, config):
    raise TypeError("a bug\nover two lines")


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("kernel", "status"),
    [
        pytest.param(lambda x, config: x.relu() * (1 + 2**-20), "red: tensor 0: ", id="wrong by a bit"),
        pytest.param(lambda x, config: torch.empty_like(x), "red: tensor 0: 64 of 64 elements differ", id="unwritten"),
        pytest.param(lambda x, config: x.relu()[:63], "red: tensor 0: torch.float32 [63]", id="wrong shape"),
        pytest.param(lambda x, config: (x.relu(), x), "red: 3 tensors instead of 2", id="one output too many"),
        pytest.param(lambda x, config: x.relu_().clone(), "red: tensor 1: ", id="changes its input"),
        pytest.param(crashing, "failed: TypeError: a bug over two lines", id="crashing"),
    ],
)
def test_no_time_for_a_wrong_kernel(bench, tmp_path, capsys, kernel, status):
    code, rows = bench(made("wrong", kernel), made("right"), options=["--dtypes=float32"])
    assert code == 1
    row = only(rows, case="wrong", what="kernel")
    assert row["status"].startswith(status)
    assert (row["p50_ms"], row["gib_per_s"], row["fraction_of_copy"]) == ("", "", "")
    assert only(rows, case="right", what="kernel")["status"] == "ok"
    assert "NOT RIGHT: wrong float32 kernel" in capsys.readouterr().out
    page = (tmp_path / "triton-interpreter-cpu.md").read_text()
    assert f"| wrong | float32 | kernel default num_warps=4 | {status}" in page
    assert bench(made("wrong", kernel), made("right"), options=["--dtypes=float32"])[0] == 1, "known, and still wrong"
    assert bench(made("wrong", kernel), made("right"), options=["--dtypes=float32", "--cases=right"])[0] == 0


def test_each_configuration_is_verified(bench):
    kernel = lambda x, config: x.relu() + (config["num_warps"] == 8)  # noqa: E731
    code, rows = bench(made(kernel=kernel, configs=({"num_warps": 4}, {"num_warps": 8})), options=["--dtypes=float32"])
    assert code == 1
    assert only(rows, config="default num_warps=4")["status"] == "ok"
    assert only(rows, config="num_warps=8")["status"].startswith("red")


def test_functions_that_change_their_input_do_not_meet_each_other(bench):
    """Doubling in place: a second contestant on the same tensor would be wrong."""
    case = made(kernel=lambda x, config: x.mul_(2), reference=lambda x: x.mul_(2), stock=lambda x: x.mul_(2))
    case = dataclasses.replace(case, configs=({"num_warps": 4}, {"num_warps": 8}))
    code, rows = bench(case, options=["--dtypes=float32"])
    assert code == 0 and {row["status"] for row in rows} == {"ok"}


def test_tolerance_is_that_of_the_case(bench):
    kernel = lambda x, config: x.relu() * (1 + 1e-3)  # noqa: E731
    assert bench(made("near", kernel, tolerance=1e-2), options=["--dtypes=float32"])[0] == 0
    code, rows = bench(made("far", kernel, tolerance=1e-4), options=["--dtypes=float32"])
    assert code == 1 and "relative error 1.00e-03, allowed 1e-04" in only(rows, what="kernel")["status"]


@pytest.mark.quick(1)
@pytest.mark.parametrize("part", ["kernel", "make", "reference", "stock"])
def test_out_of_memory_costs_one_case(bench, part):
    fails = {
        "make": {"tiny": lambda *_: overflowing(None, None)},
        "reference": {"reference": lambda x: overflowing(x, None)},
    }
    fails |= {"kernel": {"kernel": overflowing}, "stock": {"stock": lambda x: overflowing(x, None)}}
    code, rows = bench(made("large", **fails[part]), made("small"), options=["--dtypes=float32"])
    assert code == 0
    assert only(rows, case="large", what="stock" if part == "stock" else "kernel")["status"] == "oom"
    assert only(rows, case="small", what="kernel")["status"] == "ok"


@pytest.mark.slow
def test_a_second_call_goes_on(bench, monkeypatch, capsys):
    calls = []

    def counted(dtype, device):
        calls.append(dtype)
        return inputs(dtype, device)

    case = made(tiny=counted)
    before = bench(case)[1]
    assert calls == [torch.float32, torch.float16]
    assert bench(case)[1] == before and len(calls) == 2
    bench(case, options=["--fresh", "--dtypes=float16"])
    assert len(calls) == 3
    monkeypatch.setattr(kernels.provenance, "commit", lambda: {"commit": "some commit", "dirty": True})
    after = bench(case, made("new"), options=["--cases=made", "--dtypes=float32"])[1]
    assert len(calls) == 4
    assert {row["commit"] for row in after if row["dtype"] == "float32"} == {"some commit changed"}
    assert {row["commit"] for row in after if row["dtype"] == "float16"} == {"some commit"}, "kept until measured again"
    assert {row["case"] for row in bench(made("new"))[1]} == {"new"}, "a case that is no more is dropped"


def test_the_budget_ends_between_cases(bench, tmp_path, capsys, monkeypatch):
    cases = [made(name) for name in ("one", "two", "three")]
    assert bench(*cases, options=["--budget=0", "--dtypes=float32"]) == (0, [])
    assert "3 of 3 left" in capsys.readouterr().out and list(tmp_path.iterdir()) == []
    clock = iter(range(0, 1000, 10))  # ten seconds between any two looks at it
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(clock))
    _, rows = bench(*cases, options=["--budget=45", "--dtypes=float32"])
    assert {row["case"] for row in rows} == {"one", "two"}
    assert "1 of 3 left; the same command resumes" in capsys.readouterr().out
    _, rows = bench(*cases, options=["--dtypes=float32"])
    assert {row["case"] for row in rows} == {"one", "two", "three"}
    assert capsys.readouterr().out.endswith("complete\n")


def test_cases_of_other_dtypes_are_always_measured(bench):
    flags = made("flags", lambda x, config: ~x, reference=torch.logical_not, dtypes=(torch.bool,))
    flags = dataclasses.replace(flags, tiny=lambda dtype, device: (torch.rand(64, device=device) < 0.5,))
    _, rows = bench(flags, made(), options=["--dtypes=float16"])
    assert {(row["case"], row["dtype"]) for row in rows} == {("flags", "bool"), ("made", "float16")}
    assert only(rows, case="flags", what="kernel")["status"] == "ok"


def test_a_case_without_a_tiny_size_is_named(bench):
    code, rows = bench(made(tiny=None), options=["--dtypes=float32"])
    assert code == 0 and only(rows)["status"] == "skipped: no tiny size"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--cases=zzz", "no case starts with zzz; there are: made"),
        ("--dtypes=fp32", "--dtypes fp32, allowed: float32, bfloat16, float16"),
        ("--profile=huge", "argument --profile: huge, allowed: full, tiny"),
        ("--budget=-1", "argument --budget: -1, allowed: numbers from 0"),
        ("--fresh=perhaps", "--fresh: ignored explicit argument 'perhaps'"),
        ("--speed=11", "argument '--speed=11', allowed: --help, --cases, --names"),
    ],
)
def test_bad_options_end_in_one_line(bench, option, message):
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        bench(made(), options=[option])
    assert "\n" not in str(caught.value)


@interpreted
def test_a_table_of_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "triton-interpreter-cpu.csv"
    path.write_text("case,speed\nrelu,very fast\n")
    with pytest.raises(InputError, match="move it away"):
        bench_kernels.main(["--profile=tiny", f"--out={tmp_path}"])
    assert path.read_text().endswith("very fast\n")


@pytest.mark.slow
@interpreted
def test_the_script_does_without_hydra_and_wandb(tmp_path):
    """Nothing is written into results/ by the tiny profile, and nothing of the harness is imported."""
    script = ROOT / "scripts" / "bench_kernels.py"
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys(("hydra", "omegaconf", "wandb", "timm", "torchvision")))  # None: importing it fails
sys.argv, sys.path[0] = sys.argv[1:], {str(script.parent)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    arguments = [script, "--profile=tiny", "--cases=relu_backward", "--dtypes=float32", f"--out={tmp_path}"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = kernel_rows.read(tmp_path / "triton-interpreter-cpu.csv")
    assert {row["what"]: row["status"] for row in rows} == dict.fromkeys(
        ("copy", "kernel", "reference", "compiled"), "ok"
    ) | {"stock": kernel_rows.NO_COUNTERPART}
    assert bench_kernels.FOLDERS["tiny"] == ROOT / "outputs" / "kernels"
    if not torch.cuda.is_available():
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (
            2,
            "error: --profile full needs a CUDA device; --profile tiny runs without one\n",
        )


@pytest.mark.gpu
def test_on_a_device(tmp_path):
    code = bench_kernels.main(["--cases=relu", "--dtypes=bfloat16", f"--out={tmp_path}"])
    (path,) = tmp_path.glob("*.csv")
    rows = kernel_rows.read(path)
    assert code == 0 and {row["status"] for row in rows} <= {"ok", kernel_rows.NO_COUNTERPART}
    assert path.stem == files.slug(torch.cuda.get_device_name())
    for row in rows:
        if row["status"] == "ok" and row["what"] == "kernel":
            assert int(row["n"]) > 1 and 0.1 < float(row["fraction_of_copy"]) < 1.5, "not the time of its bytes"


@pytest.mark.gpu
def test_poison_reaches_the_device():
    with verify.poisoned():
        assert torch.empty(1000, device="cuda").isnan().all()


def test_names_are_measured_in_their_order_and_what_is_not_asked_for_is_left_out(bench):
    cases = [made("one", configs=({"num_warps": 4}, {"num_warps": 8})), made("two"), made("two_more")]
    options = ["--names=two,one", "--dtypes=float32", "--what=kernel,stock", "--configs=default"]
    _, rows = bench(*cases, options=options)
    assert {row["case"] for row in rows} == {"two", "one"}
    assert {row["what"] for row in rows} == {"copy", "kernel", "stock"}
    assert len([row for row in rows if row["what"] == "kernel"]) == 2
    for option, message in (
        ("--names=tw", "--names tw, allowed: one, two"),
        ("--what=all", "--what all, allowed: kernel, stock, reference, compiled"),
        ("--configs=2", "argument --configs: 2, allowed: all, default"),
    ):
        with pytest.raises(InputError, match=message):
            bench(*cases, options=[option])
