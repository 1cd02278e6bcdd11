"""The GPU battery without a GPU: units, budget and state on commands that do nothing, the command line, and the tiny profile."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from actpress import arguments, battery, battery_units, bundle, cli, workload
from actpress.battery import Battery, Unit
from actpress.run import InputError

ROOT = Path(__file__).resolve().parents[1]
HERE = {"device": "A device", "source": "a" * 40, "device_type": "cpu", "commit": None, "dirty": None, "torch": "1"}


@pytest.fixture
def script(monkeypatch):
    """A module of scripts/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


def says(text: str, code: int = 0) -> tuple[str, ...]:
    """A command that prints a text and exits with a code."""
    return (sys.executable, "-c", f"print({text!r}); raise SystemExit({code})")


def made(out: Path, *units: Unit, budget: float = 60.0, environment=HERE, **options) -> Battery:
    return Battery(units, out, environment, "full", ROOT, time.monotonic() + budget, **options)


def run(*args, **options) -> tuple[int, dict]:
    """(exit code, status of each unit) of a battery."""
    ours = made(*args, **options)
    code = ours.run(lambda: None)
    return code, {unit.name: (ours.entry(unit) or {"status": None})["status"] for unit in ours.units}


def test_a_failure_is_noted_and_does_not_stop_the_rest(tmp_path, capsys):
    units = [Unit("a/1", says("one")), Unit("a/2", says("why it broke", 1)), Unit("b/3", says("three"))]
    code, statuses = run(tmp_path, *units)
    assert (code, statuses) == (1, {"a/1": "done", "a/2": "failed", "b/3": "done"})
    state = json.loads((tmp_path / "state.json").read_text())
    (failed,) = [entry for entry in state["units"].values() if entry["unit"] == "a/2"]
    assert failed["tail"] == ["why it broke"] and failed["code"] == 1 and failed["attempts"] == 1
    assert (tmp_path / "logs" / "a-2.log").read_text() == "why it broke\n"
    assert "FAILED: a/2" in capsys.readouterr().out


def test_what_is_done_or_failed_is_not_repeated(tmp_path):
    count = tmp_path / "count"
    command = (sys.executable, "-c", f"open({str(count)!r}, 'a').write('x'); raise SystemExit(1)")
    unit = Unit("a", command)
    assert run(tmp_path, unit)[0] == run(tmp_path, unit)[0] == 1  # a failure stays one
    assert count.read_text() == "x"
    run(tmp_path, unit, retry=True)
    assert count.read_text() == "xx"
    other = {**HERE, "source": "b" * 40}
    run(tmp_path, unit, environment=other, any_source=True)
    assert count.read_text() == "xx"
    run(tmp_path, unit, environment=other)
    assert count.read_text() == "xxx"


def test_units_that_do_not_fit_are_not_started(tmp_path):
    units = [Unit("long", says(""), minimum=100), Unit("short", says("hello"), minimum=1)]
    code, statuses = run(tmp_path, *units, budget=60)
    assert (code, statuses) == (0, {"long": None, "short": "done"})


def test_no_budget_runs_nothing_but_packs(tmp_path):
    packed = []
    assert made(tmp_path, Unit("a", says("")), budget=0).run(lambda: packed.append(1)) == 0
    assert packed == [1] and not (tmp_path / "logs").exists()


def test_a_unit_is_stopped_with_all_its_processes_and_keeps_its_output(tmp_path, monkeypatch):
    """One that does not listen to an interruption, and what it has started."""
    monkeypatch.setattr(battery, "GRACE", 1.0)
    child = f"echo $$ > {tmp_path / 'pid'}; sleep 60"
    unit = Unit("a", ("sh", "-c", f"trap '' INT; echo begun; sh -c '{child}' & wait"), minimum=1, limit=2, resumes=True)
    assert run(tmp_path, unit) == (0, {"a": "stopped"})
    assert (tmp_path / "logs" / "a.log").read_text() == "begun\n"
    status = Path("/proc") / (tmp_path / "pid").read_text().strip() / "status"
    assert not status.exists() or "State:\tZ" in status.read_text()  # gone, or dead and not yet buried


