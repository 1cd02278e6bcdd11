"""Train one model with one method, or a sweep of them (-m): python scripts/train.py model=resnet20 method=division

Groups and keys: configs/train.yaml and `python scripts/train.py --help`. Writes results/runs/<run_id>.json and
outputs/<run_id>/; the same command again goes on from the last checkpoint.
"""

import sys
from pathlib import Path

from actpress.train import cli

if __name__ == "__main__":
    sys.exit(cli.train(Path(__file__).resolve().parents[1] / "configs"))
