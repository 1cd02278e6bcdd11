"""Unpack the archive of a GPU battery into results/, make its page, and show what git says.

python scripts/import_results.py FILE.tar.gz
python scripts/import_results.py FILE.tar.gz replace=true        also over records of runs that are there and differ
python scripts/import_results.py FILE.tar.gz results=DIR         another folder

runs/ joins results/runs/; all else gets a folder of its own, results/battery/<device>-<time>/, which a later archive of the same battery
replaces. Paths of the machine are cut to their last part.
"""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from actpress.report import battery, kernels
from actpress.train import arguments, command
from actpress.train.files import slug, write_text
from actpress.train.run import bad_input

ROOT = Path(__file__).resolve().parents[1]
PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+([\w.+@-]+)")


def main(given: list[str]) -> int:
    with bad_input(), tempfile.TemporaryDirectory() as scratch:
        if not given or "=" in given[0]:
            raise ValueError(f"arguments {given}, allowed: the path of an archive, then replace=true, results=DIR")
        options = arguments.read(given[1:], {"replace": False, "results": str(ROOT / "results")})
        results = Path(options["results"]).resolve()
        try:
            with tarfile.open(given[0]) as archive:
                archive.extractall(scratch, filter="data")  # refuses what would land elsewhere
            here = json.loads(Path(scratch, "identity.json").read_text())["environment"]
        except (OSError, EOFError, tarfile.TarError) as error:
            raise ValueError(f"{given[0]} is no archive of a battery ({error}); nothing was imported") from error
        folder = results / "battery" / slug(f"{here['device']} {here['date'][:16]}")
        files = {}
        for path in (path for path in Path(scratch).rglob("*.*") if path.suffix in (".json", ".jsonl", ".csv", ".log")):
            name, text = path.relative_to(scratch), PATH.sub(r"\1", path.read_text(errors="replace"))
            target = (results if name.parent.name == "runs" else folder) / name
            kept = target.parent == results / "runs" and target.exists() and not options["replace"]
            if kept and target.read_text() != text:
                raise ValueError(
                    f"{name} differs from the record that is there, replace=true takes it; nothing was imported"
                )
            files[target] = text
    for path, text in files.items():
        write_text(path, text)
    for path in folder.glob("*.csv"):
        kernels.render(path)
    write_text(folder.with_suffix(".md"), battery.render(folder))
    print(f"{len(files)} files; the page is {folder}.md", flush=True)
    subprocess.run(["git", "-C", str(results), "status", "--short", "."], stderr=subprocess.DEVNULL, check=False)
    return 0


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
