"""What all commands share: --options of tools, errors on one line, exit codes. Needs no Hydra.

Experiments (train.py, audit.py, reproduce_table.py) take Hydra overrides, see actpress.train.cli; tools take the options of a `Parser`.
"""

import argparse
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from actpress.train import streams
from actpress.train.errors import BAD_INPUT, INTERRUPTED, InputError, Unreadable


def main(command: Callable[[], int | None], text: str | None = None) -> int:
    """Run a command and return its exit code: 0 for None, 2 for bad input, 130 if it is interrupted.

    InputError and Unreadable become one line on stderr; HYDRA_FULL_ERROR=1 raises them instead. text: what --help prints; None for a
    command whose Parser prints its own.
    """
    with streams.unstoppable():
        try:
            if text is not None and not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
                print(f"usage: python {sys.argv[0]} [arguments]\n\n{inspect.cleandoc(text)}")
                return 0
            return command() or 0
        except (InputError, Unreadable) as error:
            if full_errors():
                raise
            return complain(error)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes where it stopped", file=sys.stderr)
            return INTERRUPTED


def full_errors() -> bool:
    """Whether HYDRA_FULL_ERROR asks for tracebacks."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def complain(error: Exception) -> int:
    """Print the error on one line; returns the exit code of bad input."""
    print(f"error: {error}", file=sys.stderr)
    return BAD_INPUT


class Parser(argparse.ArgumentParser):
    """The options of a tool: --long-names, never abbreviated. Bad ones raise InputError, whose message is one line."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_args(self, arguments: list[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(arguments, namespace)
        if unknown:
            names = (next((name for name in a.option_strings if name.startswith("--")), None) for a in self._actions)
            allowed = ", ".join(filter(None, names))
            raise InputError(f"argument {unknown[0]!r}, allowed: {allowed}")
        return found

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def add_choice(self, name: str, allowed: Sequence[str], text: str) -> None:
        """An option, or a positional argument, that takes one of `allowed`; the first is the option's default. text: its help."""

        def parse(text: str) -> str:
            if text not in allowed:
                raise argparse.ArgumentTypeError(f"{text}, allowed: {', '.join(allowed)}")
            return text

        self.add_argument(name, type=parse, default=allowed[0], help=f"{text}: {', '.join(allowed)}")

    def add_fields(self, cls: type, **defaults: Any) -> None:
        """An option for each field of a dataclass: its name with "-" for "_", its default unless `defaults` has another one, and
        metadata["help"]. Fields of type bool become --name and --no-name; those of type int take whole numbers from 0."""
        for field in fields(cls):
            default = defaults.get(field.name, field.default)
            kind: dict[str, Any] = {"type": whole(0)} if field.type is int else {}
            if field.type is bool:
                kind = {"action": argparse.BooleanOptionalAction}
            text = field.metadata.get("help", "")
            self.add_argument(f"--{field.name.replace('_', '-')}", default=default, help=f"{text} ({default})", **kind)


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that takes whole numbers from `least`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}, allowed: whole numbers from {least}")
        return int(text)

    return parse


def whole_number(key: str, text: str, least: int) -> int:
    """The value of key=text. Raises ValueError unless it is a whole number from `least`."""
    try:
        return whole(least)(text)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{key}={error}") from error


def seconds(text: str) -> float:
    """The type of an option that takes a number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text}, allowed: numbers from 0")
    return value


def names(text: str) -> tuple[str, ...]:
    """The type of an option that takes names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
