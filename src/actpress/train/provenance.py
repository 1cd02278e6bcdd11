"""Which commit a result was measured from."""

import os
import subprocess
from pathlib import Path
from typing import Any


def source() -> dict[str, Any]:
    """commit: of the checkout this file is part of. dirty: files other than results differ from it.

    ACTPRESS_COMMIT names the commit of a copy that has no git, or that of another commit, by the word of whoever set it. Both are None
    without either.
    """
    if commit := os.environ.get("ACTPRESS_COMMIT"):
        return {"commit": commit, "dirty": False}
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", here.name) != here.name:
        return {"commit": None, "dirty": None}
    changes = _git(here.parent, "status", "--porcelain", "--", ":(top)", ":(top,exclude)results")
    return {"commit": _git(here.parent, "rev-parse", "HEAD"), "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None without git or outside of a checkout."""
    try:
        answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
