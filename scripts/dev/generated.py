"""The command line of scripts that write a generated source file."""

import sys
from collections.abc import Callable
from pathlib import Path

from actpress.train import command


def run(target: Path, generate: Callable[[], str], description: str | None) -> int:
    """Write generate() to `target` and print it. With --check, only report whether `target` has this content. Returns the exit code."""
    parser = command.Parser(description)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file is not what the script generates"
    )

    def main() -> int:
        check = parser.parse_args(sys.argv[1:]).check
        return write(target, generate(), check)

    return command.main(main)


def write(target: Path, text: str, check: bool) -> int:
    if check:
        same = target.is_file() and target.read_text() == text
        print(f"{target.name} {'is' if same else 'is NOT'} what the script generates")
        return 0 if same else 1
    target.write_text(text)
    print(text)
    return 0
