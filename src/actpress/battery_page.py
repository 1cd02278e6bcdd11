"""The page of one battery, results/battery/<device>-<time>.md, from what its units wrote.

Ratios are taken within a session: one process on one device. Saved bytes stand beside what fake tensors predict of the same setting,
results/battery/predicted/*.json, which bench_training.py writes without a device.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from actpress import record, workload

RUN = ("run_id", "status", "metrics.epochs", "metrics.top1_last", "metrics.top1_best")
Parts = Mapping[str, dict[str, Any]]


def write(folder: Path) -> None:
    """Make the page beside the folder."""
    parts = {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}
    predicted = [record.read(path) for path in sorted((folder.parent / "predicted").glob("*.json"))]
    runs = [record.read(path, record.RUN) for path in sorted((folder.parent.parent / "runs").glob("*.json"))]
    with record.replacing(folder.with_name(f"{folder.name}.md")) as file:
        file.write("\n".join([*_head(parts), *_measured(parts, predicted), *_trained(parts, runs)]).encode())


def _table(frame: pd.DataFrame) -> Iterator[str]:
    shown = frame.astype(object).where(frame.notna(), "").replace({r"\|": "/"}, regex=True)
    yield from (shown.to_markdown(index=False, floatfmt=".4g"), "")


def _head(parts: Parts) -> Iterator[str]:
    identity = parts["identity"]
    here = identity["environment"]
    yield f"# {here['device']}, {here['date'][:10]}\n"
    if here["device_type"] == "cpu":
        yield "**No GPU: a rehearsal on small inputs. These numbers say nothing about speed.**\n"
    facts = [f"{name} {here[name]}" for name in ("torch", "triton", "cuda", "python", "commit")]
    facts += [f"{name} {identity[name]}" for name in ("driver", "copy_gib_per_s", "product_tflops", "kernel_cache")]
    yield f"{', '.join(facts)}{'; files changed since that commit' if here['dirty'] else ''}.\n"
    units = pd.DataFrame(parts["units"]["units"]).T.rename_axis("unit").reset_index()
    yield from _table(units[["unit", "status", "seconds", "limit", "said"]])


def _measured(parts: Parts, predicted: list[dict[str, Any]]) -> Iterator[str]:
    rows = [(part["setting"], row) for part in predicted for session in part["sessions"] for row in session["rows"]]
    saved = {_key(setting, row): row.get("predicted_bytes") for setting, row in rows}
    for name, part in parts.items():
        if "sessions" in part:
            setting, mode = part["setting"], "compiled" if part["setting"]["compile"] else "eager"
            memory = f", {setting['memory'] / 2**30:.3g} GiB" if setting["memory"] else ""
            yield f"## {name}: {setting['model']}, {setting['image_size']} px, {setting['precision']}, {mode}{memory}\n"
            for session in part["sessions"]:
                stock = [row for row in session["rows"] if row["method"] == workload.STOCK]
                base = stock[0] if len(stock) == 1 else {}  # not among the probes of a search
                lines = [_line(row, base, saved.get(_key(setting, row))) for row in session["rows"]]
                yield from _table(pd.DataFrame(lines).dropna(axis=1, how="all"))


def _key(setting: Mapping[str, Any], row: Mapping[str, Any]) -> tuple:
    same = ("model", "image_size", "num_classes", "precision", "compile")
    return (row["method"], row["batch"], *(setting[key] for key in same))


def _line(row: Mapping[str, Any], stock: Mapping[str, Any], predicted: int | None) -> dict[str, Any]:
    speed, base = row.get("images_per_s") or {}, stock.get("images_per_s") or {}
    line = {"method": row["method"], "batch": row["batch"], "status": row["status"], "why": row["message"]}
    line |= {"images/s": speed.get("median"), "IQR": speed.get("iqr"), "n": speed.get("n")}
    line["of stock"] = speed["median"] / base["median"] if speed and base else None
    line |= {f"{key} ms": (row.get(f"{key}_ms") or {}).get("median") for key in ("step", "host")}
    sizes = {key: row.get(f"{key}_bytes") for key in ("peak", "peak_reserved", "saved")} | {"predicted": predicted}
    return line | {f"{key.replace('_', ' ')} MiB": size and size / 2**20 for key, size in sizes.items()}


def _trained(parts: Parts, runs: list[dict[str, Any]]) -> Iterator[str]:
    """Runs of the same device and commit."""
    here = parts["identity"]["environment"]
    ours = [run for run in runs if all(run["environment"][key] == here[key] for key in ("device", "commit"))]
    if ours:
        yield "## Training\n"
        yield from _table(
            pd.json_normalize(ours)[list(RUN)].set_axis(["run", "status", "epochs", "top-1 %", "best"], axis=1)
        )
