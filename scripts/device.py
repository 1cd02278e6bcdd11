"""Which device this is, and its two limits: a copy in memory and a product of bf16 matrices.

python scripts/device.py --out FILE.json                   a CUDA device
python scripts/device.py --out FILE.json --device cpu      no limits, to see that it runs
"""

import sys
from pathlib import Path

from actpress.bench.device import identity, limits
from actpress.train import command, config, record
from actpress.train.run import bad_input


def main(given: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("device.json"), help="JSON file (device.json)")
    parser.add_argument("--device", default="cuda", help="auto, cpu, cuda or cuda:N (cuda)")
    options = parser.parse_args(given)
    with bad_input():
        device = config.device(options.device)
    found = identity(device)
    record.write(options.out, found)  # in case the rest fails: an archive without it cannot be imported
    found |= limits(device)
    record.write(options.out, found)
    print(found)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
