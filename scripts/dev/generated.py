"""What scripts share that write a generated source file."""

import sys
from collections.abc import Callable
from pathlib import Path


def write(target: Path, generate: Callable[[], str], arguments: list[str]) -> int:
    """Write generate() to `target`, or with the argument --check say whether it is there already. Returns the exit code."""
    if arguments in (["-h"], ["--help"]):
        print(f"usage: python {sys.argv[0]} [--check]\n\n{sys.modules['__main__'].__doc__}")
        return 0
    if arguments not in ([], ["--check"]):
        print(f"error: arguments {' '.join(arguments)!r}, allowed: none or --check", file=sys.stderr)
        return 2
    text = generate()
    if arguments:
        same = target.is_file() and target.read_text() == text
        print(f"{target.name} {'is' if same else 'is NOT'} what the script generates")
        return 0 if same else 1
    target.write_text(text)
    print(text)
    return 0
