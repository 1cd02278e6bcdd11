"""What the recipe, runtime and seed of a composed config may hold, checked before anything is built or written."""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Sequence
from typing import Any

import hydra
import timm.optim
import torch
from omegaconf import DictConfig
from timm.scheduler import create_scheduler_v2

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "cosine", "multistep", "none", "poly", "rsqrt", "step", "tanh", "wsd")
SWITCHES = ("channels_last", "compile", "deterministic", "progress")


def check(cfg: DictConfig) -> None:
    """Raise ValueError, on one line with the value and what is allowed, for the first setting that cannot be trained with."""
    recipe, runtime = cfg.recipe, cfg.runtime
    _number("seed", cfg.seed, whole=True, least=0, below=2**32)
    _one_of("resume", cfg.resume, (True, False))
    _one_of("runtime.precision", runtime.precision, tuple(PRECISIONS))
    for name in SWITCHES:
        _one_of(f"runtime.{name}", runtime[name], (True, False))
    _number("runtime.workers", runtime.workers, whole=True, least=0)
    _number("runtime.threads", runtime.threads, whole=True, least=1, optional=True)
    _number("recipe.epochs", recipe.epochs, whole=True, least=1)
    _number("recipe.batch_size", recipe.batch_size, whole=True, least=1)
    _number("recipe.smoothing", recipe.smoothing, least=0, below=1)
    _number("recipe.mixup", recipe.mixup, least=0)
    _number("recipe.cutmix", recipe.cutmix, least=0)
    _number("recipe.clip_grad", recipe.clip_grad, above=0, optional=True)
    _number("recipe.ema", recipe.ema, above=0, below=1, optional=True)
    if (recipe.mixup or recipe.cutmix) and recipe.batch_size % 2:
        raise ValueError(f"recipe.batch_size={recipe.batch_size} must be even with recipe.mixup or recipe.cutmix")
    _check_method(cfg.method)
    _check_optimizer(recipe.optimizer)
    _check_schedule(recipe.schedule)
    device(runtime.device)


def device(name: str) -> torch.device:
    """cfg.runtime.device as a torch.device: auto is the first CUDA device if there is one, else the CPU. Raises ValueError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdecimal())):
        raise ValueError(f"runtime.device={name} must be one of auto, cpu, cuda, cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"runtime.device={name}, but torch sees no CUDA device here; use runtime.device=cpu or auto")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(
            f"runtime.device={name}, but torch sees only {torch.cuda.device_count()} CUDA device(s), from 0"
        )
    return torch.device(name)


def _check_method(method: DictConfig) -> None:
    """A method's keys must be options of its class, where the config names a class; values are the class's to check."""
    target = hydra.utils.get_object(method["_target_"])
    if not dataclasses.is_dataclass(target):
        return
    allowed = sorted(field.name for field in dataclasses.fields(target) if field.init)
    for key in method:
        if not str(key).startswith("_") and key not in allowed:
            shown = ", ".join(allowed) or "nothing"
            raise ValueError(f"method.{key}: {target.__name__} has no option {key!r}, allowed: {shown}")


def _check_optimizer(optimizer: DictConfig) -> None:
    known = timm.optim.list_optimizers()
    if optimizer.name not in known:
        near = difflib.get_close_matches(str(optimizer.name), known) or ["sgd", "adamw", "lamb"]
        raise ValueError(
            f"recipe.optimizer.name={optimizer.name} must be one of timm's {len(known)} optimisers, such as {', '.join(near)} "
            "(timm.optim.list_optimizers() has all)"
        )
    _number("recipe.optimizer.lr", optimizer.lr, least=0)
    _number("recipe.optimizer.weight_decay", optimizer.weight_decay, least=0)


def _check_schedule(schedule: DictConfig) -> None:
    _one_of("recipe.schedule.name", schedule.name, SCHEDULES)
    allowed = sorted(
        {"name", *inspect.signature(create_scheduler_v2).parameters} - {"optimizer", "sched", "num_epochs"}
    )
    for key, value in schedule.items():
        _one_of("recipe.schedule key", key, allowed)
        if key in ("warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs"):
            _number(f"recipe.schedule.{key}", value, least=0)


def _one_of(key: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
        raise ValueError(f"{key}={shown(value)} must be one of {', '.join(map(shown, allowed))}")


def _number(
    key: str,
    value: Any,
    *,
    whole: bool = False,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    """Raise ValueError unless value is a number (an int if `whole`) with least <= value, above < value < below."""
    if value is None and optional:
        return
    kinds = int if whole else (int, float)
    finite = not isinstance(value, float) or math.isfinite(value)
    fits = (
        isinstance(value, kinds)
        and not isinstance(value, bool)
        and finite
        and (least is None or value >= least)
        and (above is None or value > above)
        and (below is None or value < below)
    )
    if not fits:
        bounds = ((">=", least), (">", above), ("<", below))
        limits = " and ".join(f"{sign} {bound}" for sign, bound in bounds if bound is not None)
        kind = "a whole number" if whole else "a number" if finite else "a finite number"
        words = " ".join(filter(None, (kind, limits, "or null" if optional else "")))
        raise ValueError(f"{key}={shown(value)} must be {words}")


def shown(value: Any) -> str:
    """A value as an override writes it."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
