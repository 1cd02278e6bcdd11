"""Training steps measured: images/s, peak and saved bytes of methods side by side, without data and without an epoch.

The step is the training loop's own (engine.Trainer), on one batch of noise that lies on the device, at learning rate 0, so that the weights
stay as they are however many steps are made. Everything measured in one process on one device is a session; speeds are compared
within a session only, so each has a row of stock PyTorch, and a second one at the end shows how far the device drifted.

A row: method, status (ok, oom, not applicable, failed) and message; images_per_s {median, iqr, n, warmup}; peak_bytes,
peak_reserved_bytes, saved_bytes (measured), predicted_saved_bytes (fake tensors); first_step_seconds, which holds the compilation.
"""

import copy
import gc
import itertools
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from actpress import cli, engine, record, settings, swap, tables
from actpress.measure import ran_out

STOCK = "none"  # the method that changes nothing
AGAIN = "none again"  # the row of stock at a session's end
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
PEAK_STEPS = engine.PEAK_STEP + 2  # the fewest steps that see saved bytes and the peak
BROKEN = (
    "CUDA error",
    "an illegal memory access",
    "device-side assert",
)  # nothing more can be measured in this process


@dataclass(frozen=True)
class Setting:
    """What a session measures. precision: tf32 is fp32 with matrix products in TF32, fp32 allows none; bf16 and fp16 are autocast.
    steps: how many are made; the training loop times those that neither warm up nor measure memory. memory: bytes that the device is
    pretended to have, 0 for what it has. predict: the saved bytes that fake tensors tell, too."""

    model: str
    batch: int = 64
    image_size: int = 224
    num_classes: int = 1000
    precision: str = "bf16"
    compile: bool = False
    channels_last: bool = True
    device: str = "auto"
    steps: int = 60
    memory: int = 0
    predict: bool = False

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision}, allowed: {', '.join(PRECISIONS)}")
        for name in ("batch", "image_size", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, allowed: whole numbers from 1")
        if self.steps < PEAK_STEPS:
            raise ValueError(f"steps={self.steps}, allowed: whole numbers from {PEAK_STEPS}")

    def config(self, configs: Path, method: str) -> DictConfig:
        """The composed training config of one method. Raises InputError for an unknown model or method."""
        return cli.compose(
            [
                f"model={self.model}",
                "data=synthetic",
                f"data.image_size={self.image_size}",
                f"data.num_classes={self.num_classes}",
                "recipe=quick",
                "recipe.epochs=1",
                f"recipe.batch_size={self.batch}",
                "recipe.optimizer.lr=0.0",
                "recipe.schedule.name=none",
                f"method={method}",
                f"runtime.device={self.device}",
                f"runtime.precision={'fp32' if self.precision == 'tf32' else self.precision}",
                f"runtime.compile={str(self.compile).lower()}",
                f"runtime.channels_last={str(self.channels_last).lower()}",
                "runtime.deterministic=false",
                "runtime.progress=false",
                "logger=none",
            ],
            configs,
        )


class OneBatch:
    """A training set of one batch (x_NCHW, y_N), handed out `steps` times; no test set. See engine.Data."""

    def __init__(self, x: Tensor, y: Tensor, steps: int, num_classes: int):
        self._batch, self._steps, self.num_classes = (x, y), steps, num_classes
        self.train, self.test = self, ()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self._batch, self._steps)

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """The batch is the same in every epoch."""


def methods(configs: Path) -> list[str]:
    """Names of all methods, stock first."""
    names = {path.stem for path in (configs / "method").glob("*.yaml")}
    return [STOCK, *sorted(names - {STOCK})]


def applicable(cfg: DictConfig, configs: Path) -> list[str]:
    """The methods that change something in cfg's model, after stock. Nothing is allocated."""
    with torch.device("meta"):
        model = hydra.utils.instantiate(cfg.model)
    found = []
    for name in methods(configs):
        method = hydra.utils.instantiate(OmegaConf.load(configs / "method" / f"{name}.yaml"))
        with suppress(ValueError):
            swap.apply(copy.deepcopy(model), method)
            found.append(name)
    return found


# What PyTorch itself offers against memory, as a row beside the methods.


def _checkpoint(model: nn.Module) -> None:
    """Every block of the network keeps its input alone and is computed again. A block: a member of nn.Sequential that has members."""
    inside: set[nn.Module] = set()
    blocks = set()
    for module in model.modules():  # outer modules come before inner ones
        if isinstance(module, nn.Sequential) and module not in inside:
            found = [child for child in module if next(child.children(), None) is not None]
            blocks.update(found)
            inside.update(inner for block in found for inner in block.modules())
    if not blocks:
        raise ValueError("no block to compute again")
    apply_activation_checkpointing(model, check_fn=lambda module: module in blocks)


@contextmanager
def _partitioner_budget(share: float) -> Iterator[None]:
    """torch.compile keeps about this share of what it would keep, and computes the rest again."""
    import torch._functorch.config as functorch

    with functorch.patch(activation_memory_budget=share):
        yield


