"""key=value arguments of the scripts that are no Hydra applications, and their --help."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

SWITCH = {"true": True, "false": False, "1": True, "0": False}


def explain(command: Sequence[str]) -> bool:
    """Whether a command, sys.argv, asks for --help; the docstring of the script is then printed."""
    asked = not {"-h", "--help"}.isdisjoint(command[1:])
    if asked:
        print(f"usage: python {command[0]} [arguments]\n\n{inspect.getdoc(sys.modules['__main__'])}")
    return asked


def read(arguments: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults`, changed by arguments such as batch=64: each value takes the type of its default.

    A tuple is written with commas, a switch as true or false; a default of None stands for a text that need not be given. Raises
    ValueError, with what is allowed, for an unknown key or a value of another type.
    """
    values = dict(defaults)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key not in defaults or not equals:
            raise ValueError(f"argument {argument!r}, allowed: {', '.join(f'{name}=...' for name in defaults)}")
        values[key] = _value(key, text, defaults[key])
    return values


def _value(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in SWITCH:
            raise ValueError(f"{key}={text}, allowed: true, false")
        return SWITCH[text]
    if isinstance(default, tuple):
        return tuple(item.strip() for item in text.split(",") if item.strip())
    if not isinstance(default, int | float):
        return text
    try:
        value = type(default)(text)
    except ValueError as error:
        kind = "whole numbers" if isinstance(default, int) else "numbers"
        raise ValueError(f"{key}={text}, allowed: {kind} from 0") from error
    if not value >= 0:
        raise ValueError(f"{key}={text}, allowed: numbers from 0")
    return value
