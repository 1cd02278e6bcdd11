"""The command line of training: Hydra overrides. Bad input ends in one line on stderr that names the value and the allowed ones.

Hydra's own messages take several lines, so the overrides are composed here first; HYDRA_FULL_ERROR=1 shows every traceback.

A sweep runs every job it can. An unknown key or choice is a typo and refused before the first job; a key that only some of the
swept choices lack (method=none,division method.block=4,8) fails those jobs alone. The jobs that failed are listed at the end.

Exit codes: 0 done; 1 a bug (with its traceback) or a killed job; 2 bad input; 3 a run ended out of memory, diverged or could not write
its files; 130 interrupted. A sweep ends with the highest code of its jobs.
"""

import math
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actpress.train import command, outcomes, run, usage
from actpress.train.errors import BAD_INPUT, BUG, INTERRUPTED, UNHAPPY_END, InputError
from actpress.train.files import WriteError, check_folder
from actpress.train.outcomes import Outcome

VERSION_BASE = "1.3"


class Lack(NamedTuple):
    """A key that a config does not have. where: the place in the config whose keys are `allowed`."""

    key: str
    where: str
    allowed: str

    def message(self, override: str) -> str:
        return (
            f"override {override!r}: there is no key {self.key!r}; allowed {self.where}: {self.allowed} "
            f"(+{self.key}=... adds a new one)"
        )


class Plan(NamedTuple):
    """What Hydra is started with.

    renamed: override -> the form that Hydra accepts even if the key is missing, such as ++method.block=4,8.
    refused: (group, choice) -> why a job with this choice cannot run.
    outputs: paths.outputs of the first job. sweep: whether there are several jobs. swept: keys with several values.
    jobs: the number of jobs, None if a sweeper chooses it.
    """

    renamed: dict[str, str] = {}  # noqa: RUF012 - never changed
    refused: dict[tuple[str, str], str] = {}  # noqa: RUF012
    outputs: Path = Path("outputs")
    sweep: bool = False
    swept: frozenset[str] = frozenset()
    jobs: int | None = None


def train(configs: Path) -> int:
    """Run the command line sys.argv on the configs in folder `configs` (config train). Returns the exit code."""
    return command.main(lambda: _train(configs))


def _train(configs: Path) -> int:
    arguments = get_args_parser().parse_intermixed_args()
    name = arguments.config_name or "train"
    if arguments.help:
        with _configs(configs, name) as configs:
            print(
                usage.text(
                    _composed(arguments.overrides, configs, name, arguments.multirun, hydra_too=True), configs, name
                )
            )
        return 0
    given_outputs = [text.partition("=")[2] for text in arguments.overrides if text.startswith("paths.outputs=")]
    plan = Plan(outputs=Path((given_outputs or ["outputs"])[0]), sweep=arguments.multirun)
    if not arguments.hydra_help and arguments.config_dir is None:  # configs of another folder are left to Hydra
        plan = check_overrides(arguments.overrides, configs, name, arguments.multirun)
    given = sys.argv
    flags = [argument for argument in given[1:] if argument not in arguments.overrides]
    overrides = [plan.renamed.get(override, override) for override in arguments.overrides]
    sys.argv = [given[0], *flags, *overrides]  # Hydra's own parser does not take flags between overrides
    try:
        if plan.sweep:
            return _sweep(configs, plan)
        ends: list[Outcome] = []
        code = _start(configs, _job(plan, ends.append))
        return max([code, *(end.code or 0 for end in ends)])
    finally:
        sys.argv = given


def _start(configs: Path, job: Callable[[DictConfig], float | None]) -> int:
    """Let Hydra run the job, or all jobs of a sweep. Returns its exit code: Hydra reports errors itself and exits."""
    try:
        hydra.main(version_base=VERSION_BASE, config_path=str(configs), config_name="train")(job)()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _sweep(configs: Path, plan: Plan) -> int:
    with outcomes.temporary_folder(plan.outputs) as folder:
        try:
            code = _start(configs, _job(plan, folder))
        finally:
            message, worst = outcomes.summary(outcomes.read(folder), plan.swept, plan.jobs)
            if message:
                print(message, file=sys.stderr)
    return max(code, worst)


