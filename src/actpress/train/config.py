"""Checks of a composed config, before anything is built or written. Values of data and augment are checked by actpress.train.data."""

import difflib
import importlib.util
import inspect
import math
from collections.abc import Sequence
from typing import Any

import hydra
import timm.optim
import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SCHEDULES = ("constant", "cosine", "multistep", "none", "poly", "rsqrt", "step", "tanh", "wsd")
SWITCHES = ("channels_last", "compile", "deterministic", "progress")
KEYS = {  # group -> keys that it must have
    "": ("seed", "resume", "name", "tags", "model", "data", "recipe", "method", "logger", "runtime", "paths"),
    "model": ("_target_", "name"),
    "data": (
        *("name", "source", "root", "label", "num_classes", "image_size", "mean", "std"),
        *("pipeline", "train_size", "test_size"),
    ),
    "recipe": (
        *("epochs", "batch_size", "optimizer", "schedule", "smoothing", "mixup", "cutmix"),
        *("clip_grad", "ema", "augment"),
    ),
    "recipe.optimizer": ("name", "lr", "weight_decay"),
    "recipe.schedule": ("name",),
    "recipe.augment": (),
    "method": ("_target_",),
    "logger": ("name",),
    "runtime": ("device", "precision", "threads", "workers", *SWITCHES),
    "paths": ("outputs", "records"),
}
CLOSED = ("recipe", "runtime")  # groups that may have no other keys

# Options of timm's schedules that are numbers -> their bounds.
LEAST_0, ABOVE_0 = {"least": 0}, {"above": 0}
SCHEDULE_NUMBERS: dict[str, dict[str, Any]] = {
    "warmup_epochs": LEAST_0,
    "warmup_lr": LEAST_0,
    "min_lr": LEAST_0,
    "cooldown_epochs": LEAST_0,
    "decay_rate": LEAST_0,
    "decay_epochs": {"above": 0, "optional": True},
    "stable_timescale": {"above": 0, "optional": True},
    "cycle_mul": ABOVE_0,
    "cycle_decay": LEAST_0,
    "cycle_limit": {"whole": True, "least": 1},
    "k_decay": ABOVE_0,
    "noise_pct": LEAST_0,
    "noise_std": LEAST_0,
    "noise_seed": {"whole": True, "least": 0},
}
SCHEDULE_CHOICES = {
    "name": SCHEDULES,
    "warmup_prefix": (True, False),
    "step_on_epochs": (True, False),
    "decay_fn": ("linear", "1-sqrt", "cosine", "power", "exp", None),
}


def check(cfg: DictConfig) -> None:
    """Raise ValueError, on one line with the value and the allowed ones, for the first setting that training cannot use."""
    for group in KEYS:
        _check_keys(cfg, group)
    recipe, runtime = cfg.recipe, cfg.runtime
    for key in ("num_classes", "image_size"):
        _number(f"data.{key}", cfg.data[key], whole=True, least=1)
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
    for group in ("model", "method"):
        _check_options(group, cfg[group])
    if "pretrained" in cfg.model:
        _one_of("model.pretrained", cfg.model.pretrained, (True, False))
    for key in ("num_classes", "image_size"):
        if key in cfg.model and cfg.model[key] != cfg.data[key]:
            raise ValueError(f"model.{key}={shown(cfg.model[key])} must be data.{key}={shown(cfg.data[key])}")
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


def _check_keys(cfg: DictConfig, group: str) -> None:
    """Raise ValueError unless `group` is a group with all the keys that are read, and with no others if it is CLOSED."""
    node, needed = OmegaConf.select(cfg, group) if group else cfg, KEYS[group]
    if not OmegaConf.is_dict(node):
        raise ValueError(f"{group}={shown(node)} must be a group of keys{': ' if needed else ''}{', '.join(needed)}")
    dot = f"{group}." if group else ""
    for key in needed:
        if key not in node.keys():  # noqa: SIM118 - `in node` is False for a value that cannot be resolved
            raise ValueError(f"{dot}{key} is missing; it has no default, so it cannot be deleted")
    if group in CLOSED:
        for key in node:
            _one_of(f"{group} key", key, needed)


