"""All kernels by the cases they declare: where the ahead-of-time compiler, the tests and the benchmark take them from.

The cases of a family are in its module `cases`, which is loaded only here: training and the library never need it.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from importlib.util import find_spec

import torch

from actpress.kernels.common import launch

_NO_FAMILIES = ("common", "proof")


def all_cases() -> dict[str, launch.Case]:
    """The cases of every kernel family, by name. Imports every family, and so registers its operations."""
    package = importlib.import_module("actpress.kernels")
    families = [found.name for found in pkgutil.iter_modules(package.__path__) if found.name not in _NO_FAMILIES]
    modules = [importlib.import_module(f"{package.__name__}.{family}") for family in families]
    with_cases = [f"{module.__name__}.cases" for module in modules if find_spec(f"{module.__name__}.cases")]
    cases = [case for name in with_cases for case in importlib.import_module(name).cases()]
    named = {case.name: case for case in cases}
    assert len(named) == len(cases), f"two cases of one name: {sorted(case.name for case in cases)}"
    return named


def cases_named(prefixes: Iterable[str]) -> dict[str, launch.Case]:
    """The cases whose name starts with one of `prefixes`; all if there are none. Raises ValueError for a prefix of no name."""
    cases, prefixes = all_cases(), tuple(prefixes)
    unknown = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in cases)]
    if unknown:
        raise ValueError(f"no case starts with {' or '.join(unknown)}; there are: {', '.join(cases)}")
    return {name: case for name, case in cases.items() if not prefixes or name.startswith(prefixes)}


def launches(case: launch.Case, dtype: torch.dtype, config: launch.Config) -> list[launch.Launch]:
    """The launches of the case, in order; its launcher runs on tensors without memory."""
    with launch.recorded() as recorded:
        case.kernel(*case.make(dtype, "meta"), config=config)
    return recorded


def describe(case: launch.Case, config: launch.Config) -> str:
    """A configuration in words, such as "default GROUPS=256 num_warps=4"."""
    words = [f"{name}={value}" for name, value in config.items()]
    return " ".join(["default", *words] if config is case.configs[0] else words)


def name_of(dtype: torch.dtype) -> str:
    """float32, float16 or bfloat16."""
    return str(dtype).removeprefix("torch.")
