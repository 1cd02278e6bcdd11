"""Run tests with the oldest supported versions, those of constraints-oldest.txt, in an environment of their own.

python3.12 scripts/dev/oldest.py short    the contract of layers and all kernels in Triton's interpreter
python3.12 scripts/dev/oldest.py full     also layers, ops and what differs between versions of PyTorch; written to results/versions.json
python3.12 scripts/dev/oldest.py render   the line of README.md from that record; --check: write nothing, exit 1 if the line differs

The environment is OLDEST_VENV, .venv-oldest if unset. The Python that runs this script makes it, anew when the versions change. The script
needs nothing but the standard library.
"""

import json
import os
import re
import subprocess
import sys
import time
import venv
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS, RECORD, README = ROOT / "constraints-oldest.txt", ROOT / "results" / "versions.json", ROOT / "README.md"
ENVIRONMENT = ("python", "torch", "torchvision", "triton", "numpy", "timm", "commit", "dirty")
LINE = re.compile(r"(<!-- oldest versions -->\n)(?:.*\n)?(<!-- end -->)")

KERNELS = ["methods/test_contract.py", "kernels", "scripts/dev/test_reductions.py"]
FORMS = {
    "short": (KERNELS, ["-k", "not test_compiles_in_one_graph"]),  # Dynamo takes minutes over every method
    "full": (
        [
            *KERNELS,
            *("layers", "measure", "swap", "bench", "train/test_train.py", "scripts/dev/test_prebuild.py"),
            *(f"methods/test_{name}.py" for name in ("relu_mask", "scaled_tokens", "situations")),
        ],
        ["-m", "not gpu", "-k", "not past_two_to_the_31 and not ahead_of_time"],  # of one size of tensor, of one Triton
    ),
}


def installed() -> Path:
    """The environment's Python; the environment is created first if it is missing or has other versions."""
    folder = ROOT / os.environ.get("OLDEST_VENV", ".venv-oldest")
    python, stamp = folder / "bin" / "python", folder / ".actpress-installed"
    versions = CONSTRAINTS.read_text()
    if stamp.is_file() and stamp.read_text() == versions:
        return python
    if sys.version_info[:2] != (3, 12):
        sys.exit(f"error: Python {sys.version_info[0]}.{sys.version_info[1]}, allowed: 3.12, of which the versions are")
    begin = time.monotonic()
    venv.create(folder, with_pip=True, clear=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", CONSTRAINTS, "-e", ".[dev,text]"], cwd=ROOT, check=True)
    stamp.write_text(versions)
    print(f"installed in {time.monotonic() - begin:.0f} s", flush=True)
    return python


def tested(python: Path, form: str) -> dict:
    """Run the tests of a form. Returns its record."""
    patterns, options = FORMS[form]
    files = [str(file.relative_to(ROOT)) for pattern in patterns for file in sorted((ROOT / "tests").glob(pattern))]
    report = ROOT / "outputs" / "oldest.xml"
    report.parent.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    begin = time.monotonic()
    workers = os.environ.get("WORKERS", "2")
    command = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        workers,
        "--dist",
        "worksteal",
        f"--junitxml={report}",
        *options,
        *files,
    ]
    subprocess.run(command, cwd=ROOT)
    if not report.is_file():
        sys.exit("error: the tests did not run to their end")
    counts = {
        name: sum(int(suite.get(name)) for suite in ElementTree.parse(report).iter("testsuite"))
        for name in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    return {
        "form": form,
        "date": datetime.now(UTC).date().isoformat(),
        **environment_of(python),
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "skipped": counts["skipped"],
        "seconds": round(time.monotonic() - begin),
    }


def environment_of(python: Path) -> dict:
    """Versions in the environment, commit and dirty of this source."""
    code = "import json; from actpress.train import provenance; print(json.dumps(provenance.environment('cpu')))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {key: found[key] for key in ENVIRONMENT}


def rendered() -> str:
    """The text of README.md with the line of the record."""
    record = json.loads(RECORD.read_text())
    line = (
        f"Oldest versions tested: PyTorch {record['torch']}, Triton {record['triton']}, NumPy {record['numpy']}, Python {record['python']};"
        f" {record['passed']:,} tests passed, {record['failed']} failed, {record['skipped']} skipped ({record['date']},"
        f" commit {record['commit'][:7]}{', files changed since' if record['dirty'] else ''})."
    )
    text, found = LINE.subn(lambda match: f"{match[1]}{line}\n{match[2]}", README.read_text())
    if found != 1:
        sys.exit(f"error: README.md has {found} places for the line, allowed: 1")
    return text


def main(arguments: list[str]) -> int:
    if arguments in (["render"], ["render", "--check"]):
        text = rendered()
        if arguments[1:]:
            return int(README.read_text() != text)
        README.write_text(text)
        return 0
    if len(arguments) != 1 or arguments[0] not in FORMS:
        print(
            f"{__doc__}\nerror: {' '.join(arguments)!r}, allowed: short, full, render, render --check", file=sys.stderr
        )
        return 2
    record = tested(installed(), arguments[0])
    print(json.dumps(record, indent=1))
    if arguments[0] == "full":
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
        README.write_text(rendered())
    return int(record["failed"] > 0 or record["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
