"""Make the page and the plot of kernel times again, beside a table that scripts/bench_kernels.py wrote.

python scripts/kernel_report.py results/kernels/<device>.csv      writes the .md and the .png
"""

import sys
from pathlib import Path

from actpress.report import kernels
from actpress.train import command
from actpress.train.run import bad_input


def main(given: list[str]) -> None:
    with bad_input():
        if len(given) != 1 or not Path(given[0]).is_file():
            raise ValueError(f"{' '.join(given)!r}, allowed: the path of one table that scripts/bench_kernels.py wrote")
        kernels.render(Path(given[0]))


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
