"""What needs a GPU, with a time limit: tests, kernel times, memory, throughput, largest batches, training. configs/battery/ says what.

python scripts/gpu_battery.py seconds=540                   540 seconds of profile=full; again, for the next 540
python scripts/gpu_battery.py dry=true                      the plan: units, seconds, what is done
python scripts/gpu_battery.py profile=lease call=a          one call of a machine that is lent for minutes; rehearse=true: on a CPU, small

out: the folder of results (outputs/battery/<profile>). archive: the folder that gets <profile><call>.tar.gz of them (out's parent).
spent: seconds of the call that are gone.
Needs no network, no git and no W&B. Exit codes: 0 done; 1 a unit failed or was stopped; 2 bad input; 130 interrupted.
"""

import signal
import sys
from pathlib import Path

from actpress.bench import battery
from actpress.train import arguments, command
from actpress.train.run import bad_input

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {"profile": "full", "call": "", "seconds": 0.0, "spent": 0.0, "out": "", "archive": ""}
OPTIONS |= {"dry": False, "rehearse": False}


def main(given: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's goodbye: stop the unit, pack, end
    with bad_input():
        options = arguments.read(given, OPTIONS)
        profile, call = battery.load(ROOT / "configs" / "battery", options["profile"]), options["call"]
        out = Path(options["out"] or ROOT / "outputs" / "battery" / profile.name).resolve()
        if call not in profile.calls and not options["dry"]:
            raise ValueError(f"call={call}, allowed: {', '.join(profile.calls) or 'none'}")
    if options["dry"]:
        print("\n".join(profile.plan(battery.units_of(out))))
        return 0
    archive = Path(options["archive"] or out.parent).resolve() / f"{profile.name}{call}.tar.gz"
    seconds = (options["seconds"] or profile.calls[call]) - options["spent"]
    return battery.execute_call(profile, call, seconds, out, archive, ROOT, options["rehearse"])


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
