"""Make the page and the plot of kernel times again, beside a table that scripts/bench_kernels.py wrote.

python scripts/kernel_report.py results/kernels/<device>.csv      writes the .md and the .png
"""

import sys
from pathlib import Path

from actpress.report import kernels
from actpress.train import command
from actpress.train.run import bad_input


def main(given: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("table", type=Path, help="a CSV file")
    path = parser.parse_args(given).table
    with bad_input():
        if not path.is_file():
            raise ValueError(f"'{path}', allowed: the path of one table that scripts/bench_kernels.py wrote")
        kernels.render(path)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
