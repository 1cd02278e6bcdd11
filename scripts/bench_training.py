"""Images/s, host time, peak and saved bytes of training steps: methods beside stock PyTorch, in one process on one device.

python scripts/bench_training.py --methods division,checkpoint                            ResNet-50, batch 64, bf16 autocast
python scripts/bench_training.py --model vit_b --batch 32 --precision tf32 --compile      stock alone
python scripts/bench_training.py --methods none,division --predict                        saved bytes with fake tensors, no device
python scripts/bench_training.py --methods none,division --largest                        the largest batch, searched from --batch on
    --memory 25769803776 --step 8           as if the device had 24 GiB; a CPU needs it. Known to 8 images, or three percent

Synthetic images on the device, learning rate 0. With --out, rows are written as they come, and the same command resumes where the file
ends. Exit code 1 if a method failed; running out of memory is a result.
"""

import sys
from pathlib import Path

from actpress.bench import sessions, steps
from actpress.train import command
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def parser() -> command.Parser:
    made = command.Parser(__doc__)
    made.add_fields(steps.Setting)
    made.add_argument(
        "--methods",
        type=command.names,
        default=(steps.STOCK,),
        help=f"names of configs/method ({steps.STOCK})",
    )
    made.add_argument("--largest", action="store_true", help="search the largest batch")
    made.add_argument("--step", type=command.whole(1), default=8, help="images to which the largest batch is known (8)")
    made.add_argument("--out", type=Path, help="JSON file for the rows")
    return made


def main(given: list[str]) -> int:
    options = vars(parser().parse_args(given))
    methods, largest, step, out = (options.pop(name) for name in ("methods", "largest", "step", "out"))
    with bad_input():
        setting = steps.Setting(**options)
        if largest:
            return sessions.largest_batches(setting, methods, CONFIGS, out, step)
        return sessions.compare(setting, methods, CONFIGS, out)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