@dataclass(frozen=True)
class Rival:
    """change: what is done to the model. during: in which context steps run. compiled: only under torch.compile."""

    change: Callable[[nn.Module], None] = lambda model: None
    during: Callable[[], AbstractContextManager] = nullcontext
    compiled: bool = False


RIVALS = {
    "checkpointing": Rival(_checkpoint),
    "compile budget 0.5": Rival(during=lambda: _partitioner_budget(0.5), compiled=True),
    "compile budget 0.1": Rival(during=lambda: _partitioner_budget(0.1), compiled=True),
}


def session(
    setting: Setting, wanted: Sequence[str], configs: Path, write: Callable[[Sequence[Mapping[str, Any]]], None]
) -> list[dict[str, Any]]:
    """The rows of methods and RIVALS `wanted`, measured one after the other; write(rows) is called after each.

    A method that fails is a row too; the session ends early only if the device can no longer be used.
    """
    rows: list[dict[str, Any]] = []
    for name in wanted:
        begin = time.perf_counter()
        rows.append({"method": name, **measure(setting, name, configs)})
        rows[-1]["seconds"] = round(time.perf_counter() - begin, 2)
        write(rows)
        if any(word in (rows[-1]["message"] or "") for word in BROKEN):
            break
    return rows


def measure(setting: Setting, name: str, configs: Path) -> dict[str, Any]:
    """A row but for its method and seconds."""
    rival = RIVALS.get(name)
    cfg = setting.config(configs, STOCK if rival or name == AGAIN else name)
    device = settings.device(cfg.runtime.device)
    numbers: dict[str, Any] = {}
    try:
        if rival and rival.compiled and not setting.compile:
            raise NotApplicable("only under torch.compile")
        with precision_of_products(setting.precision), (rival or Rival()).during():
            _run(setting, cfg, device, rival, numbers)
        limit = setting.memory
        if limit and (numbers["peak_bytes"] or 0) > limit:  # on CUDA the allocator refuses first
            raise MemoryError(f"peak of {numbers['peak_bytes']} bytes, allowed here: {limit}")
        if setting.predict and rival is None:
            numbers["predicted_saved_bytes"] = predicted(setting, cfg)
        status, message = "ok", None
    except NotApplicable as error:
        status, message = "not applicable", str(error)
    except (
        Exception
    ) as error:  # whatever a kernel or a compiler raises is a finding; the other methods are still measured
        status = "oom" if ran_out(error) else "failed"
        message = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if status == "failed":
            traceback.print_exc()
    _forget(device)
    return {"status": status, "message": message, **numbers}


class NotApplicable(Exception):
    """There is nothing in this model, or in this mode, that the method changes."""


@contextmanager
def precision_of_products(precision: str) -> Iterator[None]:
    """For fp32 tensors: TF32 in convolutions and matrix products for "tf32", nowhere for "fp32"; otherwise as it is."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if precision in ("fp32", "tf32"):
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def predicted(setting: Setting, cfg: DictConfig) -> int:
    """Saved bytes as fake tensors tell them."""
    numbers = tables.memory(
        lambda: hydra.utils.instantiate(cfg.model),
        hydra.utils.instantiate(cfg.method),
        setting.batch,
        setting.image_size,
        cfg.runtime.precision,
    )
    return numbers["saved_bytes"]


def _run(setting: Setting, cfg: DictConfig, device: torch.device, rival: Rival | None, numbers: dict[str, Any]) -> None:
    """Train the steps and fill in what was measured. A function of its own so that nothing of a failed one stays alive."""
    engine.set_backend(cfg.runtime)
    if setting.memory and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, setting.memory / total), device)
    engine.seed_everything(cfg.seed)
    with device:
        model = hydra.utils.instantiate(cfg.model)
    try:
        swap.apply(model, hydra.utils.instantiate(cfg.method))
        (rival or Rival()).change(model)
    except ValueError as error:
        raise NotApplicable(str(error).partition("; it has")[0]) from error
    x = torch.rand(setting.batch, 3, setting.image_size, setting.image_size, device=device)
    y = torch.randint(setting.num_classes, (setting.batch,), device=device)
    trainer = engine.Trainer(cfg, model, OneBatch(x, y, 1, setting.num_classes), device)
    begin = time.perf_counter()
    if setting.compile:  # the first step compiles; the loop's own measuring starts after it
        trainer.train_step(x, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    numbers["first_step_seconds"] = round(time.perf_counter() - begin, 2) if setting.compile else None
    trainer.data = OneBatch(x, y, setting.steps, setting.num_classes)
    trainer.train_epoch(lambda step, values: None)
    measured = trainer.metrics()
    names = ("peak_bytes", "peak_reserved_bytes", "saved_bytes", "parameters", "peak_kind")
    numbers.update(images_per_s=measured["train_images_per_s"], **{name: measured[name] for name in names})


def _forget(device: torch.device) -> None:
    """Give back what the last method left: compiled code and cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def environment(device: str, source: str) -> dict[str, Any]:
    """record.environment of `device` (auto, cpu, cuda), with its memory in bytes and the source's id, see actpress.source."""
    found = settings.device(device)
    memory = torch.cuda.get_device_properties(found).total_memory if found.type == "cuda" else None
    return {**record.environment(found), "memory_bytes": memory, "source": source}
