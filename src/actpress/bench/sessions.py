"""Sessions of steps.py in a JSON file, so that the same command resumes: {setting, sessions: [{environment, rows}]}.

Rows are written as they come. What the file lacks is measured in a session of its own, beside stock again.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from actpress.bench import steps
from actpress.train import config, provenance, record


class Sessions:
    """The sessions of one setting. path: the file, None to write none. kind: what the file holds beside the setting.

    Raises ValueError if the file holds another setting.
    """

    def __init__(self, setting: steps.Setting, environment: dict[str, Any], path: Path | None, **kind: Any):
        self._path = path
        self._current: dict[str, Any] = {"environment": environment, "rows": []}
        self._found = {"setting": asdict(setting) | kind, "sessions": []}
        if path and path.exists():
            found = record.read(path, {"setting": dict, "sessions": list})
            if found["setting"] != self._found["setting"]:
                raise ValueError(f"{path} holds another setting, {found['setting']}; remove it or name another file")
            self._found = found

    @property
    def before(self) -> steps.Rows:
        """Rows of earlier sessions that did not fail."""
        return [row for session in self._found["sessions"] for row in session["rows"] if row["status"] != "failed"]

    def write(self, rows: steps.Rows) -> None:
        """Print the newest row and write the file."""
        self._current["rows"] = rows
        print(describe(rows[-1]), flush=True)
        if self._path:
            record.write(self._path, {**self._found, "sessions": [*self._found["sessions"], self._current]})


def compare(setting: steps.Setting, methods: Sequence[str], configs: Path, path: Path | None) -> int:
    """Measure the methods that the file lacks, beside stock. Returns 1 if one failed or was not measured, else 0. Raises ValueError."""
    sessions = Sessions(setting, _environment(setting, methods, configs), path, largest=False)
    before = sessions.before
    missing = [name for name in methods if name not in {row["method"] for row in before}]
    if missing and not setting.predict:
        rest = [name for name in missing if name != steps.STOCK]
        missing = [steps.STOCK, *rest, *([steps.AGAIN] if rest else [])]
    rows = steps.measure_all(setting, missing, configs, sessions.write)
    print(f"{setting.model} {setting.precision}: {len(rows)} of {len(missing)} rows measured, {len(before)} were there")
    return int(len(rows) < len(missing) or any(row["status"] == "failed" for row in rows))


def largest_batches(setting: steps.Setting, methods: Sequence[str], configs: Path, path: Path | None, step: int) -> int:
    """Search the largest batch of each method, known to `step` images. Returns 1 if a probe failed, else 0. Raises ValueError."""
    environment = _environment(setting, methods, configs)
    setting = replace(setting, memory=setting.memory or environment["memory_bytes"] or 0)
    if not setting.memory:
        raise ValueError(f"memory={setting.memory}, allowed here: numbers from 1")
    sessions = Sessions(setting, environment, path, largest=True)
    rows = steps.find_largest_batches(setting, methods, configs, step, sessions.before, sessions.write)
    return int(any(row["status"] == "failed" for row in rows))


def _environment(setting: steps.Setting, methods: Sequence[str], configs: Path) -> dict[str, Any]:
    """Where the session runs. Raises ValueError for an unknown method, model or device."""
    steps.check_methods(methods, configs)
    setting.training_config(configs, steps.STOCK)
    return provenance.environment(config.device(setting.device))


def describe(row: dict[str, Any]) -> str:
    """One line for a row: medians, and what is not None."""
    found = {key: value["median"] if isinstance(value, dict) else value for key, value in row.items()}
    shown = {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in found.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items() if value is not None)
