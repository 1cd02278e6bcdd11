"""Benchmark of training steps: images/s, peak and saved bytes of methods side by side, without data and without an epoch.

The step is that of the training loop (engine.Trainer), on one batch of noise on the device, at learning rate 0, so that the weights do not
change. All that is measured in one process on one device is a session. Speeds are compared within a session only: each has a row of stock
PyTorch, and a second one at the end shows how far the device drifted.

Columns of a row:

method, batch, status (ok, predicted, oom, not applicable, failed), message
images_per_s {median, iqr, n, warmup};  step_ms {median, iqr, n}, a step's time on the device
host_ms               time that Python takes to issue a step, of steps that begin with an idle device (metrics.StepTimer). A GPU waits for
                      Python where it comes near step_ms. None on a CPU, where the two are the same.
peak_bytes, peak_reserved_bytes, saved_bytes
first_step_seconds    includes the compilation
predicted_bytes       saved bytes of a predicted row, computed with fake tensors
"""

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from actpress import swap
from actpress.measure import is_out_of_memory, predicted_memory
from actpress.train import cli, config, engine

STOCK, AGAIN = "none", "none again"  # the method that changes nothing; its row at a session's end
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PEAK_STEPS = engine.PEAK_STEP + 2  # the fewest steps that see saved bytes and the peak
LOST = (
    "CUDA error",
    "illegal memory access",
    "device-side assert",
)  # messages after which a process cannot use its device
AIM = 0.97  # share of an extrapolated batch that the search tries
FINENESS = 1 / 32  # the search ends when the largest batch is known to this share
Rows = list[dict[str, Any]]
Write = Callable[[Rows], None]
Prepared = tuple[engine.Trainer, Tensor, Tensor]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Setting:
    """What a session measures; the metadata of a field say what it means. Raises ValueError for values out of range."""

    model: str = _option("resnet50", "a name of configs/model")
    batch: int = _option(64, "images in a batch")
    image_size: int = _option(224, "pixels")
    num_classes: int = _option(1000, "classes")
    precision: str = _option(
        "bf16", "fp32 without TF32, tf32: fp32 with matrix products in TF32, bf16 and fp16: autocast"
    )
    compile: bool = _option(False, "torch.compile")
    channels_last: bool = _option(True, "memory format of images and weights")
    device: str = _option("auto", "auto, cpu, cuda or cuda:N")
    steps: int = _option(60, "training steps; those that warm up or measure memory are not timed")
    memory: int = _option(0, "bytes the device is limited to, 0: no limit")
    predict: bool = _option(False, "run nothing, compute saved bytes with fake tensors")

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision}, allowed: {', '.join(PRECISIONS)}")
        for name, least in (("batch", 1), ("image_size", 1), ("num_classes", 1), ("steps", PEAK_STEPS)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}, allowed: whole numbers from {least}")

    def training_config(self, configs: Path, method: str) -> DictConfig:
        """The composed training config of one method, at learning rate 0. Raises InputError for an unknown model or method."""
        precision = "fp32" if self.precision == "tf32" else self.precision
        overrides = f"""model={self.model} method={method} data=synthetic data.image_size={self.image_size}
            data.num_classes={self.num_classes} recipe=quick recipe.epochs=1 recipe.batch_size={self.batch}
            recipe.optimizer.lr=0.0 recipe.schedule.name=none runtime.device={self.device} runtime.precision={precision}
            runtime.compile={self.compile} runtime.channels_last={self.channels_last} runtime.deterministic=false
            runtime.progress=false logger=none"""
        return cli.compose(overrides.split(), configs)


class Batches(list[tuple[Tensor, Tensor]]):
    """A training set, see engine.Data: the same batches (x_NCHW, y_N) in every epoch."""

    def set_epoch(self, epoch: int) -> None:
        pass


def check_methods(names: Sequence[str], configs: Path) -> None:
    """Raise ValueError for a name that is no method."""
    known = sorted(path.stem for path in (configs / "method").glob("*.yaml"))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"method {unknown[0]!r} is unknown, allowed: {', '.join(known)}")


def measure_all(setting: Setting, wanted: Sequence[str], configs: Path, write: Write) -> Rows:
    """Measure the methods `wanted` one after the other. Returns their rows; write(rows) is called after each.

    A method that fails is a row too; the session ends early only if the device can no longer be used.
    """
    rows: Rows = []
    for name in wanted:
        rows.append(measure(setting, name, configs))
        write(rows)
        if device_lost(rows):
            break
    return rows


def device_lost(rows: Rows) -> bool:
    """Whether the last row says that this process can no longer use its device."""
    return any(word in (rows[-1]["message"] or "") for word in LOST)


