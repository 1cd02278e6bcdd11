"""The GPU battery without a GPU: commands, time limits and archives; profiles; what is imported."""

import io
import json
import os
import signal
import tarfile
from pathlib import Path

import pytest

from actpress.bench import battery
from actpress.bench.battery import Profile, Unit
from actpress.kernels.proof import registry
from actpress.report import battery as battery_page
from actpress.train import provenance, record
from actpress.train.errors import InputError
from paths import ROOT

CONFIGS = ROOT / "configs" / "battery"


def run(folder: Path, *units: Unit, seconds: float = 60.0) -> tuple[int, dict[str, str]]:
    """(exit code, status of each unit started so far)."""
    profile = Profile("some", "cpu", {"": seconds}, units)
    code = battery.execute_call(profile, "", seconds, folder / "out", folder / "some.tar.gz", ROOT)
    return code, {name: unit["status"] for name, unit in battery.units_of(folder / "out").items()}


def does(name: str, code: str, seconds: float = 20.0, **options) -> Unit:
    """A unit that runs Python code, without quotes."""
    return Unit(name, f'-c "{code}"', seconds, **options)


def members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_a_failure_is_noted_and_does_not_stop_the_rest(tmp_path, capsys):
    units = does("a", "print(1)"), does("b 2", "print(3); raise SystemExit(4)"), does("c", "open('{out}/c.json', 'w')")
    assert run(tmp_path, *units) == (1, {"a": "done", "b 2": "failed", "c": "done"})
    assert "b 2: failed" in (said := capsys.readouterr().out) and "    3\n" in said
    logs = {"logs/a.log", "logs/b-2.log", "logs/c.log"}
    assert members(tmp_path / "some.tar.gz").keys() == {"units.json", "c.json", *logs}
    assert run(tmp_path / "x", does("a", "raise SystemExit(1)", required=True), units[2]) == (1, {"a": "failed"})
    again = does("b 2", "print(5)")
    assert run(tmp_path, does("a", "raise SystemExit(1)"), again) == (0, {"a": "done", "b 2": "done", "c": "done"})
    assert members(tmp_path / "some.tar.gz")["logs/b-2.log"] == b"3\n5\n"


def test_what_does_not_fit_is_not_started_and_time_left_over_is_given_on(tmp_path):
    units = does("a", "", 12), does("c", "print({seconds})", 8)
    assert run(tmp_path, *units, seconds=30)[1] == {"a": "done", "c": "done"}
    assert 15 <= int((tmp_path / "out" / "logs" / "c.log").read_text()) <= 25
    assert run(tmp_path / "x", does("a", ""), seconds=battery.GRACE) == (0, {})


def test_a_unit_is_stopped_with_all_its_processes_and_what_it_wrote_is_packed(tmp_path, monkeypatch):
    monkeypatch.setattr(battery, "GRACE", 1.0)
    child = tmp_path / "child"
    code = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print('begun'); "
    code += f"open('{child}', 'w').write(str(p.pid)); time.sleep(60)"
    unit = does("a", code, 2)
    assert run(tmp_path, unit, seconds=3.5) == (1, {"a": "stopped"})
    assert b"begun" in members(tmp_path / "some.tar.gz")["logs/a.log"]
    status = Path("/proc") / child.read_text() / "status"
    assert not status.exists() or "State:\tZ" in status.read_text()  # gone, or dead and not yet buried


def test_the_archive_is_renewed_while_a_unit_runs(tmp_path, monkeypatch):
    """So that a machine that is taken away loses seconds; and once more when the battery itself is interrupted."""
    monkeypatch.setattr(battery, "EVERY", 0.1)
    look = f"""import os, tarfile, time
open('{{out}}/x.json', 'w').write('1')
path = '{tmp_path}/some.tar.gz'
while not (os.path.exists(path) and 'x.json' in tarfile.open(path).getnames()): time.sleep(.1)
print('seen')"""
    assert run(tmp_path, does("a", look))[0] == 0
    assert (tmp_path / "out" / "logs" / "a.log").read_text() == "seen\n"
    code = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGINT); time.sleep(60)"
    (tmp_path / "some.tar.gz").unlink()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, does("b", code))
    finally:
        signal.signal(signal.SIGINT, before)
    assert "x.json" in members(tmp_path / "some.tar.gz")


