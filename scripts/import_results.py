"""Unpack the archive of a GPU battery into results/, make its page, and show what git says.

python scripts/import_results.py FILE.tar.gz
python scripts/import_results.py FILE.tar.gz --replace              also over records of runs that exist and differ
python scripts/import_results.py FILE.tar.gz --results DIR          another folder
"""

import sys
from pathlib import Path

from actpress.bench import archive
from actpress.report import battery, kernels
from actpress.train import command, provenance
from actpress.train.files import write_text
from actpress.train.run import bad_input

ROOT = Path(__file__).resolve().parents[1]


def main(given: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("archive", type=Path, help="the archive")
    parser.add_argument("--replace", action="store_true", help="overwrite records of runs that differ")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder (results)")
    options = parser.parse_args(given)
    results = options.results.resolve()
    with bad_input():
        folder, count = archive.unpack(options.archive, results, options.replace)
    for path in folder.glob("*.csv"):
        kernels.render(path)
    write_text(folder.with_suffix(".md"), battery.render(folder))
    print(f"{count} files; the page is {folder}.md", flush=True)
    print(provenance.git(results, "status", "--short", ".") or "", flush=True)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
