"""Where the time of a training step goes, kernel by kernel: methods beside stock, on one device in one process.

python scripts/dev/profile_step.py --batch 256 --methods none,division --out FILE.json        bf16 autocast, channels_last

What is measured: src/actpress/bench/profile.py.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from actpress.bench import steps
from actpress.bench.profile import PROFILED, describe, profile_step
from actpress.train import command, config, provenance, record
from actpress.train.run import bad_input

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def main(given: list[str]) -> None:
    parser = command.Parser(__doc__)
    parser.add_fields(steps.Setting)
    parser.add_argument("--methods", type=command.names, default=("none", "division"), help="names of configs/method")
    parser.add_argument("--out", type=Path, default=Path("profile.json"), help="JSON file (profile.json)")
    options = vars(parser.parse_args(given))
    methods, out = options.pop("methods"), options.pop("out")
    with bad_input():
        steps.check_methods(methods, CONFIGS)
        setting = steps.Setting(**options)
        environment = provenance.environment(config.device(setting.device))
    found: dict[str, Any] = {
        "setting": asdict(setting),
        "environment": environment,
        "profiled": PROFILED,
        "methods": {},
    }
    for method in methods:
        found["methods"][method] = profile_step(setting, method, CONFIGS)
        record.write(out, found)
        print(describe(method, found["methods"][method]), flush=True)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
