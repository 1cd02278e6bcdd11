"""The command line of training. Bad input ends in one line on stderr that names the value and what is allowed.

Hydra spreads its own messages over several lines, so the overrides are composed here first; HYDRA_FULL_ERROR=1 skips
that and shows every traceback.

Exit codes: 0 done; 1 a bug (with its traceback); 2 bad input; 3 a run ended out of memory or diverged; 130 interrupted.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actpress.run import InputError
from actpress.run import run as train_run

VERSION_BASE = "1.3"
BAD_INPUT, UNHAPPY_END, INTERRUPTED = 2, 3, 130


def train(configs: Path) -> int:
    """Run the command line sys.argv on the configs in folder `configs` (config train). Returns the exit code."""
    arguments = get_args_parser().parse_args()
    full_errors = _full_errors()
    codes = [0]

    def job(cfg: DictConfig) -> float | None:
        """One run; returns its last top-1, which is what a sweeper optimises."""
        try:
            record = train_run(cfg)
        except InputError as error:
            if full_errors:
                raise
            codes.append(_complain(error))
            return None
        if record["status"] != "ok":
            print(f"run {record['run_id']} ended: {record['status']}, {record['message']}", file=sys.stderr)
            codes.append(UNHAPPY_END)
        return record["metrics"]["top1_last"]

    def main() -> int:
        if not full_errors and not arguments.hydra_help and arguments.config_dir is None:
            check_overrides(arguments.overrides, configs, arguments.config_name or "train", arguments.multirun)
        hydra.main(version_base=VERSION_BASE, config_path=str(configs), config_name="train")(job)()
        return max(codes)

    return run(main)


def run(main: Callable[[], int | None]) -> int:
    """Call main() and return its exit code, 0 for None; InputError becomes one line on stderr and code 2."""
    try:
        return main() or 0
    except InputError as error:
        if _full_errors():
            raise
        return _complain(error)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED


def _full_errors() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _complain(error: InputError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


def compose(overrides: list[str], configs: Path, name: str = "train") -> DictConfig:
    """The config `name` of folder `configs` under overrides, as on the command line. Raises InputError for bad ones."""
    with _configs(configs, name) as configs:
        return _compose([_choices(_parse(text), multirun=False)[0] for text in overrides], configs, name)


def check_overrides(overrides: list[str], configs: Path, name: str = "train", multirun: bool = False) -> None:
    """Raise InputError, on one line, unless Hydra can compose config `name` of folder `configs` under `overrides`.

    In a multirun every choice of every sweep is tried, each beside the first choices of the others.
    """
    with _configs(configs, name) as configs:
        parsed = [_parse(text) for text in overrides]
        multirun = multirun or any(override.key_or_group == "hydra.mode" for override in parsed)
        for overridden in _each_choice([_choices(override, multirun) for override in parsed]):
            _compose(overridden, configs, name)


@contextmanager
def _configs(configs: Path, name: str) -> Iterator[Path]:
    """Hydra, ready to compose config `name` of folder `configs`, whose absolute path is given."""
    configs = Path(configs).resolve()
    if not (configs / f"{name}.yaml").is_file():
        raise InputError(f"config {name!r} is not in {configs}; choose one of {_listed(_stems(configs))}")
    with hydra.initialize_config_dir(str(configs), version_base=VERSION_BASE):
        yield configs


def _parse(text: str) -> Override:
    try:
        return OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([text])[0]
    except OverrideParseException as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"override {text!r} is malformed ({reason}); write key=value, +key=value or ~key, and quote special characters"
        ) from error


def _choices(override: Override, multirun: bool) -> list[Override]:
    """The overrides a sweep stands for; of any other override itself."""
    text = override.input_line
    if not override.is_sweep_override():
        return [override]
    if not multirun:
        raise InputError(f"override {text!r} lists several values; add -m to run each, or quote it to pass a text")
    if not override.is_discrete_sweep():
        return [override]  # an interval: left to the sweeper that understands it
    key = override.get_key_element()
    found = [_parse(f"{key}={value}") for value in override.sweep_string_iterator()]
    if not found:
        raise InputError(f"override {text!r} matches no choice")
    return found


def _each_choice(choices: list[list[Override]]) -> Iterator[list[Override]]:
    """Lists with one override each such that every choice occurs: the first of all, then each other beside the firsts."""
    firsts = [options[0] for options in choices]
    yield firsts
    for position, options in enumerate(choices):
        for option in options[1:]:
            yield [*firsts[:position], option, *firsts[position + 1 :]]


def _compose(overrides: list[Override], configs: Path, name: str) -> DictConfig:
    ours = [o for o in overrides if not o.key_or_group.startswith("hydra")]  # Hydra's own groups lie elsewhere too
    groups = [o for o in ours if (configs / o.key_or_group).is_dir()]
    for override in groups:
        _check_group(override, configs)
    keys = [o for o in ours if o not in groups and not o.is_add()]
    lines = [o.input_line for o in overrides if not o.is_sweep_override()]
    try:
        if keys:
            composed = hydra.compose(name, [o.input_line for o in groups])
            for override in keys:
                _check_key(override, composed)
        return hydra.compose(name, lines)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error


def _check_group(override: Override, configs: Path) -> None:
    """A group's option must be a file of its folder, or of a folder in it: text/bert_base."""
    group, value = override.key_or_group, override.value()
    folder = configs / group
    options = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]
    if not override.is_delete() and value not in options:
        raise InputError(f"{group}={value} is unknown; choose one of {_listed(options)}")


def _check_key(override: Override, composed: DictConfig) -> None:
    """An override that changes or deletes a key must find it there."""
    key = override.key_or_group
    node: Any = composed
    path = key.split(".")
    for depth, part in enumerate(path):
        if not OmegaConf.is_dict(node):
            break  # an item of a list, or below a value: left to Hydra
        if part not in node:
            above = ".".join(path[:depth])
            where = f"under {above}" if above else "at the top level"
            raise InputError(
                f"override {override.input_line!r}: there is no key {key!r}; allowed {where}: {_listed(map(str, node))} "
                f"(+{key}=... adds a new one)"
            )
        node = node._get_node(part)


def _stems(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