def _check_options(group: str, node: DictConfig) -> None:
    """Raise ValueError unless the keys of a model or method are options of its _target_, which checks the values itself."""
    if not isinstance(node["_target_"], str):
        raise ValueError(f"{group}._target_={shown(node['_target_'])} must be the dotted name of a class or function")
    target = hydra.utils.get_object(node["_target_"])
    if not callable(target):
        raise ValueError(f"{group}._target_={node['_target_']} must be a class or function")
    options = inspect.signature(target).parameters.values()
    if any(option.kind is option.VAR_KEYWORD for option in options):
        return
    allowed = sorted({option.name for option in options} | ({"name"} if group == "model" else set()))
    for key in node:
        if not str(key).startswith("_") and key not in allowed:
            named = ", ".join(allowed) or "nothing"
            raise ValueError(f"{group}.{key}: {target.__name__} has no option {key!r}, allowed: {named}")


def _check_optimizer(optimizer: DictConfig) -> None:
    known = timm.optim.list_optimizers()
    if optimizer.name not in known:
        near = difflib.get_close_matches(str(optimizer.name), known) or ["sgd", "adamw", "lamb"]
        raise ValueError(
            f"recipe.optimizer.name={shown(optimizer.name)} must be one of timm's {len(known)} optimisers, such as {', '.join(near)} "
            "(timm.optim.list_optimizers() has all)"
        )
    _number("recipe.optimizer.lr", optimizer.lr, least=0)
    _number("recipe.optimizer.weight_decay", optimizer.weight_decay, least=0)
    info = timm.optim.get_optimizer_info(optimizer.name)
    if info.second_order:
        raise ValueError(
            f"recipe.optimizer.name={optimizer.name} needs second derivatives, which training does not compute; "
            "allowed: optimisers of first order, such as sgd, adamw, lamb"
        )
    if isinstance(info.opt_class, str):  # in a package of its own, for CUDA
        package = info.opt_class.partition(".")[0]
        if importlib.util.find_spec(package) is None or not torch.cuda.is_available():
            raise ValueError(
                f"recipe.optimizer.name={optimizer.name} needs the package {package} and a CUDA device; "
                "allowed here: optimisers without, such as sgd, adamw, lamb"
            )
    options = {}
    for function in (
        timm.optim.get_optimizer_class(optimizer.name, bind_defaults=False),
        timm.optim.create_optimizer_v2,
    ):
        options |= inspect.signature(function).parameters
    allowed = sorted({"name", *options} - {"params", "model_or_params", "opt", "kwargs", "param_group_fn"})
    for key, value in optimizer.items():
        _one_of("recipe.optimizer key", key, allowed)
        default = options[key].default if key in options else None
        if key in ("foreach", "fused"):
            _one_of(f"recipe.optimizer.{key}", value, (True, False, None))
        elif isinstance(default, bool):
            _one_of(f"recipe.optimizer.{key}", value, (True, False))
        elif key in ("momentum", "eps"):
            _number(f"recipe.optimizer.{key}", value, least=0)
        elif isinstance(default, int | float):
            _number(f"recipe.optimizer.{key}", value)
        elif key == "betas" and value is not None:
            _numbers("recipe.optimizer.betas", value, least=0, below=1)


def _check_schedule(schedule: DictConfig) -> None:
    allowed = sorted([*SCHEDULE_NUMBERS, *SCHEDULE_CHOICES, "decay_milestones", "noise"])
    for key, value in schedule.items():
        _one_of("recipe.schedule key", key, allowed)
        name = f"recipe.schedule.{key}"
        if key in SCHEDULE_NUMBERS:
            _number(name, value, **SCHEDULE_NUMBERS[key])
        elif key in SCHEDULE_CHOICES:
            _one_of(name, value, SCHEDULE_CHOICES[key])
        elif key == "decay_milestones" or isinstance(value, ListConfig):
            _numbers(name, value, least=0)
        else:
            _number(name, value, least=0, optional=True)


def _one_of(key: str, value: Any, allowed: Sequence[Any]) -> None:
    if not any(value == item and type(value) is type(item) for item in allowed):  # 1 is not true
        raise ValueError(f"{key}={shown(value)} must be one of {', '.join(map(shown, allowed))}")


def _numbers(key: str, values: Any, **bounds: float) -> None:
    """Raise ValueError unless values is a list of numbers within bounds, as of `_number`."""
    if not isinstance(values, ListConfig) or not values:
        raise ValueError(f"{key}={shown(values)} must be a list of numbers")
    for value in values:
        _number(key, value, **bounds)


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
    """A value in the syntax of overrides."""
    return (
        {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)
    )
