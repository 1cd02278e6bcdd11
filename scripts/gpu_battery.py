"""What needs a GPU, with a time limit: tests, kernel times, memory, throughput, largest batches, training. configs/battery/ says what.

python scripts/gpu_battery.py --seconds 540                 540 seconds of --profile full; again, for the next 540
python scripts/gpu_battery.py --dry                         the plan: units, seconds, what is done
python scripts/gpu_battery.py --profile lease --call a      one call on a machine that is lent for minutes; --rehearse: on a CPU, small

Needs no network, no git and no W&B. Exit codes: 0 done; 1 a unit failed or was stopped; 2 bad input; 130 interrupted.
"""

import signal
import sys
from pathlib import Path

from actpress.bench import battery
from actpress.train import command
from actpress.train.run import bad_input

ROOT = Path(__file__).resolve().parents[1]


def main(given: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # sent by schedulers: stop the unit, pack, end
    parser = command.Parser(__doc__)
    parser.add_argument("--profile", default="full", help="a name of configs/battery (full)")
    parser.add_argument("--call", default="", help="the call of the profile")
    parser.add_argument("--seconds", type=command.seconds, default=0.0, help="time for the call (as in the profile)")
    parser.add_argument("--spent", type=command.seconds, default=0.0, help="seconds of the call that have passed (0)")
    parser.add_argument("--out", type=Path, help="folder of results (outputs/battery/<profile>)")
    parser.add_argument(
        "--archive", type=Path, help="folder that gets <profile><call>.tar.gz of them (parent of --out)"
    )
    parser.add_argument("--dry", action="store_true", help="print the plan, run nothing")
    parser.add_argument("--rehearse", action="store_true", help="run small versions of the units, on a CPU")
    options = parser.parse_args(given)
    with bad_input():
        profile = battery.load(ROOT / "configs" / "battery", options.profile)
        if options.call not in profile.calls and not options.dry:
            raise ValueError(f"--call {options.call}, allowed: {', '.join(profile.calls) or 'none'}")
    out = (options.out or ROOT / "outputs" / "battery" / profile.name).resolve()
    if options.dry:
        print("\n".join(profile.plan(battery.units_of(out))))
        return 0
    archive = (options.archive or out.parent).resolve() / f"{profile.name}{options.call}.tar.gz"
    seconds = (options.seconds or profile.calls[options.call]) - options.spent
    return battery.execute_call(profile, options.call, seconds, out, archive, ROOT, options.rehearse)


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:])))
