"""How the jobs of a sweep ended, kept in files: Hydra's launchers may run jobs in other processes or on other machines.

A launcher hands back what a job returned, but not all of them do so for one that failed, and one that was killed returns nothing.
So each job writes a file when it begins, with no exit code in it, and again when it ends; the command that started the sweep reads
them all. The folder lies under paths.outputs, which all jobs must see anyway.
"""

import json
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from actpress.train.errors import INTERRUPTED
from actpress.train.files import atomic_write

KILLED = 1  # exit code of a job that ended without writing its outcome


class Outcome(NamedTuple):
    """The end of a job. number: its place in the sweep. code: as of actpress.train.cli, None while it runs."""

    number: int
    overrides: list[str]
    code: int | None
    reason: str | None


def note(folder: Path, outcome: Outcome) -> None:
    """Write how a job stands, over what it wrote before."""
    with atomic_write(folder / f"{outcome.number}.json") as file:
        file.write(json.dumps(outcome._asdict()).encode())


def read(folder: Path) -> list[Outcome]:
    """What the jobs wrote, in the order of the sweep."""
    found = [Outcome(**json.loads(file.read_bytes())) for file in folder.glob("*.json")]
    return sorted(found, key=lambda outcome: outcome.number)


@contextmanager
def collecting(outputs: Path) -> Iterator[Path]:
    """An empty folder for the outcomes of one sweep, as an absolute path; it is removed in the end."""
    parent = outputs.resolve() / "hydra"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="jobs-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def summary(outcomes: list[Outcome], swept: Collection[str], planned: int | None) -> tuple[str, int]:
    """(one line on each job that failed, below one that counts them, after one on what an interruption stopped; the highest exit code).
    ("", 0) if all ended well.

    A job is named by its overrides of the `swept` keys. planned: how many jobs the sweep has; None: those that began.
    """
    codes = [KILLED if outcome.code is None else outcome.code for outcome in outcomes]
    stopped = [outcome for outcome in outcomes if outcome.code == INTERRUPTED]
    failed = [outcome for outcome in outcomes if outcome.code not in (0, INTERRUPTED)]
    total, lines = planned or len(outcomes), []
    if stopped:
        names = ", ".join(_name(outcome, swept) for outcome in stopped)
        lines.append(f"{codes.count(0)} of {total} jobs done, stopped in {names}")
    if failed:
        lines.append(f"{len(failed)} of {total} jobs failed:")
    for outcome in failed:
        reason = "ended without a word: was it killed?" if outcome.code is None else outcome.reason
        lines.append(f"  {_name(outcome, swept)}: {reason}")
    return "\n".join(lines), max(codes, default=0)


def _name(outcome: Outcome, swept: Collection[str]) -> str:
    what = " ".join(text for text in outcome.overrides if text.lstrip("+~").partition("=")[0] in swept)
    return f"job {outcome.number}" + (f" ({what})" if what else "")
