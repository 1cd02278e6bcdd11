"""Which source produced a result, where there is no git: an id of the files that can be found again among the commits.

The id is made of git's own tree ids of the folders that decide on results, computed from the files as they lie there. A machine that
was handed a copy of the files without their history notes it; where the history is, `commit_of` finds the commit.
"""

import hashlib
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDERS = ("configs", "kernels", "scripts", "src", "tests")
IGNORED = re.compile(r"__pycache__|\.pyc$|\.tmp$|\.egg-info$")


def source_id(root: Path) -> str:
    """40 hexadecimal digits: equal for equal files below FOLDERS of `root`."""
    return _joined([tree_id(root / folder) for folder in FOLDERS])


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two environments (workload.environment) are of one source, device and torch: then one goes on where the other ended."""
    return all(a[key] == b[key] for key in ("source", "device", "torch"))


def commit_of(source: str, root: Path, depth: int = 500) -> str | None:
    """The newest of the last `depth` commits of the checkout `root` that has this source_id; None if there is none."""
    listed = _git(root, "log", f"--max-count={depth}", "--format=%H")
    for commit in listed.split() if listed else []:
        trees = _git(root, "rev-parse", *(f"{commit}:{folder}" for folder in FOLDERS))
        if trees and _joined(trees.split()) == source:
            return commit
    return None


def tree_id(folder: Path) -> str:
    """What `git rev-parse HEAD:folder` would say if the files of the folder were committed; files that are never committed left out."""
    found = _tree(folder)
    return found.hex() if found else ""


def _tree(folder: Path) -> bytes | None:
    """Git's object id of a folder; None if there is nothing in it, which git does not know."""
    entries = []
    for path in folder.iterdir():
        if IGNORED.search(path.name):
            continue
        if path.is_dir():
            mode, digest = b"40000", _tree(path)
        else:
            mode = b"100755" if path.stat().st_mode & 0o100 else b"100644"
            digest = _object(b"blob", path.read_bytes())
        if digest:
            order = path.name.encode() + (b"/" if path.is_dir() else b"")
            entries.append((order, mode + b" " + path.name.encode() + b"\0" + digest))
    return _object(b"tree", b"".join(entry for _, entry in sorted(entries))) if entries else None


def _object(kind: bytes, content: bytes) -> bytes:
    return hashlib.sha1(kind + b" %d\0" % len(content) + content, usedforsecurity=False).digest()


def _joined(trees: list[str]) -> str:
    return hashlib.sha1(" ".join(trees).encode(), usedforsecurity=False).hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    """What git prints; None without git, outside of a checkout or where it fails."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None
