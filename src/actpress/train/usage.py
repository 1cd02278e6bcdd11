"""The text of `train.py --help`: the groups and their choices, every value with its key, and the meaning of the method's options.

Values are those of the command line, so `--help method=division` shows the options of division. The meaning of an option is
the text in the docstring of the method's class ("block: side of the averaged blocks ...") or the comment beside the value below configs/.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import hydra
from omegaconf import Container, DictConfig, OmegaConf

WIDTH, COLUMN = 120, 40  # of the text; where meanings begin
GROUPS = ("method", "model", "data", "recipe", "logger", "runtime")  # in the order of the text
HEAD = """\
Train one model with one method, or a sweep of them.

usage: python scripts/train.py [group=choice ...] [key=value ...]
       python scripts/train.py -m method=none,division seed=0,1,2    a sweep: a run for each combination
       python scripts/train.py --help method=division                this text, with the options of division

+key=value adds a key, ~key removes one; --cfg job shows the configuration as YAML; --hydra-help lists Hydra's own options."""


class Option(NamedTuple):
    """A field of a method's class: its meaning in the docstring, and its default."""

    meaning: str
    default: object


def text(cfg: DictConfig, configs: Path, name: str) -> str:
    """The help for config `name` of folder `configs`, composed as `cfg` with Hydra's node."""
    choices = {group: choice for group, choice in cfg.hydra.runtime.choices.items() if group in cfg}
    groups = [group for group in GROUPS if group in choices] + sorted(choices.keys() - set(GROUPS))
    lines = [HEAD, "", "Groups; the brackets mark what is chosen"]
    lines += [_group(configs / group, group, choices[group]) for group in groups]
    for group in groups:
        comments = _comments(configs / group / f"{choices[group]}.yaml")
        values = _method(cfg.method, comments) if group == "method" else _values(cfg[group], f"{group}.", comments)
        lines += ["", f"{group}={choices[group]}", *values]
    rest = OmegaConf.masked_copy(cfg, [key for key in cfg if key not in choices and key != "hydra"])
    return "\n".join([*lines, "", "The rest", *_values(rest, "", _comments(configs / f"{name}.yaml"))])


def _group(folder: Path, group: str, choice: str) -> str:
    """The choices of a group, on as many lines as they need."""
    names = sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    marked = " ".join(f"[{name}]" if name == choice else name for name in names)
    return textwrap.fill(
        marked, WIDTH, initial_indent=f"  {group:<9}", subsequent_indent=" " * 11, break_on_hyphens=False
    )


def _method(method: DictConfig, comments: dict[str, str]) -> Iterator[str]:
    """Lines for the options of a method, including those that its file leaves at their defaults."""
    options = _options(method)
    meanings = {key: option.meaning for key, option in options.items()}
    unset = {key: option.default for key, option in options.items() if OmegaConf.select(method, key) is None}
    found = [*_values(method, "method.", comments | meanings)]
    for key, default in unset.items():
        found += _value(f"+method.{key}", _written(default), meanings[key])
    yield from found or ["  no options; --help method=division shows those of division"]


def _values(node: DictConfig, prefix: str, meanings: dict[str, str]) -> Iterator[str]:
    """Lines for every value below `node`: prefix, key, value, meaning."""
    for key, value in _leaves(node):
        yield from _value(f"{prefix}{key}", value, meanings.get(key, ""))


def _value(key: str, value: str, meaning: str) -> Iterator[str]:
    line, rest = f"  {key}={value}", textwrap.wrap(meaning, WIDTH - COLUMN)
    yield line.ljust(COLUMN) + rest.pop(0) if rest and len(line) < COLUMN else line
    yield from (" " * COLUMN + more for more in rest)


def _leaves(node: Container, above: str = "") -> Iterator[tuple[str, str]]:
    """(key with dots, value as written on the command line) of each value, without those that Hydra itself reads (_target_)."""
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        raw = node._get_node(key)
        where = f"{above}{key}"
        nested = OmegaConf.is_dict(raw) or key == "_args_"  # the parts of a composition
        if str(key).startswith("_") and not nested:
            continue
        if nested and len(raw):
            yield from _leaves(raw, f"{where}.")
        else:
            yield where, _written(OmegaConf.to_container(raw) if OmegaConf.is_config(raw) else raw._value())


def _written(value: object) -> str:
    """A value as the command line takes it."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    return str(value)


def _comments(file: Path) -> dict[str, str]:
    """key with dots -> the comment that ends its line in a YAML file, if there is one."""
    found, path = {}, []
    for line in file.read_text().splitlines():
        if match := re.match(r"( *)(\w+):(.*)", line):
            indent, key, rest = match.groups()
            path = [*path[: len(indent) // 2], key]
            _, sign, comment = rest.partition(" # ")
            if sign:
                found[".".join(path)] = comment.strip()
    return found


def _options(method: Container, above: str = "") -> dict[str, Option]:
    """Key with dots -> the option of the method's class; of a composition's parts likewise."""
    found = {}
    for number, part in enumerate(method.get("_args_", [])):
        found |= _options(part, f"{above}_args_.{number}.")
    target = hydra.utils.get_object(method["_target_"])
    fields = {field.name: field for field in dataclasses.fields(target)} if dataclasses.is_dataclass(target) else {}
    if fields:
        said = " ".join(inspect.getdoc(target).partition("Raises ")[0].split())
        pieces = re.split(rf"(?<=\. )({'|'.join(fields)}): ", said)
        meanings = dict(zip(pieces[1::2], pieces[2::2], strict=True))
        for name, field in fields.items():
            found[above + name] = Option(meanings.get(name, "").strip(), field.default)
    return found
