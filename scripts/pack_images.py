"""Decode a folder of images once, into one array that training reads in a second.

python scripts/pack_images.py cifar10 root=DIR out=cifar10.npz         DIR/{train,test}/<class>/*.jpg
python scripts/train.py data=cifar10 data.source=array data.root=cifar10.npz
"""

import sys
from pathlib import Path

from actpress.train import arguments, cli, command, data
from actpress.train.data import sources
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def main(given: list[str]) -> int:
    with bad_input():
        name, options = given[0] if given else "", arguments.read(given[1:], {"root": "", "out": ""})
        if name not in (allowed := [name for name, kinds in sources.SOURCES.items() if "array" in kinds]):
            raise ValueError(f"data set {name!r}, allowed: {', '.join(allowed)}")
        if not options["out"]:
            raise ValueError("out= must name a file, such as cifar10.npz")
        cfg = cli.compose([f"data={name}", "data.source=folder", f"data.root='{options['root']}'"], CONFIGS).data
        opened = data.open_images(cfg)
        sources.save_array(Path(options["out"]), opened.train, opened.test, opened.facts["fingerprint"])
    print(f"{options['out']}: {len(opened.train)} train and {len(opened.test)} test images, {opened.facts['label']}")
    return 0


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
