"""What prebuild_kernels.py is to compile for a battery: the kernel cases and training steps of a profile's units, as YAML.

python scripts/dev/list_kernels.py lease >LIST.yaml
"""

import shlex
import sys
from pathlib import Path

import yaml

from actpress.bench import battery
from actpress.bench import steps as training
from actpress.kernels.proof import registry
from actpress.train import cli, command

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(name: str) -> int:
    steps, cases = [], []
    for unit in battery.load(CONFIGS / "battery", name).units:
        script, *words = shlex.split(unit.run)
        options = dict(word.partition("=")[::2] for word in words)
        methods = [m for m in options.get("methods", "").split(",") if m not in (training.STOCK, *training.RIVALS)]
        if script.endswith("bench_kernels.py") and "names" in options:
            found = registry.all_cases()
            for case in options["names"].split(","):
                dtypes = [registry.name_of(dtype) for dtype in found[case].dtypes]
                cases.append([case, options["dtypes"] if options["dtypes"] in dtypes else dtypes[0]])
        elif script.endswith("bench_training.py"):
            step = {
                "model": options["model"],
                "batch": int(options["batch"]),
                "precision": options.get("precision", "bf16"),
            }
            steps += [{**step, "method": method} for method in methods]
        elif script.endswith("short_training.py"):
            cfg = cli.compose(options["overrides"].split(","), CONFIGS)
            step = {"model": cfg.model.name, "batch": cfg.recipe.batch_size, "image_size": cfg.data.image_size}
            step |= {"classes": cfg.data.num_classes, "precision": cfg.runtime.precision}
            steps += [{**step, "method": method, "channels_last": cfg.runtime.channels_last} for method in methods]
    yaml.safe_dump({"steps": steps, "cases": cases}, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(*sys.argv[1:]), __doc__))
