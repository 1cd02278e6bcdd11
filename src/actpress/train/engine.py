"""The training loop. It knows no method, model, data set or file by name: actpress.train.run combines them.

The trajectory is a function of the config alone: everything the next epoch depends on is in `Trainer.state`, so a run
that is killed and resumed ends in the same weights, bit for bit, as one that is not. A run also measures, without changing
any result: saved bytes in the first forward pass, peak memory in one later step; both steps are excluded from the
throughput. Nothing waits for the device between two reports.

x_NCHW float32 images, y_N int64 class indices, both on the device.
"""

import math
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from tqdm import tqdm

from actpress import measure, swap
from actpress.train import resume
from actpress.train.config import PRECISIONS
from actpress.train.metrics import StepTimer, Sums, means, milliseconds

REPORT_EVERY = 20  # steps between two reports: progress bar, log, check that the loss is finite
PEAK_STEP = 2  # the third step: gradients and optimiser state exist

Log = Callable[[int, dict[str, float]], None]  # (steps so far, values)


class Loader(Protocol):
    """Batches of (x_NCHW, y_N); len() is their number."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


class Data(Protocol):
    """train.set_epoch(e) fixes order and augmentation of epoch e."""

    train: Loader
    test: Loader
    num_classes: int


class Diverged(ArithmeticError):
    """The training loss, the test loss or an output of the tested model is not finite."""


def seed_everything(seed: int) -> None:
    """Seed the generators of python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm's Mixup draws from numpy's global state
    torch.manual_seed(seed)


