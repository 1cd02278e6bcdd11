"""Reproduce published tables: measured | paper | difference | verdict.

python scripts/reproduce_table.py                      the default tables: what this machine can do in minutes
python scripts/reproduce_table.py division_memory      tables by name (configs/tables/*.yaml)
python scripts/reproduce_table.py [NAME] dry=true      print what would be measured, and measure nothing
python scripts/reproduce_table.py division_accuracy data.source=folder data.root=DIR      overrides for every row
python scripts/reproduce_table.py digits_training publish=true                            into results/, whatever the table says

Memory tables are predicted with fake tensors, error tables are computed. All other tables are made from records; rows that have none are
measured first, so an interrupted table is resumed by the same command. Each table is printed and written, as Markdown and JSON:
into results/tables, where the overviews (index.md, README.md, report.html) are made again as well; files change only if numbers do;
into outputs/reproduced, which git ignores, if the numbers belong to this machine alone (`reuse: here`) or overrides were given.
"""

import sys

from actpress.report import reproduce
from actpress.tables.kind import Project
from actpress.train import command

if __name__ == "__main__":
    sys.exit(command.main(lambda: reproduce.main(sys.argv[1:], Project()), __doc__))
