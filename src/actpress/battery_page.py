"""A battery's results as a page and as CSV, from the JSON files that bundle.merge keeps for a device.

Every ratio is between rows of one session, which is one process on one device, but for largest batches, where each probe is a process.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actpress import record, workload
from actpress.battery import slug
from actpress.limits import Probe, bounds

SETTING = ("model", "batch", "image_size", "precision", "compile", "channels_last", "memory")
ROW = ("method", "status", "message", "predicted_saved_bytes", "saved_bytes", "peak_bytes", "peak_reserved_bytes")
PLACE = ("device", "torch", "triton", "python", "commit", "dirty", "date")
SHOWN = {key: record.RUN[key] for key in ("status", "metrics")} | {"data": {"label": str}}  # of a run's record
Rows = list[dict[str, Any]]


def write(folder: Path) -> list[Path]:
    """Make the page, <folder>.md, and memory.csv, throughput.csv and largest.csv in the folder; returns what was written."""
    parts = {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}
    files = {folder.parent / f"{folder.name}.md": page(parts, folder)}
    for stage, rows in (("memory", stepped), ("throughput", stepped), ("largest", largest)):
        if found := rows(parts.get(stage, {})):
            files[folder / f"{stage}.csv"] = as_csv(found)
    for path, text in files.items():
        with record.replacing(path) as file:
            file.write(text.encode())
    return list(files)


def stepped(units: Mapping[str, Any]) -> Rows:
    """Rows of memory or throughput, each with its setting, its place and its ratios to the session's stock."""
    rows = []
    for unit in units.values():
        for session in unit["sessions"]:
            stock = next((row for row in session["rows"] if row["method"] == workload.STOCK), {})
            for row in session["rows"]:
                speed = row.get("images_per_s") or {}
                base = (stock.get("images_per_s") or {}).get("median")
                rows.append(
                    {key: unit["setting"][key] for key in SETTING}
                    | {key: row.get(key) for key in ROW}
                    | {f"images_per_s_{key}": speed.get(key) for key in ("median", "iqr", "n")}
                    | {"times_stock": ratio(speed.get("median"), base)}
                    | {"peak_of_stock": ratio(row.get("peak_bytes"), stock.get("peak_bytes"))}
                    | {"first_step_seconds": row.get("first_step_seconds")}
                    | {key: session["environment"].get(key) for key in PLACE}
                )
    return rows


def largest(units: Mapping[str, Any]) -> Rows:
    """A row for each method and setting whose search has begun."""
    rows = []
    for unit in units.values():
        probes = [probe for session in unit["sessions"] for probe in session["probes"]]
        fits, fails = bounds([Probe(probe["batch"], probe["status"] == "ok") for probe in probes])
        rows.append(
            {key: unit["setting"][key] for key in SETTING if key != "batch"}
            | {"method": unit["method"], "largest_batch": fits, "out_of_memory_at": fails, "probes": len(probes)}
            | {key: unit["sessions"][-1]["environment"].get(key) for key in PLACE}
        )
    stock = {_setting(row): row["largest_batch"] for row in rows if row["method"] == workload.STOCK}
    for row in rows:
        row["times_stock"] = ratio(row["largest_batch"], stock.get(_setting(row)))
    return rows


def _setting(row: Mapping[str, Any]) -> tuple:
    return tuple(row[key] for key in SETTING if key != "batch")


def ratio(value: float | None, base: float | None) -> float | None:
    return round(value / base, 4) if value and base else None


def as_csv(rows: Rows) -> str:
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def page(parts: Mapping[str, Any], folder: Path) -> str:
    """The page of one device in Markdown. parts: name of each JSON file -> its content."""
    units = parts.get("units", {})
    device = next((entry["device"] for entry in units.values()), folder.name)
    profile = folder.name.removeprefix(slug(device)).strip("-")
    lines = [
        f"# {device}"
        + (f", profile {profile}: shows that the battery runs; its numbers mean nothing" if profile else ""),
        "",
        "Made by `make import-results` from what `make gpu-battery` measured; nothing is typed. Data: the JSON and CSV files in",
        f"[{folder.name}]({folder.name}).",
        "",
    ]
    lines += [*_section("Tests on the device", _tests(parts.get("tests", {}))), *_wrong(parts.get("tests", {}))]
    kernels = folder.parents[1] / "kernels" / f"{folder.name}.md"
    if kernels.exists():
        lines += ["## Kernels", "", f"[{kernels.stem}](../kernels/{kernels.name})", ""]
    memory, throughput = (stepped(parts.get(stage, {})) for stage in ("memory", "throughput"))
    batches = largest(parts.get("largest", {}))
    lines += _section(
        "Memory of one training step",
        _memory(memory),
        "Predicted: with fake tensors, no device. Peak: the allocator's on a GPU.",
    )
    lines += _section(
        "Training throughput",
        _throughput(throughput),
        "Median of n timed steps and interquartile range, synthetic images on the device. Ratios are to stock in the same process; "
        f'"{workload.AGAIN}" is stock measured once more at its end, which shows how far the device drifted.',
    )
    lines += _section(
        "Largest batch", _largest(batches), "Each probe is a process of its own; known to three percent or the step."
    )
    failed = [row for row in (*memory, *throughput) if row["status"] == "failed"]
    lines += [f"- {row['model']} {row['precision']}, {row['method']} failed: {_cell(row['message'])}" for row in failed]
    lines += [""] if failed else []
    lines += _section("Training runs", list(_runs(units, folder.parents[1] / "runs")))
    unfinished = [
        [name, entry["status"], entry["message"]] for name, entry in units.items() if entry["status"] != "done"
    ]
    lines += _section("Not finished", [["unit", "status", "last line"], *unfinished] if unfinished else [])
    environments = {tuple(row[key] for key in PLACE[:-1]): row["date"] for row in (*memory, *throughput, *batches)}
    places = [_place(dict(zip(PLACE, key, strict=False)), date) for key, date in environments.items()]
    return "\n".join([*lines, *places])