def _job(plan: Plan, target: Path | Callable[[Outcome], None]) -> Callable[[DictConfig], float | None]:
    """The function that Hydra calls for each run; a launcher may pickle it. target: the folder for outcomes of a sweep, or the function
    that receives the outcome of a single run.

    It returns the last top-1, which a sweeper optimises, or None for a run that failed.
    """
    sweep, refused, full_errors = plan.sweep, plan.refused, command.full_errors()

    def tell(code: int | None, reason: str | None = None) -> None:
        number = HydraConfig.get().job.num if sweep else 0
        outcome = Outcome(number, list(HydraConfig.get().overrides.task), code, reason)
        outcomes.write(target, outcome) if sweep else target(outcome)

    def job(cfg: DictConfig) -> float | None:
        tell(None)
        try:
            for (group, choice), reason in refused.items():
                if HydraConfig.get().runtime.choices.get(group) == choice:
                    raise InputError(reason)
            record = run.train(cfg)
        except KeyboardInterrupt:
            tell(INTERRUPTED)
            raise
        except (InputError, WriteError) as error:
            code = BAD_INPUT if isinstance(error, InputError) else UNHAPPY_END
            tell(code, str(error))
            if full_errors:
                raise
            command.complain(error)
            return None
        except Exception as error:
            tell(BUG, " ".join(f"{type(error).__name__}: {error}".split()))
            if not sweep:
                raise
            traceback.print_exc()  # the other jobs go on
            return None
        if record["status"] == "ok":
            tell(0)
        else:
            tell(UNHAPPY_END, f"{record['status']}, {record['message']}")
            print(f"run {record['run_id']} ended: {record['status']}, {record['message']}", file=sys.stderr)
        return record["metrics"]["top1_last"]

    return job


def compose(overrides: list[str], configs: Path, name: str = "train") -> DictConfig:
    """The config `name` of folder `configs` under overrides, as on the command line. Raises InputError for bad ones."""
    with _configs(configs, name) as configs:
        return _composed(overrides, configs, name)


def _composed(
    overrides: list[str], configs: Path, name: str, multirun: bool = False, hydra_too: bool = False
) -> DictConfig:
    parsed = [_choices(_parse(text), multirun)[0] for text in overrides]
    _check(parsed, configs, name)
    return _hydra_compose(name, [o.input_line for o in parsed], hydra_too)


def check_overrides(overrides: list[str], configs: Path, name: str = "train", multirun: bool = False) -> Plan:
    """The plan to start Hydra with. Raises InputError, on one line, unless Hydra can compose config `name` of `configs` under `overrides`.

    In a multirun every choice of every sweep is tried, combined with the first choices of the others. It is no error if only some choices
    of a swept group have a key: the plan says which choices refuse it.
    """
    with _configs(configs, name) as configs:
        parsed = [_parse(text) for text in overrides]
        multirun = multirun or any(o.key_or_group == "hydra.mode" and o.value() == "MULTIRUN" for o in parsed)
        choices = [_choices(override, multirun) for override in parsed]
        swept = {options[0].key_or_group for options in choices if len(options) > 1}
        missing: dict[
            int, dict[tuple[str, str], Lack]
        ] = {}  # position of the override -> group and choice -> the missing key
        tried: dict[str, set[str]] = {}
        outputs = None
        for overridden in _each_choice(choices):
            chosen = {o.key_or_group: str(o.value()) for o in overridden if o.key_or_group in swept}
            for group, choice in chosen.items():
                tried.setdefault(group, set()).add(choice)
            lines = [o.input_line for o in overridden]
            for position, lack in _missing(overridden, configs, name):
                group = lack.key.partition(".")[0]
                if group not in chosen or overridden[position].is_delete():
                    raise InputError(lack.message(overrides[position]))
                missing.setdefault(position, {})[group, chosen[group]] = lack
                lines[position] = f"++{lines[position]}"
            sweeps = [o.is_sweep_override() for o in overridden]
            lines = [line for line, sweep in zip(lines, sweeps, strict=True) if not sweep]
            cfg = _hydra_compose(name, lines, hydra_too=True)
            _check_folders(cfg, multirun)
            outputs = outputs or Path(cfg.paths.outputs)
        for position, lacks in missing.items():
            ((group, _), *_) = lacks
            if len(lacks) == len(tried[group]):  # no job has such a key: a typo
                raise InputError(max(lacks.values(), key=lambda lack: len(lack.allowed)).message(overrides[position]))
    return Plan(
        renamed={overrides[position]: f"++{overrides[position]}" for position in missing},
        refused={
            (group, choice): f"{group}={choice} has no key {lack.key!r}; allowed {lack.where}: {lack.allowed}"
            for lacks in missing.values()
            for (group, choice), lack in lacks.items()
        },
        outputs=outputs,
        sweep=multirun,
        swept=frozenset(o.key_or_group for o in parsed if o.is_sweep_override()),
        jobs=None if any(_left_to_sweeper(o) for o in parsed) else math.prod(map(len, choices)),
    )


