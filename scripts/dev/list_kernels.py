"""What prebuild_kernels.py is to compile for a battery: the kernel cases and training steps of a profile's units, as YAML.

PYTHONPATH=scripts python scripts/dev/list_kernels.py lease >LIST.yaml       reads the options of the scripts that units run
"""

import shlex
import sys
from pathlib import Path

import yaml
from hydra.utils import instantiate

import bench_kernels
import bench_training
import short_training
from actpress.bench import battery
from actpress.kernels.proof import registry
from actpress.train import cli, command
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(given: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_argument("profile", help="a name of configs/battery")
    with bad_input():
        units = battery.load(CONFIGS / "battery", parser.parse_args(given).profile).units
    steps, cases = [], []
    for script, *words in (shlex.split(unit.run.replace("{seconds}", "1")) for unit in units):
        if script.endswith("bench_kernels.py"):
            cases += cases_of(bench_kernels.parser().parse_args(words))
        elif script.endswith("bench_training.py"):
            options = bench_training.parser().parse_args(words)
            step = {"model": options.model, "batch": options.batch, "precision": options.precision}
            steps += [{**step, "method": method} for method in compiled(options.methods)]
        elif script.endswith("short_training.py"):
            options = short_training.parser().parse_args(words)
            cfg = cli.compose(list(options.overrides), CONFIGS)
            step = {"model": cfg.model.name, "batch": cfg.recipe.batch_size, "image_size": cfg.data.image_size}
            step |= {"classes": cfg.data.num_classes, "precision": cfg.runtime.precision}
            step |= {"channels_last": cfg.runtime.channels_last}
            steps += [{**step, "method": method} for method in compiled(options.methods)]
    yaml.safe_dump({"steps": steps, "cases": cases}, sys.stdout)


def cases_of(options) -> list[list[str]]:
    """[case, dtype] of each case that bench_kernels.py is to measure: the unit's dtype, else the first that the case has."""
    found, wanted = registry.all_cases(), []
    for case in options.names:
        dtypes = [registry.name_of(dtype) for dtype in found[case].dtypes]
        wanted.append([case, options.dtypes[0] if options.dtypes[0] in dtypes else dtypes[0]])
    return wanted


def compiled(methods: tuple[str, ...]) -> list[str]:
    """The methods that replace layers, and so may launch kernels of their own."""
    return [name for name in methods if instantiate(cli.compose([f"method={name}"], CONFIGS).method).rules()]


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
