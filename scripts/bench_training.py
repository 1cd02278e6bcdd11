"""Images/s, peak and saved bytes of training steps: every method beside stock PyTorch, in one process on one device.

python scripts/bench_training.py model=resnet50                                          all methods, batch 64, bf16 autocast
python scripts/bench_training.py model=vit_b batch=32 precision=tf32 compile=true        tf32: fp32 with TF32 matrix products
python scripts/bench_training.py model=resnet50 methods=none,division rivals=checkpointing out=FILE.json

Synthetic images on the device, learning rate 0. With out=, rows are written as they come, and the same command goes on where the file
ends: what it lacks is measured in a session of its own, beside stock again. batch image_size num_classes channels_last device steps: see
actpress.workload.Setting. predict=true adds the saved bytes that fake tensors tell. memory=BYTES pretends a smaller device.
Exit code 1 if a method failed; running out of memory is a result.
"""

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from actpress import arguments, battery, cli, record, source, workload
from actpress.run import bad_input

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
DEFAULTS = {field.name: field.default for field in fields(workload.Setting)} | {"model": "resnet50"}
OPTIONS = {"methods": (), "rivals": (), "stock": True, "out": None}


def main(given: list[str]) -> int:
    with bad_input():
        values = arguments.read(given, DEFAULTS | OPTIONS)
        options = {name: values.pop(name) for name in OPTIONS}
        setting = workload.Setting(**values)
        wanted = chosen(options["methods"], options["rivals"])
        path = Path(options["out"]) if options["out"] else None
        found = earlier(path, setting)
        setting.config(CONFIGS, workload.STOCK)  # a wrong model ends here
        environment = workload.environment(setting.device, source.source_id(ROOT))
    done = {
        row["method"]
        for session in found["sessions"]
        if source.same(session["environment"], environment)
        for row in session["rows"]
        if row["status"] != "failed"
    }
    left = [name for name in wanted if name not in done]
    if options["stock"] and left:
        rest = [name for name in left if name != workload.STOCK]
        left = [workload.STOCK, *rest, *([workload.AGAIN] if rest else [])]
    current: dict[str, Any] = {"environment": environment, "rows": []}

    def write(rows) -> None:
        current["rows"] = rows
        print(describe(rows[-1]), flush=True)
        if path:
            record.write(path, {**found, "sessions": [*found["sessions"], current]})

    rows = workload.session(setting, left, CONFIGS, write) if left else []
    missing = set(left) - {row["method"] for row in rows}
    told = f"{setting.model} {setting.precision}: {len(rows)} rows measured, {len(done)} were there"
    print(f"{told}, {len(missing)} missing" if missing else f"{told}, {battery.COMPLETE}")
    return int(any(row["status"] == "failed" for row in rows))


def chosen(methods: tuple[str, ...], rivals: tuple[str, ...]) -> list[str]:
    """What to measure. Raises ValueError for what does not exist."""
    known = workload.methods(CONFIGS)
    for kind, names, allowed in (("method", methods, known), ("rival", rivals, tuple(workload.RIVALS))):
        for name in names:
            if name not in allowed:
                raise ValueError(f"{kind} {name!r} is unknown, allowed: {', '.join(allowed)}")
    return [*(methods or known), *rivals]


def earlier(path: Path | None, setting: workload.Setting) -> dict[str, Any]:
    """What the file holds, {setting, sessions}. Raises ValueError if it is of another setting."""
    found = {"setting": asdict(setting), "sessions": []}
    if path and path.exists():
        there = record.read(path)
        if there.get("setting") != found["setting"]:
            raise ValueError(f"{path} holds another setting, {there.get('setting')}; remove it or name another file")
        found = there
    return found


def describe(row: dict[str, Any]) -> str:
    """One line for a row."""
    speed, peak, saved = (row.get(name) for name in ("images_per_s", "peak_bytes", "saved_bytes"))
    parts = [
        f"{row['method']}: {row['status']}",
        *([f"{speed['median']:.1f} images/s (IQR {speed['iqr']:.1f}, n={speed['n']})"] if speed else []),
        *([f"peak {peak / 2**20:.1f} MiB"] if peak else []),
        *([f"saved {saved / 2**20:.1f} MiB"] if saved is not None else []),
        *([row["message"]] if row["message"] else []),
    ]
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
