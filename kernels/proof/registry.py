"""All kernels by the cases they declare: where the ahead-of-time compiler, the tests and the benchmark take them from."""

import importlib
import pkgutil
from collections.abc import Iterable

import torch

from actpress.kernels.common import launch


def all_cases() -> dict[str, launch.Case]:
    """The cases of every kernel family, by name."""
    package = importlib.import_module("actpress.kernels")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    modules = [importlib.import_module(name) for name in names]
    cases = [case for module in modules if callable(getattr(module, "cases", None)) for case in module.cases()]
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), f"two cases of one name: {sorted(case.name for case in cases)}"
    return named


def cases_named(prefixes: Iterable[str]) -> dict[str, launch.Case]:
    """Those whose name starts with one of `prefixes`; all, if there is none. Raises ValueError where no name does."""
    cases, prefixes = all_cases(), tuple(prefixes)
    unknown = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in cases)]
    if unknown:
        raise ValueError(f"no case starts with {' or '.join(unknown)}; there are: {', '.join(cases)}")
    return {name: case for name, case in cases.items() if not prefixes or name.startswith(prefixes)}


def launches(case: launch.Case, dtype: torch.dtype, config: launch.Config) -> list[launch.Launch]:
    """What the case launches, in order: its launcher is run on tensors without memory."""
    with launch.recorded() as recorded:
        case.kernel(*case.make(dtype, "meta"), config=config)
    return recorded


def describe(case: launch.Case, config: launch.Config) -> str:
    """A configuration in words: "default GROUPS=256 num_warps=4"."""
    words = [f"{name}={value}" for name, value in config.items()]
    return " ".join(["default", *words] if config is case.configs[0] else words)


def name_of(dtype: torch.dtype) -> str:
    """float32, float16 or bfloat16."""
    return str(dtype).removeprefix("torch.")
