"""Images/s, host time, peak and saved bytes of training steps: methods beside stock PyTorch, in one process on one device.

python scripts/bench_training.py model=resnet50 methods=division,checkpointing           batch 64, bf16 autocast
python scripts/bench_training.py model=vit_b batch=32 precision=tf32 compile=true        stock alone; tf32: fp32 with TF32 matrix products
python scripts/bench_training.py model=resnet50 methods=none,division predict=true       saved bytes as fake tensors tell them, no device
python scripts/bench_training.py model=resnet50 methods=none,division largest=true       the largest batch, by search from `batch` on
    memory=25769803776 step=8           as if the device had 24 GiB, which a CPU needs; known to 8 images, or three percent

Synthetic images on the device, learning rate 0. With out=, rows are written as they come, and the same command goes on where the file
ends: what it lacks is measured in a session of its own, beside stock again. batch image_size num_classes channels_last device steps: see
actpress.bench.steps.Setting. methods: of configs/method, or what PyTorch has itself: checkpointing, compile budget 0.5, compile budget 0.1.
Exit code 1 if a method failed; running out of memory is a result.
"""

import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from actpress.bench import steps
from actpress.train import arguments, command, config, provenance, record
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = {field.name: field.default for field in fields(steps.Setting)} | {"model": "resnet50"}
OPTIONS = {"methods": (steps.STOCK,), "largest": False, "step": 8, "out": None}


def main(given: list[str]) -> int:
    with bad_input():
        values = arguments.read(given, DEFAULTS | OPTIONS)
        options = {name: values.pop(name) for name in OPTIONS}
        setting, methods = steps.Setting(**values), options["methods"]
        steps.check(methods, CONFIGS)
        setting.config(CONFIGS, steps.STOCK)  # a wrong model ends here
        environment = provenance.environment(config.device(setting.device))
        if options["largest"]:
            setting = replace(setting, memory=setting.memory or environment["memory_bytes"] or 0)
            if not (setting.memory and options["step"]):
                raise ValueError(f"memory={setting.memory} step={options['step']}, allowed here: numbers from 1")
        path = Path(options["out"]) if options["out"] else None
        found = earlier(path, asdict(setting) | {"largest": options["largest"]})
    current: dict[str, Any] = {"environment": environment, "rows": []}
    before = [row for session in found["sessions"] for row in session["rows"] if row["status"] != "failed"]

    def write(rows: steps.Rows) -> None:
        current["rows"] = rows
        print(describe(rows[-1]), flush=True)
        if path:
            record.write(path, {**found, "sessions": [*found["sessions"], current]})

    if options["largest"]:
        rows = steps.search(setting, methods, CONFIGS, options["step"], before, write)
        return int(any(row["status"] == "failed" for row in rows))
    left = [name for name in methods if name not in {row["method"] for row in before}]
    if left and not setting.predict:
        rest = [name for name in left if name != steps.STOCK]
        left = [steps.STOCK, *rest, *([steps.AGAIN] if rest else [])]
    rows = steps.session(setting, left, CONFIGS, write)
    print(f"{setting.model} {setting.precision}: {len(rows)} of {len(left)} rows measured, {len(before)} were there")
    return int(len(rows) < len(left) or any(row["status"] == "failed" for row in rows))


def earlier(path: Path | None, setting: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, {setting, sessions}. Raises ValueError if it is of another setting."""
    if not (path and path.exists()):
        return {"setting": setting, "sessions": []}
    found = record.read(path, {"setting": dict, "sessions": list})
    if found["setting"] != setting:
        raise ValueError(f"{path} holds another setting, {found['setting']}; remove it or name another file")
    return found


def describe(row: dict[str, Any]) -> str:
    """One line for a row: medians, and what is not None."""
    found = {key: value["median"] if isinstance(value, dict) else value for key, value in row.items()}
    shown = {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in found.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
