"""Train several methods at the same time on one device, for as many whole epochs of a recipe as fit into a time: cosine to its end.

All methods first make the same steps on noise at the same time; the slowest decides on the number of epochs, which replaces the recipe's
own number and is part of the record.
"""

import math
import shutil
import sys
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from actpress.bench import steps
from actpress.train import cli, data, run

SHARE = 0.75  # of the time that is planned with: tests and checkpoints take some
START = 10.0  # seconds to read the images and to write the record


def train_all(
    methods: Sequence[str], overrides: Sequence[str], configs: Path, *, end: float, warmup: int, out: Path, work: Path
) -> int:
    """Train every method in a process of its own until time.monotonic() is about `end`. Returns 1 if one did not end well, else 0.

    warmup: steps on noise that measure the speed. out: folder of records, runs/<run_id>.json, and of curves, training-<run_id>.jsonl.
    work: folder of checkpoints. Raises ValueError for bad overrides or unknown methods.
    """
    steps.check_methods(methods, configs)
    fixed = [*overrides, f"paths.outputs='{work}'", f"paths.records='{out / 'runs'}'", "logger=none"]
    images = len(data.open_images(cli.compose(fixed, configs).data).train)
    context = get_context("spawn")
    barrier, speeds = context.Barrier(len(methods)), context.Array("d", len(methods))
    share = (barrier, speeds, fixed, configs, images, end, warmup)
    processes = [context.Process(target=_train, args=(i, method, *share)) for i, method in enumerate(methods)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        time.sleep(1)
        if barrier.n_waiting and any(process.exitcode for process in processes):  # a failed process does not arrive
            barrier.abort()
        for log in work.glob("*/log.jsonl"):  # the curves so far, in case this process is killed
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(log, out / f"training-{log.parent.name}.jsonl")
    return int(any(process.exitcode for process in processes))


def _train(
    number: int,
    method: str,
    barrier: Any,
    speeds: Any,
    fixed: list[str],
    configs: Path,
    images: int,
    end: float,
    warmup: int,
) -> None:
    """Train one method in its own process; exits with 1 if it did not end well."""
    cfg = cli.compose([*fixed, f"method={method}"], configs)
    same = {name: cfg.runtime[name] for name in ("precision", "channels_last", "device")}
    size = {"image_size": cfg.data.image_size, "num_classes": cfg.data.num_classes, "batch": cfg.recipe.batch_size}
    setting = steps.Setting(cfg.model.name, **size, **same, steps=warmup)
    barrier.wait()
    row = steps.measure(setting, method, configs)
    measured = row["status"] == "ok"
    speeds[number] = row["images_per_s"]["median"] if measured else math.inf  # the others continue without it
    barrier.wait()
    if not measured:
        sys.exit(f"{method}: {row['status']} {row['message']}")
    epochs = max(1, int(SHARE * (end - time.monotonic() - START) * min(speeds) / images))
    print(
        f"{method}: {speeds[number]:.0f} images/s beside the others, {epochs} of {cfg.recipe.epochs} epochs", flush=True
    )
    record = run.train(
        cli.compose([*fixed, f"method={method}", f"recipe.epochs={epochs}", "tags=[shortened]"], configs)
    )
    sys.exit(record["status"] != "ok")
