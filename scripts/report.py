"""Make all pages of results/ from its records: the tables, their overviews, and one page of everything, results/report.html.

python scripts/report.py            read results/ (runs, fidelity, kernels, LOG.md), write tables/, README.md and report.html
python scripts/report.py --check    write nothing; name every page that does not fit its records, exit code 1 if there is one

A table whose configuration has changed since its records were made is stale: it is named and left as it is, with exit code 1, until
`make reproduce-table TABLE=<name> PUBLISH=1` measures it again.

Nothing is measured here: a number is in a table's JSON, a record or a CSV file, and links to it.
"""

import sys

from actpress.report import pages
from actpress.tables.kind import Project
from actpress.train import command


def main(given: list[str]) -> int:
    parser = command.Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="name the pages that do not fit, write nothing")
    return pages.main(Project(), check_only=parser.parse_args(given).check)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
