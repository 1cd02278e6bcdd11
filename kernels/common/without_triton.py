"""A substitute for Triton where it is not installed (it has wheels for Linux only): kernels can be defined, but not launched."""

from types import SimpleNamespace
from typing import Any


def jit(function: Any) -> Any:
    def unavailable(*arguments: Any, **options: Any) -> None:
        raise RuntimeError(f"{function.__name__} needs Triton, which is not installed; CPU tensors take the reference")

    return SimpleNamespace(__getitem__=lambda grid: unavailable, arg_names=(), fn=function)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


language = SimpleNamespace(constexpr=lambda value=None: value)
knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=False))
