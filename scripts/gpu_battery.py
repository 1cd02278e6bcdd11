"""Everything a GPU is needed for, in one command that can be stopped and goes on: tests, kernel times, memory, throughput, largest batches,
training at a paper's recipe.

python scripts/gpu_battery.py                         540 seconds of it; again, for the next 540; one archive of all results
python scripts/gpu_battery.py dry=true                the plan: what is done, what is left, how long it takes
python scripts/gpu_battery.py profile=tiny            the same stages on a CPU, in minutes: do they run?
python scripts/gpu_battery.py only=tests,kernels      units whose names begin so
python scripts/gpu_battery.py cifar=FILE.tar.xz       CIFAR-10 as image files for the training runs; or $ACTPRESS_DATA, see the README

budget: seconds, of which some are kept back for packing. out: the folder of state, results and the archive (outputs/battery).
resume=FILE: go on from an archive of another machine. reuse=any: what another state of the source measured counts as done.
retry=true: repeat what failed. fresh=true: start over. Needs no network, no git and no W&B.

Exit codes: 0 no unit failed (some may be left); 1 one failed, or with all=true is left; 2 bad input; 130 interrupted.
"""

import multiprocessing
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from actpress import arguments, battery, battery_units, bundle, cli, record, source, workload
from actpress.run import bad_input

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = {
    "budget": 540.0,
    "profile": "full",
    "out": "outputs/battery",
    "dry": False,
    "only": (),
    "cifar": None,
    "resume": None,
    "reuse": "here",
    "retry": False,
    "fresh": False,
    "all": False,
}


def main(given: list[str]) -> int:
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's goodbye: stop the unit, pack, end
    with bad_input():
        options = arguments.read(given, OPTIONS)
        if options["reuse"] not in ("here", "any"):
            raise ValueError(f"reuse={options['reuse']}, allowed: here, any")
        profile = battery_units.load(ROOT, options["profile"])
        out = Path(options["out"]).resolve()
        prepare(out, options)
        environment = surroundings(profile, options)
        path = out / "environment.json"
        there = record.read(path, {"device": str}) if path.exists() else environment
        if there["device"] != environment["device"] and not options["dry"]:
            raise ValueError(
                f"{out} holds results of {there['device']}, this is {environment['device']}; name another folder with out="
            )
        cifar = Path(options["cifar"]).resolve() if options["cifar"] else None
        device = "cpu" if profile["device"] == "cpu" else "auto"
        place = battery_units.Place(ROOT, out, environment["source"], device, cifar)
        units = battery_units.units(profile, place, options["only"])
        ours = battery.Battery(
            units,
            out,
            environment,
            options["profile"],
            ROOT,
            begin + options["budget"],
            options["reuse"] == "any",
            options["retry"],
        )
    print(
        f"{environment['device']}, source {environment['source'][:12]}, profile {options['profile']}, {out}", flush=True
    )
    if options["dry"]:
        print("\n".join(ours.plan()))
        return 0
    code = ours.run(lambda: bundle.pack(out, environment["device"]))
    archive = next(out.glob("battery-*.tar.gz"))
    print(f"{archive}: {archive.stat().st_size / 2**20:.2f} MiB, for `make import-results FILE=...`")
    return int(code or (options["all"] and ours.left() > 0))


def prepare(out: Path, options: dict[str, Any]) -> None:
    """Start over, or lay out what another machine measured. A dry run changes nothing."""
    if options["dry"]:
        return
    if options["fresh"]:
        battery.forget(out)
    if options["resume"]:
        if (out / "state.json").exists():
            raise ValueError(
                f"resume={options['resume']}, but {out} has a state already; name another folder with out=, or add fresh=true"
            )
        bundle.restore(Path(options["resume"]), out)


def surroundings(profile: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The environment, asked for in another process, so that this one holds no memory of the device."""
    needed = profile["device"]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        device = "cpu" if needed == "cpu" else "auto"
        environment = pool.submit(workload.environment, device, source.source_id(ROOT)).result()
    if environment["device_type"] != needed:
        if not options["dry"]:
            raise ValueError(
                f"profile={options['profile']} needs a CUDA device and torch sees none; allowed here: profile=tiny, dry=true"
            )
        environment["device"] = "no CUDA device here"
    return environment


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
