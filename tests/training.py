"""Small training runs for tests: ResNet-20 on a few 16-pixel digits, one thread; and how to compare what they leave."""

import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from actpress.train import cli, engine, run
from paths import ROOT

CONFIGS = ROOT / "configs"
CPU = torch.device("cpu")
SMALL = (
    "data.train_size=64",
    "data.test_size=32",
    "data.image_size=16",
    "recipe.batch_size=16",  # 4 steps an epoch
    "recipe.epochs=3",
    "runtime.device=cpu",
    "runtime.threads=1",
    "runtime.progress=false",
    "logger=none",
)
TIMES = ("train_seconds", "test_seconds")


def config(folder: Path, *overrides: str):
    paths = (f"paths.outputs={folder}/outputs", f"paths.records={folder}/runs")
    return cli.compose([*SMALL, *paths, *overrides], CONFIGS)


def trainer_for(folder: Path, *overrides: str) -> engine.Trainer:
    return run._build(config(folder, *overrides), CPU, None)[0]


def final_state(cfg) -> dict:
    return torch.load(run.files_of(cfg).resume_file, weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Where two nests of tensors and plain Python differ, by a bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        wrong = [f"{path}: keys {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        return wrong + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        wrong = [f"{path}: lengths {len(a)}, {len(b)}"] if len(a) != len(b) else []
        return wrong + [d for i, pair in enumerate(zip(a, b, strict=False)) for d in differences(*pair, f"{path}.{i}")]
    return [] if a == b else [path]


def trajectory(state: dict) -> dict:
    """What of a checkpoint must be the same whatever the machine's speed and however often the run was interrupted."""
    kept = {key: state[key] for key in ("epoch", "step", "model", "optimizer", "scheduler", "scaler", "ema")}
    kept |= {key: state[key] for key in ("method", "random", "measured")}
    kept["history"] = [{key: row[key] for key in row if key not in TIMES} for row in state["history"]]
    return kept


def interrupt(step: int, error: Exception):
    """train_step, but for step `step` of the run, counted from 0, which raises `error`. Not for step 0, which measures."""
    original = engine.Trainer.train_step

    def train_step(self, x, y):
        if self.step == step:
            raise error
        return original(self, x, y)

    return mock.patch.object(engine.Trainer, "train_step", train_step)


@contextmanager
def files_up_to(size: int):
    """No file can grow beyond `size` bytes meanwhile: writing fails as on a full disk, with "File too large"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def train_command(folder: Path, *overrides: str) -> list[str]:
    paths = (f"paths.outputs={folder}/outputs", f"paths.records={folder}/runs")
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL, *paths, *overrides]
