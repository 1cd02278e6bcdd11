"""Train several methods at the same time on one device, for as many whole epochs of a recipe as fit into a time: cosine to its end.

python scripts/short_training.py --seconds 150 --methods none,division --overrides model=resnet18,data=cifar10,recipe=division_cifar10

How the number of epochs is chosen: src/actpress/bench/short_training.py. Exit code 1 if a run did not end well.
"""

import sys
import time
from pathlib import Path

from actpress.bench import short_training
from actpress.train import command
from actpress.train.run import bad_input

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("none", "division", "quantize")


def parser() -> command.Parser:
    made = command.Parser(__doc__)
    made.add_argument("--seconds", type=command.seconds, default=150.0, help="time for all (150)")
    made.add_argument(
        "--methods", type=command.names, default=METHODS, help=f"names of configs/method ({','.join(METHODS)})"
    )
    made.add_argument("--overrides", type=command.names, default=(), help="of scripts/train.py, for all methods")
    made.add_argument("--steps", type=command.whole(1), default=60, help="steps on noise that measure the speed (60)")
    made.add_argument("--out", type=Path, default=ROOT / "results", help="folder of records and curves (results)")
    made.add_argument("--work", type=Path, default=ROOT / "outputs" / "short_training", help="folder of checkpoints")
    return made


def main(given: list[str]) -> int:
    end = time.monotonic()  # the same clock in all processes
    options = parser().parse_args(given)
    end += options.seconds
    folders = {"out": options.out, "work": options.work}
    with bad_input():
        return short_training.train_all(
            options.methods, options.overrides, ROOT / "configs", end=end, warmup=options.steps, **folders
        )


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
