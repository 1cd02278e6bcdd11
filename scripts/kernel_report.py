"""The table of scripts/bench_kernels.py: its rows, and the page and the plot that are made from them.

python scripts/kernel_report.py results/kernels/<device>.csv      writes the .md and the .png beside it anew

A row is a dict of strings, one per thing that was timed: `what` is kernel (in one of its configurations), stock, reference, compiled or
copy. p20, p50 and p80 are quantiles of n single runs. floor_bytes: each input read once and each output written once; moved_bytes: what the
kernel declares. gib_per_s is floor_bytes over p50, for stock too, whatever it moves; fraction_of_copy the time of a plain copy of
floor_bytes over that of the row; speedup_over_stock likewise. Both times come from one process on one device, as do all rows of a case.
"""

import csv
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

FIELDS = (
    *("case", "dtype", "what", "config", "status", "n", "p20_ms", "p50_ms", "p80_ms"),
    *("floor_bytes", "moved_bytes", "flops", "gib_per_s", "moved_gib_per_s", "tflops"),
    *("fraction_of_copy", "speedup_over_stock"),
    *("device", "torch", "triton", "cuda", "driver", "commit", "date"),
)
GOAL = 0.85  # of copy bandwidth, for what only moves bytes
PRODUCT_GOALS = (2, 3)  # times stock: pooled (k=2) and block-sparse (80%) weight gradients
NO_GPU = "Triton interpreter"
NO_COUNTERPART = "skipped: PyTorch has no counterpart"
COLORS = {"float32": "tab:blue", "float16": "tab:green", "bfloat16": "tab:orange"}
Row = dict[str, str]


def row(ms: Iterable[float] = (), **values: object) -> Row:
    """One row but for what is compared and where it was measured. ms: of single runs, none if the status is not ok."""
    made = dict.fromkeys(FIELDS, "") | {key: str(value) for key, value in values.items()}
    ms = list(ms)
    if ms:
        seconds = float(np.median(ms)) / 1000
        made |= {f"p{q}_ms": f"{np.percentile(ms, q):.6g}" for q in (20, 50, 80)} | {"n": str(len(ms))}
        made["gib_per_s"] = f"{int(made['floor_bytes']) / seconds / 2**30:.5g}"
        if made["what"] == "kernel":
            made["moved_gib_per_s"] = f"{int(made['moved_bytes']) / seconds / 2**30:.5g}"
        if made["flops"] and made["what"] != "copy":
            made["tflops"] = f"{int(made['flops']) / seconds / 1e12:.5g}"
    return made


def compared(rows: list[Row]) -> list[Row]:
    """The rows of one case, measured in one process, with fraction_of_copy and speedup_over_stock filled in."""
    for column, what in (("fraction_of_copy", "copy"), ("speedup_over_stock", "stock")):
        base = next((float(row["p50_ms"]) for row in rows if row["what"] == what and row["p50_ms"]), None)
        for row in rows:
            if base is not None and row["p50_ms"] and row["what"] not in ("copy", what):
                row[column] = f"{base / float(row['p50_ms']):.4g}"
    return rows