def test_a_stopped_unit_hears_it_as_an_interruption(tmp_path):
    """Also where SIGINT is ignored, as by what a shell runs in the background."""
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert battery.run_for([sys.executable, "-c", code], 3, tmp_path / "log", ROOT, os.environ) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "log").read_text() == "saved\n"


def test_a_unit_without_resumption_that_had_all_its_time_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(battery, "GRACE", 1.0)
    sleeps = (sys.executable, "-c", "import time; time.sleep(60)")
    assert run(tmp_path, Unit("a", sleeps, minimum=0, limit=1))[1] == {"a": "failed"}


def test_a_stopped_unit_that_begins_again_waits_for_more_time(tmp_path, monkeypatch):
    monkeypatch.setattr(battery, "GRACE", 1.0)
    monkeypatch.setattr(battery, "RESERVE", 1.0)
    unit = Unit("a", (sys.executable, "-c", "import time; time.sleep(60)"), minimum=0, limit=100)
    assert run(tmp_path, unit, budget=3)[1] == {"a": "stopped"}
    assert made(tmp_path, unit).needs(unit) > 2
    assert run(tmp_path, unit, budget=2)[1] == {"a": "stopped"}
    assert next(iter(json.loads((tmp_path / "state.json").read_text())["units"].values()))["attempts"] == 1


def test_units_that_go_on_by_themselves_say_when_they_are_complete(tmp_path):
    says_left = Unit("a", says("table: 3 of 7 left"), announces=True)
    assert run(tmp_path, says_left) == (0, {"a": "stopped"})
    crashed = Unit("a", says("device lost", 1), announces=True)
    assert run(tmp_path, crashed) == (1, {"a": "failed"})
    assert not made(tmp_path, crashed).settled(crashed)  # the next call goes on after what crashed
    assert run(tmp_path, Unit("a", says("one wrong, complete", 1), announces=True)) == (1, {"a": "failed"})
    assert made(tmp_path, crashed).settled(crashed)


def test_units_wait_for_others_and_for_what_they_left(tmp_path):
    data = tmp_path / "data" / "train"
    first = Unit("data", (sys.executable, "-c", f"__import__('os').makedirs({str(data)!r})"), keeps=data, minimum=100)
    second = Unit("training", says("trained"), after="data")
    assert run(tmp_path, first, second, budget=60)[1] == {"data": None, "training": None}
    assert run(tmp_path, first, second, budget=200)[1] == {"data": "done", "training": "done"}
    shutil.rmtree(data)
    assert not made(tmp_path, first).settled(first)


def test_a_command_is_told_its_time(tmp_path):
    run(tmp_path, Unit("a", says(f"budget={battery.SECONDS}"), limit=30))
    assert (tmp_path / "logs" / "a.log").read_text() == "budget=20\n"


