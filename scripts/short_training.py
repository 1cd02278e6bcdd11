"""Train several methods at the same time on one device, for as many whole epochs of a recipe as fit into a time: cosine to its end.

python scripts/short_training.py seconds=150 methods=none,division,quantize overrides=model=resnet18,data=cifar10,recipe=division_cifar10
    out=DIR     of the records, runs/<run_id>.json, and the curves so far, training-<run_id>.jsonl (results)
    work=DIR    of checkpoints (outputs/short_training)

All methods first make the same steps on noise at the same time; the slowest decides on the number of epochs, which the record holds and
the recipe's own number replaces. overrides: of scripts/train.py, for all methods. Exit code 1 if a run did not end well.
"""

import math
import shutil
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from actpress.bench import steps
from actpress.train import arguments, cli, command, data, run
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OPTIONS = {
    "seconds": 150.0,
    "methods": ("none", "division", "quantize"),
    "overrides": (),
    "out": "",
    "work": "",
    "steps": 60,
}
SHARE = 0.75  # of the time that is planned with: tests and checkpoints take some
START = 10.0  # seconds to read the images and to write the record


def main(given: list[str]) -> int:
    begin = time.monotonic()  # the same clock in all processes
    with bad_input():
        options = arguments.read(given, OPTIONS)
        steps.check(options["methods"], CONFIGS)
        out, work, methods = Path(options["out"]), Path(options["work"]), options["methods"]
        fixed = [*options["overrides"], f"paths.outputs='{work}'", f"paths.records='{out / 'runs'}'", "logger=none"]
        images = len(data.open_images(cli.compose(fixed, CONFIGS).data).train)
    context = get_context("spawn")
    barrier, speeds = context.Barrier(len(methods)), context.Array("d", len(methods))
    share = (barrier, speeds, fixed, images, begin + options["seconds"], options["steps"])
    processes = [context.Process(target=train, args=(i, method, *share)) for i, method in enumerate(methods)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(1)
        if barrier.n_waiting and any(process.exitcode for process in processes):  # it will not come
            barrier.abort()
        for log in work.glob("*/log.jsonl"):  # the curves so far, should this be cut off
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, out / f"training-{log.parent.name}.jsonl")
    return int(any(process.exitcode for process in processes))


def train(
    number: int, method: str, barrier: Any, speeds: Any, fixed: list[str], images: int, end: float, steps: int
) -> None:
    """One method in its own process."""
    cfg = cli.compose([*fixed, f"method={method}"], CONFIGS)
    same = {name: cfg.runtime[name] for name in ("precision", "channels_last", "device")}
    size = {"image_size": cfg.data.image_size, "num_classes": cfg.data.num_classes, "batch": cfg.recipe.batch_size}
    setting = steps.Setting(cfg.model.name, **size, **same, steps=steps)
    barrier.wait()
    row = steps.measure(setting, method, CONFIGS)
    measured = row["status"] == "ok"
    speeds[number] = row["images_per_s"]["median"] if measured else math.inf  # the others go on without it
    barrier.wait()
    if not measured:
        sys.exit(f"{method}: {row['status']} {row['message']}")
    epochs = max(1, int(SHARE * (end - time.monotonic() - START) * min(speeds) / images))
    print(
        f"{method}: {speeds[number]:.0f} images/s beside the others, {epochs} of {cfg.recipe.epochs} epochs", flush=True
    )
    record = run.train(
        cli.compose([*fixed, f"method={method}", f"recipe.epochs={epochs}", "tags=[shortened]"], CONFIGS)
    )
    sys.exit(record["status"] != "ok")


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
