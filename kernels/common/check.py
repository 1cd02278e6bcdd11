"""Checks of a method's options. Each raises ValueError with the method, the value and the allowed ones."""

from collections.abc import Collection
from typing import Any


def one_of(method: object, **allowed: Collection) -> None:
    """Each option named has one of its allowed values, of the same type: 2.0 is not 2, and True is not 1."""
    for name, values in allowed.items():
        value = getattr(method, name)
        if not any(type(value) is type(one) and value == one for one in values):
            refuse(method, name, value, ", ".join(map(str, values)))


def integer(method: object, name: str, value: Any, least: int, most: int | None = None) -> None:
    """The value is an integer from `least`, to `most` if given."""
    if not is_integer(value, least, most):
        refuse(method, name, value, f"integers from {least}" + (f" to {most}" if most is not None else ""))


def is_integer(value: Any, least: int, most: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value and (most is None or value <= most)


def refuse(method: object, name: str, value: Any, allowed: str) -> None:
    raise ValueError(f"{type(method).__name__}: {name}={value!r}, allowed: {allowed}")
