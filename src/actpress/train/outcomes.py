"""How the jobs of a sweep ended, in files: Hydra's launchers may run jobs in other processes or on other machines.

Not every launcher returns the result of a job that failed, and a killed job returns nothing. So each job writes a file when it begins,
without an exit code, and again when it ends; the command that started the sweep reads them all. The folder is under paths.outputs, which
all jobs see anyway.
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
    """How a job ended. number: its position in the sweep. code: an exit code of actpress.train.cli, None while it runs."""

    number: int
    overrides: list[str]
    code: int | None
    reason: str | None


def write(folder: Path, outcome: Outcome) -> None:
    """Write the outcome of a job, replacing an earlier one."""
    with atomic_write(folder / f"{outcome.number}.json") as file:
        file.write(json.dumps(outcome._asdict()).encode())


def read(folder: Path) -> list[Outcome]:
    """The outcomes in a folder, in the order of the sweep."""
    found = [Outcome(**json.loads(file.read_bytes())) for file in folder.glob("*.json")]
    return sorted(found, key=lambda outcome: outcome.number)


@contextmanager
def temporary_folder(outputs: Path) -> Iterator[Path]:
    """An empty folder for the outcomes of one sweep, as an absolute path; removed after the block."""
    parent = outputs.resolve() / "hydra"
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="jobs-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def summary(outcomes: list[Outcome], swept: Collection[str], planned: int | None) -> tuple[str, int]:
    """(text, highest exit code); ("", 0) if all jobs ended well.

    The text has one line that counts the jobs if an interruption stopped one, one that counts the failed jobs, and one for each failed
    job. A job is named by its overrides of the `swept` keys. planned: number of jobs of the sweep; None: those that began.
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