def measure(setting: Setting, name: str, configs: Path) -> dict[str, Any]:
    """Measure one method. Returns its row."""
    cfg = setting.training_config(configs, STOCK if name == AGAIN else name)
    device, begin = config.device(cfg.runtime.device), time.perf_counter()
    numbers: dict[str, Any] = {}
    status, message = "predicted" if setting.predict else "ok", None
    try:
        if setting.predict:
            build, method = partial(hydra.utils.instantiate, cfg.model), hydra.utils.instantiate(cfg.method)
            try:
                found = predicted_memory(build, method, setting.batch, setting.image_size, cfg.runtime.precision)
            except ValueError as error:
                raise NotApplicable(str(error)) from error
            numbers["predicted_bytes"] = found["saved_bytes"]
        else:
            with precision_of_products(setting.precision):
                _train_steps(setting, cfg, device, numbers)
            if setting.memory and (numbers["peak_bytes"] or 0) > setting.memory:  # on CUDA the allocator refuses first
                raise MemoryError(f"peak of {numbers['peak_bytes']} bytes, allowed here: {setting.memory}")
    except NotApplicable as error:
        status, message = "not applicable", str(error)
    except Exception as error:  # whatever a kernel or a compiler raises is a finding: others are still measured
        status = "oom" if is_out_of_memory(error) else "failed"
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if status == "failed":
            traceback.print_exc()
    torch._dynamo.reset()  # what the method left: compiled code and cached memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    seconds = round(time.perf_counter() - begin, 2)
    return {"method": name, "batch": setting.batch, "status": status, "message": message, **numbers, "seconds": seconds}


class NotApplicable(Exception):
    """The method changes nothing in this model, or in this mode."""


@contextmanager
def precision_of_products(precision: str) -> Iterator[None]:
    """Use TF32 in convolutions and matrix products of fp32 tensors for "tf32", nowhere for "fp32"; change nothing otherwise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if precision in ("fp32", "tf32"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def prepare(setting: Setting, cfg: DictConfig, device: torch.device) -> Prepared:
    """(trainer, x_NCHW images, y_N classes). Raises NotApplicable."""
    engine.set_backend(cfg.runtime)
    if setting.memory and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, setting.memory / total))
        torch.backends.cudnn.benchmark = False  # otherwise each batch of a search costs seconds of tuning
    engine.seed_everything(cfg.seed)
    with device:
        model = hydra.utils.instantiate(cfg.model)
    try:
        swap.apply(model, hydra.utils.instantiate(cfg.method))
    except ValueError as error:
        raise NotApplicable(str(error).partition("; it has")[0]) from error
    x = torch.rand(setting.batch, 3, setting.image_size, setting.image_size, device=device)
    y = torch.randint(setting.num_classes, (setting.batch,), device=device)
    data = SimpleNamespace(train=Batches([(x, y)] * setting.steps), test=(), num_classes=setting.num_classes)
    return engine.Trainer(cfg, model, data, device), x, y


def _train_steps(setting: Setting, cfg: DictConfig, device: torch.device, numbers: dict[str, Any]) -> None:
    """Train the steps and fill in `numbers`. A function of its own, so that a failure leaves no tensor alive in its caller."""
    trainer, x, y = prepare(setting, cfg, device)
    begin = time.perf_counter()
    if setting.compile or swap.is_compiled(
        trainer.model
    ):  # the first step compiles; the loop's own measuring starts after it
        trainer.train_step(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        numbers["first_step_seconds"] = round(time.perf_counter() - begin, 2)
    trainer.train_epoch(lambda step, values: None)
    measured = trainer.metrics()
    names = ("step_ms", "host_ms", "peak_bytes", "peak_reserved_bytes", "saved_bytes", "parameters", "peak_kind")
    numbers.update(images_per_s=measured["train_images_per_s"], **{name: measured[name] for name in names})


def find_largest_batches(
    setting: Setting, wanted: Sequence[str], configs: Path, step: int, before: Rows, write: Write
) -> Rows:
    """Search the largest batch that each method can train in setting.memory bytes, known to `step` images or to the share FINENESS.

    Each probe trains a few steps and is a row. The first probe is setting.batch; `before`: rows of an earlier search to resume from.
    write(rows) is called after each probe.
    """
    rows: Rows = []
    for name in wanted:
        while True:
            made = [row for row in (*before, *rows) if row["method"] == name]
            batch = next_batch(made, setting.batch, step, setting.memory)
            if batch is None:
                break
            rows.append(measure(replace(setting, batch=batch, steps=PEAK_STEPS), name, configs))
            write(rows)
            if device_lost(rows):
                return rows
    return rows


def next_batch(made: Sequence[Mapping[str, Any]], start: int, step: int, capacity: int) -> int | None:
    """The batch to try next, a multiple of `step`; None when the largest is known to `step` or to the share FINENESS of it.

    While all fit, the next is extrapolated to `capacity` bytes by a line through the two largest, since memory is nearly affine in the
    batch; without such a line it is the double. After a failure the interval is cut just below it, after two in half.
    """
    if not made or made[-1]["status"] not in ("ok", "oom"):
        return None if made else start
    fitting = sorted(
        (row["batch"], row.get("peak_reserved_bytes") or row["peak_bytes"]) for row in made if row["status"] == "ok"
    )
    most = fitting[-1][0] if fitting else 0
    failing = min((row["batch"] for row in made if row["status"] != "ok"), default=None)
    room = max(step, int(most * FINENESS) // step * step)
    if failing is not None:
        first = sum(row["status"] == "oom" for row in made) == 1
        guess = max((most + failing) // 2, int(0.9 * failing) * first)
        return None if failing - most <= room else max(guess // step * step, most + step)
    guess = 2 * most
    if len(fitting) > 1 and fitting[-1][1] > fitting[-2][1]:
        (b, less), (a, more) = fitting[-2:]
        guess = int(AIM * (a + (capacity - more) * (a - b) / (more - less)))
    return max(guess // step * step, most + room)
