"""The page of a GPU battery, results/battery/<device>-<time>.md, and the table of README.md that shows the newest one.

Speeds are compared within a session only: one process on one device. Saved bytes stand beside those predicted with fake tensors for the
same setting, results/battery/predicted/*.json, which bench_training.py writes without a device.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from actpress.bench import steps
from actpress.train import record

RUN = ("run_id", "status", "metrics.epochs", "metrics.top1_last", "metrics.top1_best")
IDENTITY = ("driver", "copy_gib_per_s", "product_tflops", "kernel_cache")
SHORT = ["steps of", "batch", "method", "images/s", "of stock", "step ms", "host ms", "peak MiB", "saved MiB"]
BLOCK = re.compile(r"(?<=<!-- newest GPU -->\n).*?(?=<!-- end -->)", re.DOTALL)
Parts = Mapping[str, dict[str, Any]]


def render(folder: Path) -> str:
    """The page of a battery whose files are in `folder`, a folder of results/battery."""
    parts = _parts(folder)
    predicted = [record.read(path) for path in sorted((folder.parent / "predicted").glob("*.json"))]
    runs = [record.read(path, record.RUN) for path in sorted((folder.parent.parent / "runs").glob("*.json"))]
    return "\n".join([*_head(parts), *_table(_steps(parts, predicted)), *_trained(parts, runs)])


def in_readme(readme: str, battery: Path) -> str:
    """README.md with the training steps of the GPU that was measured last. battery: results/battery."""
    found = [(page.parent, _parts(page.parent)) for page in battery.glob("*/identity.json")]
    gpus = [(parts["identity"]["environment"], folder, parts) for folder, parts in found]
    gpus = sorted((gpu for gpu in gpus if gpu[0]["device_type"] == "cuda"), key=lambda gpu: gpu[0]["date"])
    if not gpus:
        return BLOCK.sub("No GPU has been measured yet: not run.\n", readme)
    here, folder, parts = gpus[-1]
    frame = _steps(parts, [])
    frame = frame[(frame["status"] == "ok") & (frame["method"] != steps.AGAIN)][SHORT]
    text = f"On an {here['device']} ({here['date'][:10]}, [everything measured](results/battery/{folder.name}.md)):\n\n"
    return BLOCK.sub(lambda _: text + "\n".join(_table(frame)), readme)


def _parts(folder: Path) -> Parts:
    return {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}


def _table(frame: pd.DataFrame) -> Iterator[str]:
    shown = frame.astype(object).where(frame.notna(), "").replace({r"\|": "/"}, regex=True)
    yield from (shown.map(lambda x: x[:80] if isinstance(x, str) else x).to_markdown(index=False, floatfmt=".4g"), "")


def _head(parts: Parts) -> Iterator[str]:
    identity = parts["identity"]
    here = identity["environment"]
    yield f"# {here['device']}, {here['date'][:10]}\n"
    if here["device_type"] == "cpu":
        yield "**No GPU: a rehearsal on small inputs. These numbers say nothing about speed.**\n"
    facts = [f"{name} {here[name]}" for name in ("torch", "triton", "cuda", "python", "commit")]
    facts += [f"{name} {identity[name]}" for name in IDENTITY]
    yield f"{', '.join(facts)}{'; files changed since that commit' if here['dirty'] else ''}.\n"
    units = pd.DataFrame(parts["units"]["units"]).T.rename_axis("unit").reset_index()
    yield from _table(units[["unit", "status", "seconds", "limit", *({"commit"} & {*units}), "said"]])


def _steps(parts: Parts, predicted: list[dict[str, Any]]) -> pd.DataFrame:
    """A line for each row of a session. Of a search for the largest batch only the edge, without times: its steps are too few for those."""
    rows = [(part["setting"], row) for part in predicted for session in part["sessions"] for row in session["rows"]]
    saved = {_key(setting, row): row.get("predicted_bytes") for setting, row in rows}
    lines = []
    for setting, rows in [(p["setting"], s["rows"]) for p in parts.values() for s in p.get("sessions", ())]:
        stock = next((row for row in rows if row["method"] == steps.STOCK), {})
        if setting["memory"]:
            times = dict.fromkeys(("images_per_s", "step_ms", "host_ms"))
            rows, stock = [row | times for row in rows if _at_the_edge(row, rows)], {}
        lines += [_line(setting, row, stock, saved.get(_key(setting, row))) for row in rows]
    return pd.DataFrame(lines)


def _at_the_edge(row: Mapping[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether this is the largest batch of its method that fits, or the smallest that does not."""
    same = [other["batch"] for other in rows if (other["method"], other["status"]) == (row["method"], row["status"])]
    return row["batch"] == (max(same) if row["status"] == "ok" else min(same))


def _key(setting: Mapping[str, Any], row: Mapping[str, Any]) -> tuple:
    same = ("model", "image_size", "num_classes", "precision", "compile")
    return (row["method"], row["batch"], *(setting[key] for key in same))


def _line(setting: Mapping[str, Any], row: Mapping[str, Any], stock: Mapping[str, Any], predicted: int | None) -> dict:
    speed, base = row.get("images_per_s") or {}, stock.get("images_per_s") or {}
    how = [", compiled"] * setting["compile"] + [f", {setting['memory'] / 2**30:.3g} GiB"] * bool(setting["memory"])
    line = {"steps of": f"{setting['model']}, {setting['image_size']} px, {setting['precision']}{''.join(how)}"}
    line |= {"batch": row["batch"], "method": row["method"], "status": row["status"], "why": row["message"]}
    line |= {"images/s": speed.get("median"), "IQR": speed.get("iqr"), "n": speed.get("n")}
    line["of stock"] = speed["median"] / base["median"] if speed and base else None
    line |= {f"{key} ms": (row.get(f"{key}_ms") or {}).get("median") for key in ("step", "host")}
    sizes = {key: row.get(f"{key}_bytes") for key in ("peak", "peak_reserved", "saved")} | {"predicted": predicted}
    return line | {f"{key.replace('_', ' ')} MiB": size and f"{size / 2**20:,.0f}" for key, size in sizes.items()}


def _trained(parts: Parts, runs: list[dict[str, Any]]) -> Iterator[str]:
    """Runs of the same device and commit."""
    here = parts["identity"]["environment"]
    ours = [run for run in runs if all(run["environment"][key] == here[key] for key in ("device", "commit"))]
    if ours:
        frame = pd.json_normalize(ours)[list(RUN)]
        yield from _table(frame.set_axis(["run", "status", "epochs", "top-1 %", "best"], axis=1))