def set_backend(runtime: DictConfig) -> None:
    """Process-wide switches: number of threads, deterministic algorithms (an operation that has none raises RuntimeError)."""
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    if runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; cuBLAS asks for it
    torch.use_deterministic_algorithms(runtime.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that would cost time in every step
    torch.backends.cudnn.benchmark = not runtime.deterministic


def create_optimizer(model: nn.Module, optimizer: DictConfig) -> torch.optim.Optimizer:
    """timm's optimiser `name`; all other keys go to create_optimizer_v2. Weight decay covers all parameters, as in the
    papers' code, unless filter_bias_and_bn is true."""
    options = {"filter_bias_and_bn": False, **OmegaConf.to_container(optimizer, resolve=True)}
    return create_optimizer_v2(model, opt=options.pop("name"), **options)


def create_schedule(
    optimizer: torch.optim.Optimizer, schedule: DictConfig, epochs: int, steps_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """(timm's scheduler `name`, number of epochs to train: `epochs` and the cooldown that cosine, tanh and poly may have).

    Steps once an update, or once an epoch if step_on_epochs is true. All other keys that are not null go to create_scheduler_v2.
    """
    if schedule.name == "none":
        return None, epochs
    given = OmegaConf.to_container(schedule, resolve=True)
    options = {"step_on_epochs": False} | {key: value for key, value in given.items() if value is not None}
    return create_scheduler_v2(
        optimizer, options.pop("name"), num_epochs=epochs, updates_per_epoch=steps_per_epoch, **options
    )


class Trainer:
    """Trains one model by one recipe.

    model: with the method applied, on `device`. cfg: needs recipe and runtime, as config.check allows them.
    """

    def __init__(self, cfg: DictConfig, model: nn.Module, data: Data, device: torch.device):
        recipe, runtime = cfg.recipe, cfg.runtime
        if len(data.train) == 0:
            raise ValueError(f"recipe.batch_size={recipe.batch_size} is larger than the training set: no whole batch")
        self.model, self.data, self.device = model, data, device
        self.batch_size, self.clip_grad = recipe.batch_size, recipe.clip_grad
        self.channels_last, self.progress = runtime.channels_last, runtime.progress
        in_place = swap.is_compiled(model)  # by its method
        self.compiled = runtime.compile or in_place
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.forward = torch.compile(model) if runtime.compile and not in_place else model
        self.precision = PRECISIONS[runtime.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        self.optimizer = create_optimizer(model, recipe.optimizer)
        self.scheduler, self.epochs = create_schedule(self.optimizer, recipe.schedule, recipe.epochs, len(data.train))
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.ema = ModelEmaV3(model, decay=recipe.ema) if recipe.ema else None
        self.mixup, self.criterion = None, nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=data.num_classes
            )
            self.criterion = SoftTargetCrossEntropy()
        self.epoch = self.step = 0  # done so far
        self.history: list[dict[str, float]] = []
        self.timer, self._earlier_seconds = StepTimer(device), []
        self.measured: dict[str, int | None] = {}
        if self.compiled and device.type == "cpu":
            self.measured["peak_bytes"] = None  # the tracker of live storages switches torch.compile off

    # One step

    def train_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Update the weights once. Returns (loss, logits [N, classes] float32), detached."""
        loss, logits = self._loss(x, y)
        self._update(loss)
        return loss.detach(), logits.detach()

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.mixup:
            x, y = self.mixup(x, y)
        with self._autocast():
            logits = self.forward(x)
        logits = logits.float()
        return self.criterion(logits, y), logits

    def _update(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        if self.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.parameters, self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)
        if self.scheduler:
            self.scheduler.step_update(self.step + 1)

    def _autocast(self) -> AbstractContextManager:
        return nullcontext() if self.precision == torch.float32 else torch.autocast(self.device.type, self.precision)

    # Steps that measure

    def _next_step(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        # Not in the first step of a compiled model, while torch.compile traces: it would trace the measuring too and change the results.
        if "saved_bytes" not in self.measured and self.step >= (1 if self.compiled else 0):
            return self._step_for_saved_bytes(x, y)
        if "peak_bytes" not in self.measured and self.step >= PEAK_STEP:
            return self._step_for_peak(x, y)
        with self.timer:
            return self.train_step(x, y)

    def _step_for_saved_bytes(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with measure.SavedBytes(casts=not self.compiled, modules=not self.compiled) as saved:
            loss, logits = self._loss(x, y)
        # Of a compiled model SavedBytes counts the parameters and buffers.
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept = (t.untyped_storage() for t in saved.storages().values())
        self.measured["saved_bytes"] = sum(storage.nbytes() for storage in kept if storage.data_ptr() not in own)
        self._update(loss)
        return loss.detach(), logits.detach()

    def _step_for_peak(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        results = []
        state = [self.model, self.optimizer, x, y, *([self.ema.module] if self.ema else [])]
        self.measured["peak_bytes"] = measure.peak_bytes(
            lambda: results.append(self.train_step(x, y)), self.device, state
        )
        self.measured["peak_reserved_bytes"] = measure.peak_reserved(self.device)
        for (
            p
        ) in self.parameters:  # the CPU's tracker leaves empty tables of hooks, which autograd would visit every step
            p._backward_hooks = p._backward_hooks or None
            p._post_accumulate_grad_hooks = p._post_accumulate_grad_hooks or None
        return results[0]

    # Epochs

    def fit(self, on_epoch: Callable[[dict[str, float]], None], log: Log) -> None:
        """Train the remaining epochs. on_epoch(row of history) is called when an epoch is trained, tested and counted.

        Raises Diverged if the training or test loss, or an output in the test, is not finite: the epoch is then not counted.
        """
        while self.epoch < self.epochs:
            row = self.train_epoch(log)
            begin = time.perf_counter()
            row["test_loss"], row["test_accuracy"] = self.evaluate()
            row["test_seconds"] = time.perf_counter() - begin
            self.epoch += 1
            self.history.append(row)
            on_epoch(row)

    def train_epoch(self, log: Log) -> dict[str, float]:
        """Train one epoch. Returns its number (from 1), mean loss, accuracy in %, seconds and the learning rate after it."""
        self.model.train()
        self.data.train.set_epoch(self.epoch)
        swap.set_epoch(self.model, self.epoch)
        sums, before, begin = Sums(self.device), (0.0, 0.0, 0), time.perf_counter()
        # disable=None: no bar where the output is not a terminal
        with tqdm(
            total=len(self.data.train),
            desc=f"epoch {self.epoch + 1}/{self.epochs}",
            unit="step",
            leave=False,
            disable=None if self.progress else True,
        ) as bar:
            for x, y in self.data.train:
                loss, logits = self._next_step(x, y)
                sums.add(loss, logits, y)
                self.step += 1
                bar.update()
                if self.step % REPORT_EVERY == 0:
                    before = self._report(bar, sums, before, log)
        if self.scheduler:
            self.scheduler.step(self.epoch + 1)
        loss, accuracy = means(self._read(sums))
        return {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.lr,
            "train_loss": loss,
            "train_accuracy": accuracy,
            "train_seconds": time.perf_counter() - begin,
        }

    def _read(self, sums: Sums) -> tuple[float, float, int]:
        now = sums.read()
        if not math.isfinite(now[0]):
            raise Diverged(f"the training loss is not finite: epoch {self.epoch + 1}, at most {self.step} steps done")
        return now

    def _report(self, bar: tqdm, sums: Sums, before: tuple[float, float, int], log: Log) -> tuple[float, float, int]:
        """Show and log the metrics since the reading `before`; returns the new reading."""
        now = self._read(sums)
        loss, accuracy = means(now, before)
        recent = self.timer.read()[-REPORT_EVERY:]
        speed = measure.items_per_second(recent, self.batch_size).median if recent else None
        peak = self.measured.get("peak_bytes")
        log(
            self.step,
            {
                "train/loss": loss,
                "train/accuracy": accuracy,
                "train/images_per_s": speed,
                "lr": self.lr,
                "epoch": self.step / len(self.data.train),
            },
        )
        bar.set_postfix_str(
            f"loss {loss:.3f}, accuracy {accuracy:.1f}%"
            + (f", {speed:.0f} images/s" if speed else "")
            + (f", peak {peak / 2**30:.2f} GiB" if peak else "")
        )
        return now

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """(mean cross-entropy, top-1 accuracy in %) on the test set, of the EMA weights where the recipe has them.

        Raises Diverged if the loss or an output is NaN or infinite: argmax would still count such images as right or wrong.
        """
        model = self.ema.module if self.ema else self.model
        model.eval()
        sums = Sums(self.device)
        unsound = torch.zeros((), dtype=torch.int64, device=self.device)  # images with an output that is not finite
        for x, y in self.data.test:
            if self.channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            with self._autocast():
                logits = model(x)
            logits = logits.float()
            sums.add(nn.functional.cross_entropy(logits, y), logits, y)
            unsound.add_((~logits.isfinite().all(1)).sum())
        loss, accuracy = means(sums.read())
        if unsound or not math.isfinite(loss):
            raise Diverged(
                f"the test is not finite: epoch {self.epoch + 1}, step {self.step}, test loss {loss}, "
                f"outputs of {int(unsound)} of {sums.samples} images are NaN or infinite"
                + (" (EMA weights)" if self.ema else "")
            )
        return loss, accuracy

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    # What a run leaves behind

    def metrics(self) -> dict[str, Any]:
        """The metrics of a record, for the run so far. Accuracies in %, sizes in bytes, times in seconds; None where unknown."""
        seconds, warmup = self.timer.steady()
        seconds = self._earlier_seconds + seconds
        rates = measure.items_per_second(seconds, self.batch_size) if seconds else None
        last = self.history[-1] if self.history else {}
        best = max(self.history, key=lambda row: row["test_accuracy"], default={})
        return {
            "top1_last": last.get("test_accuracy"),
            "top1_best": best.get("test_accuracy"),
            "epoch_best": best.get("epoch"),
            "loss_last": last.get("test_loss"),
            "train_loss_last": last.get("train_loss"),
            "tested_weights": "ema" if self.ema else "last",
            "train_images_per_s": rates
            and {"median": rates.median, "iqr": rates.q75 - rates.q25, "n": rates.n, "warmup": warmup},
            "step_ms": milliseconds(seconds),
            "host_ms": milliseconds(self.timer.steady_host()),  # of this process's steps; None on a CPU
            "peak_bytes": self.measured.get("peak_bytes"),
            "peak_reserved_bytes": self.measured.get("peak_reserved_bytes"),
            "peak_kind": "max_memory_allocated" if self.device.type == "cuda" else "live storages, data set left out",
            "saved_bytes": self.measured.get("saved_bytes"),
            "train_seconds": sum(row["train_seconds"] for row in self.history),
            "test_seconds": sum(row["test_seconds"] for row in self.history),
            "epochs": self.epoch,
            "steps": self.step,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }

    def state(self) -> dict[str, Any]:
        """All that the next epoch depends on, as tensors and plain Python. Call it between epochs."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "method": swap.state(self.model),
            "random": resume.random_state(self.device),
            "history": self.history,
            "measured": self.measured,
            "step_seconds": torch.tensor(self._earlier_seconds + self.timer.steady()[0], dtype=torch.float64),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned, in a Trainer made from the same config."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        swap.load_state(self.model, state["method"])
        self.history, self.measured = state["history"], state["measured"]
        self._earlier_seconds = state["step_seconds"].tolist()
        resume.set_random_state(state["random"], self.device)