def _section(title: str, table: Sequence[Sequence[Any]], note: str | None = None) -> list[str]:
    """A table, its first row the head; nothing if it has no rows."""
    if len(table) < 2:
        return []
    body = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table]
    return [
        f"## {title}",
        "",
        body[0],
        f"| {' | '.join(['---'] * len(table[0]))} |",
        *body[1:],
        "",
        *([note, ""] if note else []),
    ]


def _cell(value: Any) -> str:
    return "" if value is None else str(value).replace("|", "/")


def _tests(units: Mapping[str, Any]) -> list[list[Any]]:
    names = ("passed", "failures", "errors", "skipped", "seconds")
    return [
        ["file", *names],
        *([name.removeprefix("tests-"), *(unit[key] for key in names)] for name, unit in units.items()),
    ]


def _wrong(units: Mapping[str, Any]) -> list[str]:
    wrong = [
        f"- `{found['test']}` ({name}): {_cell(found['message'])}"
        for name, unit in units.items()
        for found in unit["wrong"]
    ]
    return [*wrong, ""] if wrong else []


def _memory(rows: Rows) -> list[list[Any]]:
    head = [
        "model",
        "batch",
        "precision",
        "method",
        "saved, MiB: predicted",
        "saved, MiB: measured",
        "peak, MiB",
        "reserved, MiB",
        "peak / stock",
    ]
    columns = ("predicted_saved_bytes", "saved_bytes", "peak_bytes", "peak_reserved_bytes")
    shown = [row for row in rows if row["status"] != "not applicable"]
    return [
        head,
        *([*_names(row), *(_mib(row[key]) for key in columns), _times(row["peak_of_stock"])] for row in shown),
    ]


def _throughput(rows: Rows) -> list[list[Any]]:
    head = [
        "model",
        "batch",
        "precision",
        "method",
        "mode",
        "images/s",
        "IQR",
        "n",
        "/ stock",
        "peak, MiB",
        "peak / stock",
    ]
    shown = [row for row in rows if row["status"] != "not applicable"]
    return [
        head,
        *(
            [
                *_names(row),
                "compile" if row["compile"] else "eager",
                *(_speed(row[f"images_per_s_{key}"]) for key in ("median", "iqr")),
                row["images_per_s_n"],
                _times(row["times_stock"]),
                _mib(row["peak_bytes"]),
                _times(row["peak_of_stock"]),
            ]
            for row in shown
        ),
    ]


def _largest(rows: Rows) -> list[list[Any]]:
    head = ["model", "precision", "method", "largest that fits", "smallest that does not", "/ stock", "probes"]
    names = ("model", "precision", "method", "largest_batch", "out_of_memory_at")
    return [head, *([*(row[key] for key in names), _times(row["times_stock"]), row["probes"]] for row in rows)]


def _runs(units: Mapping[str, Any], runs: Path) -> Iterator[list[Any]]:
    yield ["run", "status", "epochs", "top-1 last, %", "top-1 best, %", "images/s", "peak, MiB", "data"]
    for entry in units.values():
        path = runs / f"{entry.get('run_id')}.json"
        if path.exists():
            found = record.read(path, SHOWN)
            numbers = found["metrics"]
            accuracies = (
                f"{numbers[key]:.2f}" if numbers[key] is not None else None for key in ("top1_last", "top1_best")
            )
            speed = _speed((numbers["train_images_per_s"] or {}).get("median"))
            link = f"[{path.stem}](../runs/{path.name})"
            yield [
                link,
                found["status"],
                numbers["epochs"],
                *accuracies,
                speed,
                _mib(numbers["peak_bytes"]),
                found["data"]["label"],
            ]


def _names(row: Mapping[str, Any]) -> list[Any]:
    """What a row is about; a method that did not work says so beside its name."""
    method = row["method"] if row["status"] == "ok" else f"{row['method']}: {row['status'].upper()}"
    return [row["model"], row["batch"], row["precision"], method]


def _mib(value: int | None) -> str | None:
    return None if value is None else f"{value / 2**20:.1f}"


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}x"


def _speed(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _place(place: Mapping[str, Any], date: str) -> str:
    changed = " with changes" if place["dirty"] else ""
    commit = f"commit {place['commit'][:10]}{changed}" if place["commit"] else "a source that is no commit here"
    versions = f"torch {place['torch']}, Triton {place['triton']}, Python {place['python']}"
    return f"Measured on {date[:10]}: {place['device']}, {versions}, {commit}.\n"
