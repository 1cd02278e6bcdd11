"""What holds the activations of a model, and what would a method save?

python scripts/audit.py model=resnet50 method=division batch=256        one method, or several: method=[division,...]
python scripts/audit.py model=resnet18 data=cifar10 batch=128 top=10    the ten largest; stock alone

batch: images (default 64). top: lines (default all). precision: fp32 (default), bf16, fp16. Everything else is an override of
configs/train.yaml; the images are ImageNet's size unless data= says otherwise. Predicted with fake tensors: nothing is allocated.
"""

import sys
from pathlib import Path

import hydra
import torch

import actpress
from actpress.train import cli, command, config
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DEFAULTS = {"batch": "64", "top": "0", "precision": "fp32", "method": "none"}  # of keys that are no overrides


def main(arguments: list[str]) -> None:
    options, overrides = dict(DEFAULTS), ["data=imagenet"]
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in options and equals:
            options[key] = value
        else:
            overrides.append(argument)
    with bad_input():
        batch, top = (command.whole_number(key, options[key], least) for key, least in (("batch", 1), ("top", 0)))
        if options["precision"] not in config.PRECISIONS:
            raise ValueError(
                f"precision={options['precision']} is unknown; choose one of {', '.join(config.PRECISIONS)}"
            )
        names = options["method"].strip("[]").split(",")
        configs = [cli.compose([*overrides, f"method={name.strip()}"], CONFIGS) for name in names]
        for cfg in configs:
            config.check(cfg)
        methods = [hydra.utils.instantiate(cfg.method) for cfg in configs]
        with torch.device("meta"):
            model = hydra.utils.instantiate(configs[0].model)
        if hasattr(model, "example_input"):
            raise ValueError(f"model={configs[0].model.name} does not read images; choose an image classifier")
        size = configs[0].data.image_size
        methods = [method for method in methods if method.changes_model]
        result = actpress.audit(model, (batch, 3, size, size), config.PRECISIONS[options["precision"]], methods)
    print(
        f"{configs[0].model.name}, batch {batch}, {size}x{size}, {options['precision']}: kept for backward, predicted"
    )
    print(result.table(top or None))


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
