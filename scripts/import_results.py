"""Add the archive of `make gpu-battery` to results/: records, kernel times, and a page for the device.

python scripts/import_results.py battery-<device>.tar.gz
python scripts/import_results.py FILE replace=true        where they differ, the archive's word counts
python scripts/import_results.py FILE results=DIR         another folder

What is there already is left alone; a difference ends with exit code 2 before anything is written. The archive may be an earlier or a later
one of the same battery. Run it in a checkout of the source that was measured: its commit is noted where the machine had no git.
"""

import sys
from pathlib import Path

import kernel_report
from actpress import arguments, battery_page, bundle, cli
from actpress.run import bad_input

ROOT = Path(__file__).resolve().parents[1]


def main(given: list[str]) -> int:
    with bad_input():
        if not given or "=" in given[0]:
            raise ValueError(
                f"arguments {' '.join(given)!r}, allowed: the path of an archive, then replace=true, results=DIR"
            )
        options = arguments.read(given[1:], {"replace": False, "results": str(ROOT / "results")})
        results = Path(options["results"]).resolve()
        plan = bundle.merge(bundle.read(Path(given[0])), results, ROOT, options["replace"])
        if plan.conflicts:
            more = f" (and {len(plan.conflicts) - 1} more)" if len(plan.conflicts) > 1 else ""
            raise ValueError(f"{plan.conflicts[0]}{more}; nothing was imported, replace=true takes the archive's word")
    plan.write()
    written = list(plan.files)
    for path in plan.files:
        if path.parent.name == "kernels":
            kernel_report.render(path)
            written += [path.with_suffix(".md"), path.with_suffix(".png")]
    for folder in {path.parent for path in plan.files if path.parent.parent.name == "battery"}:
        written += battery_page.write(folder)
    print("\n".join(f"wrote {path.relative_to(results)}" for path in written) or "everything was there already")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(lambda: main(sys.argv[1:])))