def test_a_stopped_unit_hears_it_as_an_interruption(tmp_path):
    """Also where SIGINT is ignored, as by what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print(7)"
        assert battery.execute(does("a", code), tmp_path, tmp_path / "log", 3, ROOT) is None
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "log").read_text() == "7\n"


def test_each_unit_names_its_source_and_one_that_is_done_stays(tmp_path, monkeypatch, capsys):
    """What is mended on a machine that is lent for minutes must not cost what was measured before."""
    for commit in ("first", "second"):
        monkeypatch.setattr(provenance, "commit", lambda commit=commit: {"commit": commit, "dirty": False})
        run(tmp_path, does("a", ""), does("b", f"raise SystemExit({int(commit == 'first')})"))
    commits = {name: unit["commit"] for name, unit in battery.units_of(tmp_path / "out").items()}
    assert commits == {"a": "first", "b": "second"} and "a: done at first, not run again" in capsys.readouterr().out


def test_the_lease_takes_less_than_thirteen_minutes_and_names_what_exists():
    lease = battery.load(CONFIGS, "lease")
    assert sum(lease.calls.values()) + lease.overhead < 13 * 60
    kernels = [unit for unit in lease.units if unit.name.startswith("kernels")]
    names = [unit.run.partition("--names ")[2].split(",") for unit in kernels]
    assert [len(set(found) & set(registry.all_cases())) for found in names] == [30, 12]


def test_a_wrong_profile_is_named(tmp_path, script):
    for arguments, message in (
        (["--profile=nosuch"], "profile=nosuch, allowed: full, lease"),
        (["--profile=lease", "--call=c"], "--call c, allowed: a, b"),
        (["--budget=3"], "argument '--budget=3', allowed: --help, --profile"),
        (["--seconds=soon"], "argument --seconds: soon, allowed: numbers from 0"),
    ):
        with pytest.raises(InputError, match=message):
            script("gpu_battery").main([*arguments, f"--out={tmp_path}"])
    (tmp_path / "bad.yaml").write_text('device: cpu\ncalls: {"": 5}\nunits: [{name: x, run: y, seconds: 6}]')
    with pytest.raises(ValueError, match="take 6 s, allowed: 5"):
        battery.load(tmp_path, "bad")


def packed(path: Path, **changes) -> Path:
    """An archive as a battery packs it."""
    here = {"device": "A GPU", "device_type": "cuda", "date": "2026-01-02T03:04:05", "commit": "abc", "dirty": False}
    here |= dict.fromkeys(("torch", "triton", "cuda", "python"), "1")
    setting = {"model": "m", "image_size": 32, "num_classes": 10, "precision": "bf16", "compile": False, "memory": 0}
    speed = {"median": 200.0, "iqr": 1.0, "n": 9}
    row = {"batch": 4, "status": "ok", "message": None, "images_per_s": speed, "saved_bytes": 2**20}
    rows = [{"method": "none", **row}, {"method": "division", **row, "images_per_s": {**speed, "median": 150.0}}]
    rows.append({"method": "x", "batch": 4, "status": "failed", "message": "at /ho" + "me/someone/file.py"})
    content = {
        "identity.json": {"environment": here, **dict.fromkeys(battery_page.IDENTITY)},
        "units.json": {"units": {"m": {"status": "done", "seconds": 1.0, "limit": 2.0, "said": "3 passed | 1 failed"}}},
        "m.json": {"setting": setting, "sessions": [{"environment": here, "rows": rows}]},
        "runs/some-s0-1.json": {"run_id": "some-s0-1"},
    } | changes
    with tarfile.open(path, "w:gz") as tar:
        for name, value in (content | {"logs/m.log": b"x"}).items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_an_archive_is_unpacked_and_gets_a_page(tmp_path, script, monkeypatch):
    monkeypatch.setattr(record, "RUN", {})
    monkeypatch.setattr(battery_page, "_trained", lambda parts, runs: ["runs " + runs[0]["run_id"]])
    results, importing = tmp_path / "results", script("import_results")
    importing.main([str(packed(tmp_path / "a.tar.gz")), f"--results={results}"])
    folder = results / "battery" / "a-gpu-2026-01-02t03-04"
    assert {path.name for path in folder.iterdir()} == {"identity.json", "units.json", "m.json", "logs"}
    page = folder.with_name(f"{folder.name}.md").read_text()
    assert "3 passed" in page and "runs some-s0-1" in page
    assert "0.75" in next(line for line in page.splitlines() if "| division" in line)
    readme = battery_page.in_readme("a\n<!-- newest GPU -->\nold\n<!-- end -->\nb\n", results / "battery")
    assert readme.startswith("a\n<!-- newest GPU -->\nOn an A GPU (2026-01-02") and "old" not in readme
    assert "0.75" in readme and "failed" not in readme and readme.endswith("<!-- end -->\nb\n")
    assert "someone" not in page + (folder / "m.json").read_text() and "at file.py" in page
    later = packed(tmp_path / "b.tar.gz", **{"runs/some-s0-1.json": {"run_id": "other"}})
    with pytest.raises(InputError, match=r"some-s0-1\.json differs .* --replace"):
        importing.main([str(later), f"--results={results}"])
    assert json.loads((results / "runs" / "some-s0-1.json").read_text())["run_id"] == "some-s0-1"
    importing.main([str(later), f"--results={results}", "--replace"])
    assert json.loads((results / "runs" / "some-s0-1.json").read_text())["run_id"] == "other"


def test_what_no_battery_packs_is_refused(tmp_path, script):
    (tmp_path / "b.tar.gz").write_bytes(b"no archive")
    evil = packed(tmp_path / "a.tar.gz", **{"../evil.json": {}})
    for path, message in (
        (evil, "outside the destination"),
        (tmp_path / "b.tar.gz", "is no archive"),
        (tmp_path / "missing.tar.gz", "is no archive of a battery"),
    ):
        with pytest.raises(InputError, match=message):
            script("import_results").main([str(path), f"--results={tmp_path / 'r'}"])
    assert not (tmp_path / "r").exists() and not (tmp_path.parent / "evil.json").exists()