def test_an_interrupted_battery_leaves_an_archive(tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    packed = []
    monkeypatch.setattr(battery, "run_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, Unit("a", says(""))).run(lambda: packed.append(1))
    assert packed


def test_the_plan_tells_what_is_done_and_what_is_left(tmp_path):
    units = [Unit("a", says("all right"), writes=("units/a.json",)), Unit("b", says("")), Unit("c", skip="no images")]
    run(tmp_path, units[0])
    plan = made(tmp_path, *units).plan()
    assert plan[0] == "a: done: all right"
    assert plan[1].startswith("b: to do, from 10 to 300 s")
    assert plan[2] == "c: skipped: no images"
    assert plan[3] == "3 units, 1 to do, at least 10 s, at most 300 s"


def test_a_state_of_another_profile_is_not_continued(tmp_path):
    run(tmp_path, Unit("a", says("")))
    with pytest.raises(ValueError, match="is of profile full, format 1, not of tiny"):
        battery.read_state(tmp_path, "tiny")


def test_pytest_reports_become_counts(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2, 'one is two'\n@pytest.mark.skip\ndef test_not(): pass\n"
    )
    report = tmp_path / "report.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        f"--junitxml={report}",
        "test_some.py",
    ]
    unit = Unit("tests/some", tuple(command), junit=report)
    ours = Battery([unit], tmp_path / "out", HERE, "full", tmp_path, time.monotonic() + 100)
    assert ours.run(lambda: None) == 1
    found = json.loads((tmp_path / "out" / "units" / "tests-some.json").read_text())
    assert [found[key] for key in ("passed", "failures", "errors", "skipped")] == [1, 1, 0, 1]
    assert found["wrong"] == [{"test": "test_bad", "message": "AssertionError: one is two"}]
    report.write_text("<cut")
    assert battery.junit_summary(report) is None


def test_a_battery_goes_on_from_its_archive_on_another_machine(tmp_path):
    unit = Unit("a", says("done here"))
    ours = made(tmp_path / "one", unit)
    ours.run(lambda: bundle.pack(tmp_path / "one", HERE["device"]))
    bundle.restore(tmp_path / "one" / "battery-a-device.tar.gz", tmp_path / "two")
    assert made(tmp_path / "two", unit).settled(unit)


# the units of the profiles


def place(out: Path, **options) -> battery_units.Place:
    return battery_units.Place(ROOT, out, HERE["source"], options.pop("device", "auto"), **options)


def units_of(profile: str, out: Path, only=(), **options) -> list[Unit]:
    return battery_units.units(battery_units.load(ROOT, profile), place(out, **options), only)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(battery_units, "online", lambda: False)
    monkeypatch.setenv("ACTPRESS_DATA", str(tmp_path / "nothing"))


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> list[Unit]:
    """The units of the full profile on a machine without images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(battery_units, "online", lambda: False)
        patch.setenv("ACTPRESS_DATA", str(tmp_path_factory.getbasetemp() / "nothing"))
        return units_of("full", tmp_path_factory.getbasetemp())


def test_the_full_profile_has_every_stage_most_valuable_first(full):
    names = [unit.name for unit in full]
    assert len(set(names)) == len(names) == len({unit.file for unit in full})
    stages = list(dict.fromkeys(name.partition("/")[0] for name in names))
    assert stages == ["tests", "kernels", "memory", "throughput", "largest", "training", "tables"]
    for network in ("resnet50", "resmlp_s12", "vit_b"):
        modes = {f"throughput/{network}-{p}-{mode}-b128" for p in ("bf16", "tf32") for mode in ("eager", "compile")}
        assert modes <= set(names)
    assert all(unit.minimum < unit.limit and unit.minimum <= 525 for unit in full)  # startable within one call of 540 s
    assert {"tests/test_gpu", "tests/test_triton_masks"} <= set(names)


@pytest.mark.parametrize("profile", battery_units.profiles(ROOT))
def test_every_command_of_a_profile_is_one_its_script_takes(full, script, tmp_path, profile):
    takes = {
        "bench_training.py": script("bench_training").DEFAULTS | script("bench_training").OPTIONS,
        "largest_batch.py": script("largest_batch").DEFAULTS | script("largest_batch").OPTIONS,
    }
    options = script("bench_training").OPTIONS | script("largest_batch").OPTIONS
    for unit in full if profile == "full" else units_of("tiny", tmp_path, device="cpu"):
        name = Path(unit.command[1]).name if unit.command else None
        if name in takes:
            values = arguments.read(unit.command[2:], takes[name])
            workload.Setting(**{key: value for key, value in values.items() if key not in options})
            if name == "bench_training.py":
                script("bench_training").chosen(values["methods"], values["rivals"])
        elif name == "train.py":
            cfg = cli.compose(list(unit.command[2:]), ROOT / "configs")
            assert unit.facts["run_id"] == bundle.record.run_id(cfg)
            assert unit.writes == (f"runs/{unit.facts['run_id']}.json",)
        else:
            assert name in ("bench_kernels.py", "-m"), unit.command


def test_the_tiny_profile_has_the_stages_of_the_full_one(tmp_path):
    kinds = [[stage["kind"] for stage in battery_units.load(ROOT, name)["stages"]] for name in ("full", "tiny")]
    assert set(kinds[0]) - set(kinds[1]) == {"tables"}  # a row of a table is trained as any other


def test_training_runs_carry_the_names_the_tables_look_for(full):
    """The run of the battery is the run of results/tables/division_accuracy.md, where CIFAR-10 comes from the same place."""
    by_name = {unit.name: unit for unit in full}
    table = battery_units.tables.load(ROOT / "configs" / "tables", "division_accuracy")
    cell = next(
        c for c in table.cells if c.labels == {"data": "CIFAR-10", "network": "ResNet-18", "method": "DIVISION"}
    )
    cfg = cli.compose([*cell.overrides, "seed=0"], ROOT / "configs")
    assert by_name["training/division"].facts["run_id"] == bundle.record.run_id(cfg)
    assert by_name["training/division"].skip and not by_name["tables/division_throughput/ResNet-50-Normal-64"].skip
    assert "training/pruning" not in by_name  # ResNet-18 has nothing that it prunes


def test_only_chooses_units_by_their_names(offline, tmp_path):
    units = units_of("full", tmp_path, ("kernels", "tests/test_gpu"))
    assert {unit.name.partition("/")[0] for unit in units} == {"tests", "kernels"}
    with pytest.raises(ValueError, match="only=nosuch fits no unit; their names begin with tests, kernels, memory"):
        units_of("full", tmp_path, ("nosuch",))
    with pytest.raises(ValueError, match="profile=huge, allowed: full, tiny"):
        battery_units.load(ROOT, "huge")


def test_cifar_comes_from_an_archive_a_folder_or_nowhere(offline, tmp_path, monkeypatch):
    stage = {"needs": "cifar10"}
    assert "none can be downloaded" in battery_units.images(stage, place(tmp_path))[2]
    assert battery_units.images(stage, place(tmp_path), reachable=lambda: True) == ((), None, None)
    folder = tmp_path / "cifar"
    for split in ("train", "test"):
        (folder / split / "cat").mkdir(parents=True)
        (folder / split / "cat" / "1.jpg").write_text("a cat")
    monkeypatch.setenv("ACTPRESS_DATA", str(folder))
    overrides, unit, skip = battery_units.images(stage, place(tmp_path))
    assert overrides == ("data.source=folder", f"data.root='{folder}'") and unit is skip is None
    with tarfile.open(tmp_path / "c.tar.xz", "w:xz") as archive:
        archive.add(folder, "cifar10-jpeg")
    given = place(tmp_path / "out", cifar=tmp_path / "c.tar.xz")
    overrides, unit, skip = battery_units.images(stage, given)
    assert overrides[1] == f"data.root='{tmp_path / 'out' / 'data' / 'cifar10-jpeg'}'" and skip is None
    assert run(given.out, unit)[1] == {"data/cifar10": "done"}
    assert (given.out / "data" / "cifar10-jpeg" / "test" / "cat" / "1.jpg").read_text() == "a cat"
    training = units_of("full", given.out, ("training",), cifar=given.cifar)
    assert training[0].name == "data/cifar10" and {u.after for u in training[1:]} == {"data/cifar10"}


def test_an_archive_without_images_is_refused(offline, tmp_path):
    (tmp_path / "x.tar.xz").write_text("nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        battery_units.inside(tmp_path / "x.tar.xz")
    with tarfile.open(tmp_path / "y.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "x.tar.xz", "x")
    with pytest.raises(ValueError, match="holds no train/ or test/"):
        battery_units.inside(tmp_path / "y.tar.xz")


# the command


@pytest.fixture
def gpu_battery(script, monkeypatch):
    """The script, on a machine that it does not have to ask about itself."""
    module = script("gpu_battery")
    monkeypatch.setattr(module.source, "source_id", lambda root: HERE["source"])
    monkeypatch.setattr(module, "surroundings", lambda profile, options: dict(HERE))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    return module


def test_a_dry_run_prints_the_plan_and_writes_nothing(gpu_battery, offline, tmp_path, capsys):
    out = tmp_path / "out"
    assert gpu_battery.main(["dry=true", "budget=0", f"out={out}", "only=kernels,memory"]) == 0
    printed = capsys.readouterr().out
    assert "kernels/bfloat16: to do, from 60" in printed and "memory/vit_b-bf16-eager-b64: to do" in printed
    assert not out.exists()


def test_fresh_starts_over_and_resume_does_not_overwrite(gpu_battery, tmp_path):
    out = tmp_path / "out"
    given = ["profile=tiny", "budget=0", "only=tests", f"out={out}"]
    assert gpu_battery.main(given) == 0
    archive = tmp_path / "kept.tar.gz"
    shutil.copy(out / "battery-a-device.tar.gz", archive)
    (out / "state.json").write_text(json.dumps({"format": 1, "profile": "tiny", "units": {}}))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="has a state already"):
        gpu_battery.main([*given, f"resume={archive}"])
    assert gpu_battery.main([*given, "fresh=true"]) == 0
    assert (out / "notes.txt").exists() and not (out / "state.json").exists()


def test_devices_are_not_mixed_in_one_folder(gpu_battery, tmp_path, monkeypatch):
    given = ["profile=tiny", "budget=0", "only=tests", f"out={tmp_path}"]
    assert gpu_battery.main(given) == 0
    monkeypatch.setattr(gpu_battery, "surroundings", lambda profile, options: {**HERE, "device": "Another"})
    with pytest.raises(InputError, match="holds results of A device, this is Another; name another folder"):
        gpu_battery.main(given)


def test_what_is_left_counts_as_failure_where_all_is_asked_for(gpu_battery, tmp_path):
    given = ["profile=tiny", "budget=0", "only=tests", f"out={tmp_path}"]
    assert gpu_battery.main(given) == 0
    assert gpu_battery.main([*given, "all=true"]) == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("profile=huge", "profile=huge, allowed: full, tiny"),
        ("reuse=all", "reuse=all, allowed: here, any"),
        ("budget=soon", "budget=soon, allowed: numbers"),
        ("only=nosuch", "only=nosuch fits no unit"),
        ("speed=high", "argument 'speed=high', allowed: budget=..."),
    ],
)
def test_bad_input_ends_in_one_line(gpu_battery, offline, tmp_path, argument, message):
    with pytest.raises(InputError, match=message):
        gpu_battery.main([f"out={tmp_path}", "dry=true", argument])


WITHOUT_WANDB = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
sys.meta_path.insert(0, Missing())
"""


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_the_tiny_profile_runs_end_to_end_without_wandb(tmp_path):
    """All stages, on a CPU: tests and kernels in Triton's interpreter, measurements, training; then the import of what it packed."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_WANDB)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # each stage sets its own
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu_battery.py"),
        "profile=tiny",
        "budget=900",
        f"out={tmp_path / 'out'}",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 of 9 units left, none failed" in done.stdout
    (archive,) = (tmp_path / "out").glob("battery-*.tar.gz")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "import_results.py"),
        str(archive),
        f"results={tmp_path / 'results'}",
    ]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (page,) = (tmp_path / "results" / "battery").glob("*.md")
    for title in (
        "Tests on the device",
        "Memory of one training step",
        "Training throughput",
        "Largest batch",
        "Training runs",
    ):
        assert f"## {title}" in page.read_text()
    assert "Not finished" not in page.read_text()
    assert len(list((tmp_path / "results" / "runs").glob("*.json"))) == 2