def read(path: Path) -> list[Row]:
    """No rows where there is no file. Raises ValueError for a table of other columns."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != FIELDS:
            raise ValueError(f"{path} is not a table of this version of scripts/bench_kernels.py; move it away")
        return list(reader)


def write(path: Path, rows: list[Row]) -> None:
    """Replaces the file at once: a run that is cut off leaves a whole table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def slug(device: str) -> str:
    """A file name: "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def line(row: Row) -> str:
    """For the terminal."""
    words = [f"{row['case']} {row['dtype']} {row['what']} {row['config']}".rstrip() + ":"]
    if row["status"] != "ok":
        return " ".join([*words, row["status"]])
    words.append(f"{row['p50_ms']} ms, {row['gib_per_s']} GiB/s")
    words += [
        f"{row[key]} {unit}" for key, unit in (("tflops", "TFLOP/s"), ("fraction_of_copy", "of copy")) if row[key]
    ]
    return ", ".join([" ".join(words[:2]), *words[2:]])


def render(path: Path) -> None:
    """Write the page and the plot beside a table."""
    rows = read(path)
    path.with_suffix(".md").write_text(page(rows))
    figure(rows).savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")


def page(rows: list[Row]) -> str:
    """The table in Markdown."""
    devices = sorted({row["device"] for row in rows})
    text = [f"# Kernels: {', '.join(devices) or 'nothing measured'}", ""]
    if any(device.startswith(NO_GPU) for device in devices):
        text += [
            "**No GPU was used. These are times of an interpreter on small inputs: they say nothing about speed.**",
            "",
        ]
    moving = [r for r in defaults(rows) if not r["flops"]]
    products = [r for r in defaults(rows) if r["flops"]]
    if moving:
        reached = sum(float(r["fraction_of_copy"] or 0) >= GOAL for r in moving)
        text += ["## What moves bytes", ""]
        text += table(moving, rows, ("GiB/s", "gib_per_s"), ("of copy", "fraction_of_copy"), ("moved / floor", "moved"))
        text += ["", f"At {GOAL:.0%} of copy bandwidth or better: {reached} of {len(moving)}.", ""]
    if products:
        text += ["## Matrix products", ""]
        text += [*table(products, rows, ("TFLOP/s", "tflops"), ("times stock", "speedup_over_stock")), ""]
    text += [
        "Times: median (p20 to p80), ms, of n single runs. Kernels in their default configuration, right by their references.",
        "",
    ]
    if better := [words for r in defaults(rows) if (words := beaten(r, rows))]:
        text += ["## Configurations clearly faster than the default (their p80 under its p20)", "", *better, ""]
    if failed := [r for r in rows if r["status"] not in ("ok", NO_COUNTERPART)]:
        text += ["## Not measured", "", "| case | dtype | what | status |", "| --- | --- | --- | --- |"]
        cells = (
            (r["case"], r["dtype"], f"{r['what']} {r['config']}".strip(), r["status"].replace("|", "/")) for r in failed
        )
        text += ["| " + " | ".join(c) + " |" for c in cells] + [""]
    keys = ("device", "torch", "triton", "cuda", "driver", "commit")
    for where in sorted({tuple(r[key] for key in keys) for r in rows}):
        dates = sorted({r["date"][:10] for r in rows if tuple(r[key] for key in keys) == where})
        facts = [where[0], *(f"{key} {value}" for key, value in zip(keys[1:], where[1:], strict=True) if value)]
        text += [f"Measured on {dates[0]}{' to ' + dates[-1] if len(dates) > 1 else ''}: {', '.join(facts)}.", ""]
    return "\n".join(text)


def defaults(rows: list[Row]) -> list[Row]:
    """Kernels that were timed in their default configuration."""
    return [r for r in rows if r["what"] == "kernel" and r["config"].startswith("default") and r["status"] == "ok"]


def sibling(row: Row, rows: list[Row], what: str) -> Row | None:
    """What else was timed for the same case and dtype."""
    return next(
        (r for r in rows if (r["case"], r["dtype"], r["what"], r["status"]) == (row["case"], row["dtype"], what, "ok")),
        None,
    )


def milliseconds(row: Row | None) -> str:
    return (
        "" if row is None else f"{float(row['p50_ms']):.3g} ({float(row['p20_ms']):.3g} to {float(row['p80_ms']):.3g})"
    )


def table(chosen: list[Row], rows: list[Row], *columns: tuple[str, str]) -> list[str]:
    """Lines of a Markdown table of default kernels with the given columns, then what else was timed."""
    others = ("stock", "compiled", "reference")
    head = ["case", "dtype", "n", "kernel", *(title for title, _ in columns), *others]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for r in chosen:
        moved = int(r["moved_bytes"]) / max(int(r["floor_bytes"]), 1)
        numbers = [f"{moved:.2f}" if key == "moved" else f"{float(r[key]):.3g}" if r[key] else "" for _, key in columns]
        rest = [milliseconds(sibling(r, rows, what)) for what in others]
        lines.append("| " + " | ".join([r["case"], r["dtype"], r["n"], milliseconds(r), *numbers, *rest]) + " |")
    return lines


def beaten(default: Row, rows: list[Row]) -> str | None:
    """The fastest configuration, if it is not the default by more than their spreads."""
    same = [
        r
        for r in rows
        if (r["case"], r["dtype"], r["what"], r["status"]) == (default["case"], default["dtype"], "kernel", "ok")
    ]
    best = min(same, key=lambda r: float(r["p50_ms"]))
    if float(best["p80_ms"]) >= float(default["p20_ms"]) or best["n"] == "1":
        return None
    return (
        f"- {best['case']} {best['dtype']}: {best['config']}, {milliseconds(best)} instead of {milliseconds(default)}"
    )


def figure(rows: list[Row]) -> Figure:
    """Left: share of copy bandwidth of what moves bytes, with the goal. Right: matrix products, times stock."""
    chosen = defaults(rows)
    panels = (
        ("fraction of copy bandwidth", "fraction_of_copy", [r for r in chosen if not r["flops"]], (GOAL,)),
        (
            "weight gradients: times faster than stock",
            "speedup_over_stock",
            [r for r in chosen if r["flops"]],
            PRODUCT_GOALS,
        ),
    )
    tallest = max(len(bars) for _, _, bars, _ in panels)
    fig = Figure(figsize=(13, 1.5 + 0.2 * tallest), layout="constrained")
    for ax, (title, column, bars, goals) in zip(fig.subplots(1, 2), panels, strict=True):
        bars = [r for r in bars if r[column]][::-1]  # the first on top
        colors = [COLORS.get(r["dtype"], "tab:gray") for r in bars]
        ax.barh([f"{r['case']}, {r['dtype']}" for r in bars], [float(r[column]) for r in bars], color=colors)
        for goal in goals:
            ax.axvline(goal, color="black", linestyle="--", linewidth=1)
        ax.set_title(title)
        ax.set_xlim(left=0)
        ax.margins(y=0.01)
    devices = sorted({r["device"] for r in rows})
    fig.suptitle(", ".join(devices) + (": no GPU, no speeds" if any(d.startswith(NO_GPU) for d in devices) else ""))
    return fig


def main(given: list[str]) -> None:
    with bad_input():
        if len(given) != 1 or not Path(given[0]).is_file():
            raise ValueError(f"{' '.join(given)!r}, allowed: the path of one table that scripts/bench_kernels.py wrote")
        read(Path(given[0]))
    render(Path(given[0]))


if __name__ == "__main__":
    from actpress.train import command  # here, since bench_kernels.py, which reads this file, does without Hydra
    from actpress.train.run import bad_input

    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
