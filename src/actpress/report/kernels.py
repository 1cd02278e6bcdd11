"""The page and the plot of kernel times, beside their CSV file, see actpress.bench.kernel_rows. Needs no Hydra."""

from pathlib import Path

from matplotlib.figure import Figure

from actpress.bench.kernel_rows import NO_COUNTERPART, Row, read
from actpress.train.files import write_text

GOAL = 0.85  # of copy bandwidth, for what only moves bytes
PRODUCT_GOALS = (2, 3)  # times stock: pooled (k=2) and block-sparse (80%) weight gradients
NO_GPU = "Triton interpreter"
COLORS = {"float32": "tab:blue", "float16": "tab:green", "bfloat16": "tab:orange"}


def render(path: Path) -> None:
    """Write the page and the plot beside a table."""
    rows = read(path)
    write_text(path.with_suffix(".md"), page(rows))
    figure(rows).savefig(path.with_suffix(".png"), dpi=150, bbox_inches="tight")


def page(rows: list[Row]) -> str:
    """The rows of a device as Markdown."""
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
    """Rows of kernels in their default configuration."""
    return [r for r in rows if r["what"] == "kernel" and r["config"].startswith("default") and r["status"] == "ok"]


def sibling(row: Row, rows: list[Row], what: str) -> Row | None:
    """The row of `what` for the same case and dtype."""
    return next(
        (r for r in rows if (r["case"], r["dtype"], r["what"], r["status"]) == (row["case"], row["dtype"], what, "ok")),
        None,
    )


def milliseconds(row: Row | None) -> str:
    return (
        "" if row is None else f"{float(row['p50_ms']):.3g} ({float(row['p20_ms']):.3g} to {float(row['p80_ms']):.3g})"
    )


def table(chosen: list[Row], rows: list[Row], *columns: tuple[str, str]) -> list[str]:
    """Lines of a Markdown table: the chosen kernels with the given columns, then times of stock, compiled and reference."""
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
    """The fastest configuration, if it is faster than the default by more than their spreads."""
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
    """Left: fraction of copy bandwidth of what only moves bytes. Right: speedup of matrix products over stock. Lines are goals."""
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
