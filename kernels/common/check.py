"""Checks of options. Each raises ValueError with one wording: `<where>: name=value, allowed: ...`.

where: the name of a function or method, or an object, whose class is then named.
"""

from collections.abc import Collection
from typing import Any


def one_of(where: object, **allowed: Collection) -> None:
    """Each option named, an attribute of the object `where`, has one of its allowed values, see `choice`."""
    for name, values in allowed.items():
        choice(where, name, getattr(where, name), values)


def choice(where: object, name: str, value: Any, allowed: Collection) -> None:
    """The value is one of those allowed, and of the same type: 2.0 is not 2, and True is not 1."""
    for one in allowed:
        if type(value) is type(one) and value == one:
            return
    refuse(where, name, value, ", ".join(map(str, allowed)))


def integer(where: object, name: str, value: Any, least: int, most: int | None = None) -> None:
    """The value is an integer from `least`, to `most` if given."""
    if not is_integer(value, least, most):
        refuse(where, name, value, f"integers from {least}" + (f" to {most}" if most is not None else ""))


def is_integer(value: Any, least: int, most: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)


def refuse(where: object, name: str, value: Any, allowed: str) -> None:
    named = where if isinstance(where, str) else type(where).__name__
    raise ValueError(f"{named}: {name}={value!r}, allowed: {allowed}")
