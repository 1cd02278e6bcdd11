"""Import of the archive that a battery wrote into results/.

runs/ joins results/runs/; all else gets a folder of its own, results/battery/<device>-<time>/, which a later archive of the same battery
replaces. Paths of the machine are cut to their last part.
"""

import json
import re
import tarfile
import tempfile
from pathlib import Path

from actpress.train.files import slug, write_text

PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+([\w.+@-]+)")
SUFFIXES = (".json", ".jsonl", ".csv", ".log")


def unpack(archive: Path, results: Path, replace: bool) -> tuple[Path, int]:
    """Write the files of `archive` below `results`. Returns (the battery's folder, the number of files).

    replace: overwrite records of runs that exist and differ. Raises ValueError, before anything is written, for such a record otherwise,
    and if it is no archive of a battery.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with tarfile.open(archive) as file:
                file.extractall(scratch, filter="data")  # refuses members that would land elsewhere
            here = json.loads(Path(scratch, "identity.json").read_text())["environment"]
        except (OSError, EOFError, tarfile.TarError) as error:
            raise ValueError(f"{archive} is no archive of a battery ({error}); nothing was imported") from error
        folder = results / "battery" / slug(f"{here['device']} {here['date'][:16]}")
        texts = {}
        for path in (path for path in Path(scratch).rglob("*.*") if path.suffix in SUFFIXES):
            name, text = path.relative_to(scratch), PATH.sub(r"\1", path.read_text(errors="replace"))
            target = (results if name.parent.name == "runs" else folder) / name
            exists = target.parent == results / "runs" and target.exists()
            if exists and not replace and target.read_text() != text:
                raise ValueError(f"{name} differs from the existing record, --replace takes it; nothing was imported")
            texts[target] = text
    for path, text in texts.items():
        write_text(path, text)
    return folder, len(texts)