def _left_to_sweeper(override: Override) -> bool:
    """Whether the number of jobs depends on more than the listed values."""
    interval = override.is_sweep_override() and not override.is_discrete_sweep()
    return interval or override.key_or_group.startswith(("hydra/sweeper", "hydra.sweeper"))


def _check_folders(cfg: DictConfig, multirun: bool) -> None:
    """Raise InputError if the folders of results cannot be created; Hydra creates its own before a run begins."""
    hydra_key = "hydra.sweep.dir" if multirun else "hydra.run.dir"
    try:
        for key in ("paths.outputs", "paths.records", hydra_key):
            check_folder(key, OmegaConf.select(cfg, key))
    except ValueError as error:
        raise InputError(str(error)) from error


@contextmanager
def _configs(configs: Path, name: str) -> Iterator[Path]:
    """Initialise Hydra to compose config `name` of folder `configs`; yields that folder's absolute path."""
    configs = Path(configs).resolve()
    if not (configs / f"{name}.yaml").is_file():
        raise InputError(f"config {name!r} is not in {configs}; choose one of {_listed(_stems(configs))}")
    with hydra.initialize_config_dir(str(configs), version_base=VERSION_BASE):
        yield configs


def _parse(text: str) -> Override:
    try:
        override = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([text])[0]
    except OverrideParseException as error:
        raise _malformed(text, str(error).strip().splitlines()[0]) from error
    if not override.key_or_group:
        raise _malformed(text, "there is no key")
    return override


def _malformed(text: str, reason: str) -> InputError:
    return InputError(
        f"override {text!r} is malformed ({reason}); write key=value, +key=value or ~key, and quote special characters"
    )


def _choices(override: Override, multirun: bool) -> list[Override]:
    """The single overrides of a sweep; an override that is no sweep alone."""
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
    """Lists with one choice of each override, so that every choice occurs: first all first choices, then each other choice combined with
    the first ones of the rest."""
    firsts = [options[0] for options in choices]
    yield firsts
    for position, options in enumerate(choices):
        for option in options[1:]:
            yield [*firsts[:position], option, *firsts[position + 1 :]]


def _check(overrides: list[Override], configs: Path, name: str) -> None:
    """Raise InputError unless every override of a single run finds its group or key."""
    for position, lack in _missing(overrides, configs, name):
        raise InputError(lack.message(overrides[position].input_line))


def _missing(overrides: list[Override], configs: Path, name: str) -> Iterator[tuple[int, Lack]]:
    """(position, the missing key) for each override whose key is missing. Raises InputError for an unknown choice of a group."""
    # Hydra's own groups are in other folders too
    groups = [o for o in overrides if not o.key_or_group.startswith("hydra") and (configs / o.key_or_group).is_dir()]
    for override in groups:
        _check_group(override, configs)
    keys = [
        (position, o)
        for position, o in enumerate(overrides)
        if not o.key_or_group.startswith("hydra") and o not in groups and not o.is_add()
    ]
    if not keys:
        return
    composed = _hydra_compose(name, [o.input_line for o in groups])
    for position, override in keys:
        if lack := _lack(override, composed):
            yield position, lack


def _hydra_compose(name: str, lines: list[str], hydra_too: bool = False) -> DictConfig:
    """Hydra's compose. hydra_too: keep the node hydra. Raises InputError."""
    try:
        return hydra.compose(name, lines, return_hydra_config=hydra_too)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(" ".join(str(error).split())) from error


def _check_group(override: Override, configs: Path) -> None:
    """A group's option must be a file of its folder, or of a folder in it: text/bert_base."""
    group, value = override.key_or_group, override.value()
    folder = configs / group
    options = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]
    if not override.is_delete() and value not in options:
        raise InputError(f"{group}={value} is unknown; choose one of {_listed(options)}")


def _lack(override: Override, composed: DictConfig) -> Lack | None:
    """The missing key of an override that changes or deletes one; None if the key exists."""
    key = override.key_or_group
    node: Any = composed
    path = key.split(".")
    for depth, part in enumerate(path):
        if not OmegaConf.is_dict(node):
            break  # an item of a list, or below a value: left to Hydra
        if part not in node:
            above = ".".join(path[:depth])
            allowed = _listed(str(name) for name in node if not str(name).startswith("_"))
            return Lack(key, f"under {above}" if above else "at the top level", allowed or "nothing")
        node = node._get_node(part)
    if override.is_delete() and OmegaConf.is_dict(composed) and OmegaConf.select(composed, key) is None:
        raise InputError(
            f"override {override.input_line!r}: {key} is null, which Hydra cannot delete; set it instead, {key}=..."
        )
    return None


def _stems(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
