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
from pathlib import Path

import kernel_report
from actpress import arguments, battery_page, cli, record
from actpress.battery import slug
from actpress.run import bad_input

ROOT = Path(__file__).resolve().parents[1]
MEMBER = re.compile(r"(?:runs/)?[\w.+-]+\.(?:jsonl?|csv|md|png)|logs/[\w.+-]+\.log")
MOST = 256 * 2**20  # bytes of what is in an archive
PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+@-]+/)+([\w.+@-]+)")


def main(given: list[str]) -> int:
    with bad_input():
        if not given or "=" in given[0]:
            words = " ".join(given)
            raise ValueError(f"arguments {words!r}, allowed: the path of an archive, then replace=true, results=DIR")
        options = arguments.read(given[1:], {"replace": False, "results": str(ROOT / "results")})
        results = Path(options["results"]).resolve()
        members = read(Path(given[0]))
        here = json.loads(members["identity.json"])["environment"]
        folder = results / "battery" / slug(f"{here['device']} {here['date'][:16]}")
        files = {(results if name.startswith("runs/") else folder) / name: text for name, text in members.items()}
        for path, text in files.items():
            if path.parent.name == "runs" and path.exists() and path.read_text() != text and not options["replace"]:
                raise ValueError(
                    f"{path.name} differs from the record that is there; nothing was imported, replace=true takes it"
                )
    for path, text in files.items():
        with record.replacing(path) as file:
            file.write(text.encode())
    for path in folder.glob("*.csv"):
        kernel_report.render(path)
    battery_page.write(folder)
    print(f"{len(files)} files; the page is {folder}.md", flush=True)
    subprocess.run(["git", "-C", str(results), "status", "--short", "."], stderr=subprocess.DEVNULL, check=False)
    return 0


def read(path: Path) -> dict[str, str]:
    """Name -> text of the members to import. Raises ValueError for an archive that no battery packed."""
    found, size = {}, 0
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                size += member.size
                if not (member.isreg() and MEMBER.fullmatch(member.name)) or size > MOST:
                    raise ValueError(f"{path} holds {member.name!r}, which no battery packs; nothing was imported")
                if not member.name.endswith((".md", ".png")):
                    found[member.name] = PATH.sub(r"\1", archive.extractfile(member).read().decode(errors="replace"))
    except (OSError, EOFError, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read as a battery's archive ({error})") from error
    if "identity.json" not in found or "units.json" not in found:
        raise ValueError(f"{path} has no identity.json or no units.json: not a battery's archive")
    return found


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
