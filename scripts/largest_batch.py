"""The largest batch of one model that a method can train, each probe in a process of its own.

python scripts/largest_batch.py model=resnet50 method=none                        bf16 autocast, on the device there is
python scripts/largest_batch.py model=resnet50 method=division memory=25769803776      as if the device had 24 GiB
python scripts/largest_batch.py model=vit_b precision=tf32 start=64 step=8 out=FILE.json      goes on where the file ends

A batch fits if four training steps of scripts/bench_training.py end without running out of memory. The search stops when the largest
is known to `step` images or to three percent. On a CPU memory= is needed; it is compared with the peak of live storages.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from actpress import arguments, cli, limits, record, source, workload
from actpress.run import bad_input

ROOT = Path(__file__).resolve().parents[1]
SHARED = ("image_size", "num_classes", "precision", "compile", "channels_last", "device", "memory")
DEFAULTS = {f.name: f.default for f in fields(workload.Setting) if f.name in SHARED} | {"model": "resnet50"}
OPTIONS = {"method": workload.STOCK, "start": 64, "step": 8, "highest": 2**16, "out": None}


def main(given: list[str]) -> int:
    with bad_input():
        values = arguments.read(given, DEFAULTS | OPTIONS)
        options = {name: values.pop(name) for name in OPTIONS}
        setting = workload.Setting(**values, steps=workload.PEAK_STEPS)
        if options["method"] not in (allowed := workload.methods(ROOT / "configs")):
            raise ValueError(f"method={options['method']}, allowed: {', '.join(allowed)}")
        if options["step"] < 1 or options["start"] < 1:
            raise ValueError(f"start={options['start']} step={options['step']}, allowed: whole numbers from 1")
        environment = workload.environment(setting.device, source.source_id(ROOT))
        capacity = setting.memory or environment["memory_bytes"]
        if not capacity:
            raise ValueError(
                "memory=0, but a CPU has no memory of its own that could run out; allowed: a number of bytes"
            )
        path = Path(options["out"]) if options["out"] else None
        about = {"setting": asdict(setting) | {"batch": None}, "method": options["method"], "sessions": []}
        if path and path.exists():
            about = record.read(path, {"setting": dict, "sessions": list})
    current: dict[str, Any] = {"environment": environment, "probes": []}
    made = [
        probe
        for session in about["sessions"]
        if source.same(session["environment"], environment)
        for probe in session["probes"]
    ]
    while True:
        known = [limits.Probe(p["batch"], p["status"] == "ok", p["peak_bytes"]) for p in made]
        batch = limits.next_batch(known, options["start"], options["step"], options["highest"], capacity)
        if batch is None:
            break
        found = probe(setting, options["method"], batch)
        print(f"{setting.model} {options['method']} batch {batch}: {found['status']}", flush=True)
        if found["status"] not in ("ok", "oom"):
            print(found["message"])
            return int(found["status"] == "failed")
        made.append(found)
        current["probes"].append(found)
        if path:
            record.write(path, {**about, "sessions": [*about["sessions"], current]})
    fitting, failing = limits.bounds(known)
    print(f"{setting.model} {options['method']}: batch {fitting} fits, {failing or 'nothing tried above it'} does not")
    return 0


def probe(setting: workload.Setting, method: str, batch: int) -> dict[str, Any]:
    """One row of a process of its own, with its batch. peak_bytes: what the allocator holds, where that is known."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        options = asdict(setting) | {"batch": batch, "methods": method, "stock": False, "out": path}
        command = [sys.executable, str(ROOT / "scripts" / "bench_training.py")]
        command += [
            f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not path.exists():  # killed by the system, for instance
            print(done.stdout + done.stderr)
            return {"status": "failed", "message": f"exit code {done.returncode} without a result"}
        (session,) = record.read(path)["sessions"]
    (row,) = session["rows"]
    peak = row.get("peak_reserved_bytes") or row.get("peak_bytes")
    seconds = round(time.perf_counter() - begin, 2)
    return {"batch": batch, "status": row["status"], "message": row["message"], "peak_bytes": peak, "seconds": seconds}


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
