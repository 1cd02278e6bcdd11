"""Decode a folder of images once, into one array that training reads in a second.

python scripts/pack_images.py cifar10 --root DIR --out cifar10.npz         DIR/{train,test}/<class>/*.jpg
python scripts/train.py data=cifar10 data.source=array data.root=cifar10.npz
"""

import sys
from pathlib import Path

from actpress.train import cli, command, data
from actpress.train.data import sources
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(given: list[str]) -> None:
    parser = command.Parser(__doc__)
    allowed = [name for name, kinds in sources.SOURCES.items() if "array" in kinds]
    parser.add_choice("data", allowed, "the data set")
    parser.add_argument("--root", required=True, help="folder of the images")
    parser.add_argument("--out", type=Path, required=True, help="file to write, such as cifar10.npz")
    options = parser.parse_args(given)
    with bad_input():
        overrides = [f"data={options.data}", "data.source=folder", f"data.root='{options.root}'"]
        opened = data.open_images(cli.compose(overrides, CONFIGS).data)
        sources.save_array(options.out, opened.train, opened.test, opened.facts["fingerprint"])
    print(f"{options.out}: {len(opened.train)} train and {len(opened.test)} test images, {opened.facts['label']}")


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
