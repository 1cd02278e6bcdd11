"""The archive of a battery: what is in it, what is refused, and how it is added to results/."""

import importlib
import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import pytest

from actpress import battery, battery_page, bundle, source, workload
from actpress.run import InputError

ROOT = Path(__file__).resolve().parents[1]
HERE = {"device": "A device", "source": "a" * 40}
SMALL = workload.Setting("resnet20", 2, 16, 10, "fp32", channels_last=False, device="cpu", steps=4)


@pytest.fixture
def script(monkeypatch):
    """A module of scripts/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module


RUN = {"config": {"model": {"name": "net"}, "data": {"name": "noise"}, "method": {"_target_": "a.Stock"}, "seed": 0}}
METRICS = ("top1_last", "top1_best", "epochs", "train_images_per_s", "peak_bytes")


@pytest.fixture
def measured(tmp_path):
    """The folder of a battery that has measured something of everything; add(name, content) adds a file."""
    out = tmp_path / "out"
    environment = {
        **HERE,
        "torch": "2",
        "triton": "3",
        "python": "3.12",
        "date": "2026-01-02T03:04:05+00:00",
        "memory_bytes": 8,
    }
    row = {"message": None, "saved_bytes": 2**20, "peak_reserved_bytes": 2**23, "predicted_saved_bytes": 2**20}
    speed = {"median": 100.0, "iqr": 1.0, "n": 9, "warmup": 2}
    stock = {**row, "method": "none", "status": "ok", "images_per_s": speed, "peak_bytes": 2**22}
    half = {**row, "method": "half", "status": "ok", "images_per_s": {**speed, "median": 50.0}, "peak_bytes": 2**21}
    broken = {"method": "odd", "status": "failed", "message": "cannot read /somewhere/on/this/machine.txt"}
    setting = vars(SMALL)
    unit = {"setting": setting, "sessions": [{"environment": environment, "rows": [stock, half, broken]}]}
    probes = [{"batch": 64, "status": "ok", "peak_bytes": 1}, {"batch": 128, "status": "oom", "peak_bytes": None}]
    batches = {
        "setting": {**setting, "batch": None},
        "method": "none",
        "sessions": [{"environment": environment, "probes": probes}],
    }
    tests = {
        "environment": environment,
        "passed": 5,
        "tests": 6,
        "failures": 1,
        "errors": 0,
        "skipped": 0,
        "seconds": 1.5,
    }
    tests["wrong"] = [{"test": "test_bad", "message": "1 is not 2"}]
    run_id = "net-noise-stock-s0-" + bundle.record.run_id(bundle.OmegaConf.create(RUN["config"]))[-8:]
    metrics = {**dict.fromkeys(METRICS), "top1_last": 12.3, "top1_best": 45.6, "epochs": 2}
    about = {
        "run_id": run_id,
        "status": "ok",
        "environment": environment,
        "metrics": metrics,
        "data": {"label": "noise"},
    }
    entry = {
        "source": HERE["source"],
        "device": HERE["device"],
        "date": "2026-01-02",
        "seconds": 1,
        "attempts": 1,
        "code": 0,
    }
    entry |= {"status": "done", "message": "fine", "tail": [], "incomplete": False}
    names = {"tests/x": {}, "kernels/float32": {}, "training/none": {"run_id": run_id}}
    names["training/half"] = {"status": "stopped", "message": "its time was over: /on/this/machine"}
    state = {
        "format": battery.FORMAT,
        "profile": "full",
        "units": {n: {**entry, "unit": n, **more} for n, more in names.items()},
    }
    files = {
        "state.json": state,
        "environment.json": environment,
        "units/tests-x.json": tests,
        "units/memory-net.json": unit,
        "units/throughput-net.json": unit,
        "units/largest-net.json": batches,
        f"runs/{run_id}.json": {**RUN, **about},
        "kernels/a-device.csv": "case,dtype,what,config,ms,commit\nrelu,float32,kernel,default,1.5,\n",
        "logs/x.log": "printed\n",
    }

    class Out:
        path = out
        run = f"runs/{run_id}.json"

        @staticmethod
        def add(name, content):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(content if isinstance(content, str) else json.dumps(content))

        @staticmethod
        def change(name, change):
            content = json.loads((out / name).read_text())
            change(content)
            Out.add(name, content)

        @staticmethod
        def merge(results, **options):
            plan = bundle.merge(
                bundle.read(bundle.pack(out, HERE["device"])), results, options.pop("root", tmp_path), **options
            )
            if not plan.conflicts:
                plan.write()
            return plan

    for name, content in files.items():
        Out.add(name, content)
    return Out


def test_the_archive_holds_results_and_the_ends_of_logs(measured):
    measured.add("logs/long.log", "x" * 200_000 + "end")
    measured.add("training/run/last.pt", "weights")
    measured.add("units/x.xml", "a report")
    path = bundle.pack(measured.path, "NVIDIA H100 80GB HBM3")
    assert path.name == "battery-nvidia-h100-80gb-hbm3.tar.gz"
    members = bundle.read(path)
    assert {"state.json", "units/memory-net.json", measured.run, "kernels/a-device.csv", "logs/x.log"} < set(members)
    assert not {"training/run/last.pt", "units/x.xml", path.name} & set(members)
    assert len(members["logs/long.log"]) == bundle.TAILS[0] and members["logs/long.log"].endswith(b"end")


def test_logs_are_shortened_until_the_archive_is_small_enough(measured, monkeypatch):
    for i in range(3):
        measured.add(f"logs/{i}.log", random.Random(i).randbytes(60_000).hex())
    monkeypatch.setattr(bundle, "LARGEST", 20_000)
    members = bundle.read(bundle.pack(measured.path, "x"))
    assert {len(members[f"logs/{i}.log"]) for i in range(3)} == {bundle.TAILS[1]}
    monkeypatch.setattr(bundle, "LARGEST", 100)
    with pytest.raises(ValueError, match="allowed: up to 100"):
        bundle.pack(measured.path, "x")


def packed(path: Path, *members: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for member in members:
            member.size = 2 if member.isreg() else 0
            archive.addfile(member, io.BytesIO(b"{}") if member.isreg() else None)
    return path


@pytest.mark.parametrize(
    "name",
    ["../state.json", "/state.json", "runs/../../x.json", "units/a/b.json", "setup.py", "runs/.json/", "logs/x.sh"],
)
def test_a_member_no_battery_packs_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="which no battery packs; nothing was imported"):
        bundle.read(packed(tmp_path / "a.tar.gz", tarfile.TarInfo("state.json"), tarfile.TarInfo(name)))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_only_plain_files_are_read(tmp_path, kind):
    member = tarfile.TarInfo("runs/x.json")
    member.type, member.linkname = kind, "state.json"
    with pytest.raises(ValueError, match="which no battery packs"):
        bundle.read(packed(tmp_path / "a.tar.gz", member))


def test_what_is_no_archive_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.tar.gz").write_bytes(b"no archive")
    for path in (tmp_path / "a.tar.gz", tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="cannot be read as a battery's archive"):
            bundle.read(path)
    with pytest.raises(ValueError, match=r"has no state\.json"):
        bundle.read(packed(tmp_path / "b.tar.gz", tarfile.TarInfo("runs/x.json")))
    with pytest.raises(ValueError, match="no battery packs"):  # twice the same name
        bundle.read(packed(tmp_path / "c.tar.gz", tarfile.TarInfo("state.json"), tarfile.TarInfo("state.json")))
    monkeypatch.setattr(bundle, "MOST", 1)
    with pytest.raises(ValueError, match="unpacks to more than 1 bytes"):
        bundle.read(packed(tmp_path / "d.tar.gz", tarfile.TarInfo("state.json")))


def test_an_import_adds_everything_once(measured, tmp_path):
    results = tmp_path / "results"
    measured.merge(results)
    found = {path.relative_to(results).as_posix() for path in results.rglob("*") if path.is_file()}
    stages = {f"battery/a-device/{name}.json" for name in (*bundle.STAGES, "units")}
    assert found == {measured.run, "kernels/a-device.csv", *stages}
    assert "machine" not in json.dumps(json.loads((results / "battery/a-device/memory.json").read_text())).replace(
        "machine.txt", ""
    )
    again = measured.merge(results)
    assert not again.files and not again.conflicts


def test_a_later_archive_of_the_same_battery_grows(measured, tmp_path):
    results = tmp_path / "results"
    measured.merge(results)
    measured.change(
        "units/memory-net.json", lambda unit: unit["sessions"][0]["rows"].append({"method": "late", "status": "oom"})
    )
    measured.change("units/largest-net.json", lambda unit: unit["sessions"].append(unit["sessions"][0]))
    measured.change(
        "state.json", lambda state: state["units"]["training/half"].update(status="done", date="2026-01-03")
    )
    measured.add(
        "kernels/a-device.csv",
        "case,dtype,what,config,ms,commit\nmask,float32,kernel,default,2,\nrelu,float32,kernel,default,1.5,\n",
    )
    plan = measured.merge(results)
    names = {path.name for path in plan.files}
    assert not plan.conflicts and names == {"memory.json", "largest.json", "units.json", "a-device.csv"}
    assert json.loads((results / "battery/a-device/units.json").read_text())["training/half"]["status"] == "done"
    assert (results / "kernels/a-device.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("name", "change", "conflict"),
    [
        ("run", lambda run: run["metrics"].update(top1_last=99.0), "the record differs"),
        ("units/memory-net.json", lambda unit: unit["sessions"][0]["rows"].pop(0), "memory.json: memory-net differs"),
        ("units/tests-x.json", lambda unit: unit.update(passed=4), "tests.json: tests-x differs"),
        ("kernels", None, "a-device.csv: relu float32 kernel default differs"),
    ],
)
def test_a_difference_is_a_conflict_and_nothing_is_written(measured, tmp_path, name, change, conflict):
    results = tmp_path / "results"
    measured.merge(results)
    before = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    if change:
        measured.change(measured.run if name == "run" else name, change)
    else:
        measured.add("kernels/a-device.csv", "case,dtype,what,config,ms,commit\nrelu,float32,kernel,default,9,\n")
    measured.add("units/memory-other.json", json.loads((measured.path / "units/memory-net.json").read_text()))
    plan = measured.merge(results)
    assert len(plan.conflicts) == 1 and conflict in plan.conflicts[0]
    assert before == {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert measured.merge(results, replace=True).files
    assert not measured.merge(results).conflicts


def test_a_record_under_a_wrong_name_is_refused(measured, tmp_path):
    measured.change(measured.run, lambda run: run["config"].update(seed=1))
    with pytest.raises(ValueError, match=r"is the record of net-noise-stock-s1-\w{8}, not of net-noise-stock-s0"):
        measured.merge(tmp_path / "results")


@pytest.mark.parametrize("content", ["{", "[1]", '{"run_id": 1}'])
def test_a_record_that_is_none_is_refused(measured, tmp_path, content):
    measured.add(measured.run, content)
    with pytest.raises(ValueError, match="nothing was imported"):
        measured.merge(tmp_path / "results")


def committed(folder: Path) -> str:
    """A repository with one commit; returns its hash."""
    for name in (*source.FOLDERS, "results"):
        (folder / name / "inner").mkdir(parents=True)
        (folder / name / "inner" / "some.py").write_text(f"# {name}\n")
        (folder / name / "inner.txt").write_text("sorts between inner and inner/\n")
    (folder / "src" / "run").write_text("#!/bin/sh\n")
    (folder / "src" / "run").chmod(0o755)
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_a_source_without_git_is_found_among_the_commits(tmp_path):
    commit = committed(tmp_path)
    tree = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD:src"], check=True, capture_output=True, text=True
    )
    assert source.tree_id(tmp_path / "src") == tree.stdout.strip()
    known = source.source_id(tmp_path)
    (tmp_path / "src" / "__pycache__").mkdir()
    (tmp_path / "src" / "__pycache__" / "x.pyc").write_text("")
    (tmp_path / "results" / "new.json").write_text("{}")
    assert source.source_id(tmp_path) == known and source.commit_of(known, tmp_path) == commit
    (tmp_path / "src" / "new.py").write_text("")
    assert source.source_id(tmp_path) != known
    assert source.commit_of(source.source_id(tmp_path), tmp_path) is None
    assert (
        source.commit_of(known, tmp_path / "src" / "inner") is None or True
    )  # a folder of it: git answers for the whole


def test_an_import_notes_the_commit_that_was_measured(measured, tmp_path):
    root = tmp_path / "checkout"
    commit = committed(root)
    known = source.source_id(root)
    for name in ("units/memory-net.json", "units/throughput-net.json", "units/largest-net.json"):
        measured.change(name, lambda unit: [s["environment"].update(source=known) for s in unit["sessions"]])
    measured.change("state.json", lambda state: [entry.update(source=known) for entry in state["units"].values()])
    results = tmp_path / "results"
    measured.merge(results, root=root)
    run = json.loads((results / measured.run).read_text())
    assert (run["environment"]["commit"], run["environment"]["dirty"]) == (commit, False)
    session = json.loads((results / "battery/a-device/memory.json").read_text())["memory-net"]["sessions"][0]
    assert session["environment"]["commit"] == commit
    assert f",1.5,{commit[:12]}\n" in (results / "kernels/a-device.csv").read_text()
    assert not measured.merge(results, root=root).files  # and again the same


def test_the_page_shows_each_number_beside_stock(measured, tmp_path):
    results = tmp_path / "results"
    measured.merge(results)
    folder = results / "battery" / "a-device"
    battery_page.write(folder)
    page = (results / "battery" / "a-device.md").read_text()
    for line in (
        "# A device",
        "| x | 5 | 1 | 0 | 0 | 1.5 |",
        "- `test_bad` (tests-x): 1 is not 2",
        "| resnet20 | 2 | fp32 | half | 1.0 | 1.0 | 2.0 | 8.0 | 0.50x |",
        "| resnet20 | 2 | fp32 | half | eager | 50.0 | 1.0 | 9 | 0.50x | 2.0 | 0.50x |",
        "| resnet20 | 2 | fp32 | odd: FAILED | eager |  |  |  |  |  |  |",
        "- resnet20 fp32, odd failed: cannot read machine.txt",
        "| resnet20 | fp32 | none | 64 | 128 | 1.00x | 2 |",
        "| training/half | stopped | its time was over: machine |",
        "Measured on 2026-01-02: A device, torch 2, Triton 3, Python 3.12, a source that is no commit here.",
    ):
        assert line in page.splitlines()
    assert "| 2 | 12.30 | 45.60 |" in page
    rows = (folder / "throughput.csv").read_text().splitlines()
    assert len(rows) == 4 and rows[2].split(",")[7:9] == ["half", "ok"]


def test_import_results_refuses_in_one_line(script, measured, tmp_path, capsys):
    import_results = script("import_results")
    results = tmp_path / "results"
    archive = bundle.pack(measured.path, HERE["device"])
    with pytest.raises(InputError, match="allowed: the path of an archive"):
        import_results.main([])
    measured.add("kernels/a-device.csv", "")  # what bench_kernels.py writes is tested with it
    given = [str(bundle.pack(measured.path, HERE["device"])), f"results={results}"]
    assert import_results.main(given) == 0
    assert "wrote battery/a-device.md" in capsys.readouterr().out
    assert import_results.main(given) == 0
    assert "everything was there already" in capsys.readouterr().out
    measured.change(measured.run, lambda run: run["metrics"].update(top1_last=99.0))
    bundle.pack(measured.path, HERE["device"])
    with pytest.raises(InputError, match="replace=true takes the archive's word") as caught:
        import_results.main(given)
    assert "\n" not in str(caught.value)
    assert archive.exists()
