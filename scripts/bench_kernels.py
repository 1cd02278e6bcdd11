"""Time every kernel beside what PyTorch offers, on one device in one process.

python scripts/bench_kernels.py                                               all -> results/kernels/<device>.csv, .md and .png
python scripts/bench_kernels.py --cases relu,division --dtypes bfloat16 --budget 300
python scripts/bench_kernels.py --profile tiny                                small inputs, without a GPU -> outputs/kernels

The same command resumes where the last one stopped: what the CSV holds, of the same device, versions and commit, is not measured again.
What is measured, and how: src/actpress/bench/kernels.py. Exit codes: 0 all kernels of the chosen cases are right, or the budget ended
before one was wrong; 1 one is red or failed; 2 bad input.
"""

import math
import os
import sys
from pathlib import Path

# Before Triton is imported: --profile tiny needs its interpreter.
os.environ.setdefault("TRITON_INTERPRET", str(int("tiny" in (word.rpartition("=")[2] for word in sys.argv))))

from actpress.bench import kernels
from actpress.report.kernels import render
from actpress.train import command
from actpress.train.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"full": ROOT / "results" / "kernels", "tiny": ROOT / "outputs" / "kernels"}


def parser() -> command.Parser:
    made = command.Parser(__doc__)
    made.add_argument("--cases", type=command.names, default=(), help="prefixes of cases (all)")
    made.add_argument("--names", type=command.names, default=(), help="whole names instead, measured in this order")
    made.add_argument(
        "--dtypes", type=command.names, default=(), help="float32, bfloat16, float16 (all); masks are always measured"
    )
    made.add_argument("--what", type=command.names, default=(), help=f"of {', '.join(kernels.WHAT)} (all)")
    made.add_choice("--configs", ("all", "default"), "configurations of a kernel")
    made.add_argument(
        "--budget", type=command.seconds, default=math.inf, help="seconds after which no other case is started"
    )
    made.add_choice("--profile", tuple(FOLDERS), "sizes; tiny needs no GPU, its times mean nothing")
    made.add_argument("--fresh", action="store_true", help="measure again what the CSV holds")
    made.add_argument("--out", type=Path, help="another folder")
    return made


def main(given: list[str]) -> int:
    options = parser().parse_args(given)
    options.out = options.out or FOLDERS[options.profile]
    try:
        path, wrong = kernels.measure_all(kernels.select(**vars(options)))
    except ValueError as error:
        raise InputError(str(error)) from error
    if path.is_file():
        render(path)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
