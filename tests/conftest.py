"""What every test shares: seeds, a bound on threads, the paths of the repository and of real data."""

import gc
import importlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from paths import ROOT

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton; `make test-gpu` sets it to 0

import numpy as np
import pytest
import torch
from hypothesis import settings

from actpress.kernels.proof import verify
from quick import mark_slow

THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2  # in each of several test processes one

# Also for the processes that tests start; a caller's own setting wins.
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

# The same examples on every machine and no per-example deadline: a loaded machine must not turn a test red.
settings.register_profile("actpress", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("actpress")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the collected tests: training collects at its start, which would take seconds with them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - third-party code draws from numpy's global state
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch.empty returns is filled with NaN, or the largest integer: what a kernel leaves unwritten shows."""
    with verify.poisoned():
        yield


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def cifar_root() -> Path:
    """Real CIFAR-10 as {train,test}/<class>/*.jpg, at $ACTPRESS_DATA; the test is skipped where that is unset."""
    value = os.environ.get("ACTPRESS_DATA")
    if not value:
        pytest.skip("ACTPRESS_DATA is unset: set it to a folder that holds CIFAR-10 as {train,test}/<class>/*.jpg")
    root = Path(value)
    missing = [split for split in ("train", "test") if not (root / split).is_dir()]
    if missing:
        pytest.fail(f"ACTPRESS_DATA={value!r} has no folder {' or '.join(missing)}; it must hold train and test")
    return root


@pytest.fixture
def script() -> Callable[[str], ModuleType]:
    """A module of scripts/ or scripts/dev/, by name."""
    return importlib.import_module
