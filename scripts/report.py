"""All pages of results/ from its records: the tables, their indexes, and one self-contained page of everything, results/report.html.

python scripts/report.py            read results/ (runs, fidelity, kernels, LOG.md), write tables/, README.md and report.html
python scripts/report.py --check    write nothing; name every page that does not fit its records, exit code 1 if there is one

A table whose configuration has changed since its records were made is stale: it is named and left as it is, with exit code 1, until
`make reproduce-table TABLE=<name> PUBLISH=1` measures it anew.

Nothing is measured here and nothing is typed: a number is one of the tables' JSON, of a record or of a CSV file, and links to it. Numbers
that were measured, predicted with fake tensors, taken from a paper, or not run look different.
"""

import base64
import csv
import io
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markdown_it import MarkdownIt
from markupsafe import Markup

import table_pages
from actpress import tables
from actpress.report import battery_page, headlines
from actpress.tables import fidelity
from actpress.train import command, record
from actpress.train.errors import BAD_INPUT
from actpress.train.run import bad_input
from table_rows import GRADIENTS, Place

matplotlib.use("svg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
TABLES = ROOT / "configs" / "tables"
TEMPLATE = Path(__file__).with_name("report.html.j2")
HOW = defaultdict(lambda: "measured", memory="predicted")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
plt.rcParams |= {"svg.hashsalt": "actpress", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(f"error: arguments {' '.join(arguments)!r}, allowed: none or --check", file=sys.stderr)
        return BAD_INPUT
    with bad_input():  # a record that is gone or damaged
        found = check() if arguments else write()
    print("\n".join(found) if found else "all pages fit the records")
    return 1 if found else 0


def check() -> list[str]:
    """What does not fit, a line each."""
    names, place = tables.names(TABLES), Place(RESULTS)
    found = [fault for name in names for fault in table_pages.faults(tables.load(TABLES, name), place)]
    extra = [path for path in sorted((RESULTS / "tables").glob("*.*")) if path.stem not in (*names, "index")]
    found += [f"{path.stem}: {path.name} belongs to no table of configs/tables; delete it" for path in extra]
    for path, text in overviews(place).items():
        if not path.is_file() or path.read_text() != text:
            found.append(f"{path.relative_to(ROOT)} is not what the tables and records give; make report")
    return found


def write() -> list[str]:
    """Write every page; those that are as they should be are left alone. Returns what is stale, a line for each row."""
    place, stale, changed = Place(RESULTS), [], []
    for name in tables.names(TABLES):
        table = tables.load(TABLES, name)
        found = table_pages.stale(table, place)
        stale += found
        changed += [] if found else table_pages.write(table_pages.from_records(table, place), place)
    changed += write_overviews()
    print("\n".join(f"wrote {path.relative_to(ROOT)}" for path in changed) or "nothing to write")
    return stale


def write_overviews() -> list[Path]:
    """Write the pages over all tables where they changed. Returns these. Raises InputError for a record that is gone or damaged."""
    with bad_input():
        return [path for page in overviews(Place(RESULTS)).items() for path in table_pages.write_text(*page)]


def overviews(place: Place) -> dict[Path, str]:
    """Pages over all tables, with their texts."""
    pages = table_pages.indexes(TABLES, place)
    for page in (RESULTS / "battery").glob("*/identity.json"):
        pages[page.parent.with_suffix(".md")] = battery_page.render(page.parent)
    readme = ROOT / "README.md"
    pages[readme] = battery_page.in_readme(readme.read_text(), RESULTS / "battery")
    return pages | {RESULTS / "report.html": render()}


def render() -> str:
    """The page, the same for the same results. Raises ValueError where the record of a run that a page shows is gone or damaged."""
    pages = {path.stem: record.read(path, headlines.PAGE) for path in sorted((RESULTS / "tables").glob("*.json"))}
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        headlines=[(told, page["table"], HOW[page["kind"]]) for told, page in headlines.by_paper(pages.values())],
        sections=[table_section(name, page) for name, page in pages.items()],
        kernels=kernel_tables(),
        log=Markup(MarkdownIt().enable("table").render((RESULTS / "LOG.md").read_text())),
    )


def table_section(name: str, page: dict[str, Any]) -> dict[str, Any]:
    """What the template shows of one table."""
    table = tables.load(TABLES, name)
    section = {"name": name, "title": page["title"], "source": table.source, "kind": table.kind, "notes": table.notes}
    section |= {"measured": page["measured"], "figures": []}
    if table.kind == "fidelity":
        return section | fidelity_part(page)
    section |= {"head": head(table), "rows": [row(table, found) for found in page["rows"]]}
    section["provenance"] = provenance([page["environment"]] if page["environment"] else [])
    if table.kind == "training":
        records = [load(value["run_id"]) for found in page["rows"] for value in found["values"] if "run_id" in value]
        section["provenance"] = provenance([found["environment"] for found in records]) or section["provenance"]
        section["figures"] = list(curves(page))
    return section


def load(run_id: str) -> dict[str, Any]:
    return record.read(RESULTS / "runs" / f"{run_id}.json", record.RUN)


def head(table: tables.Table) -> list[str]:
    """Column names of a table."""
    names = list(table.cells[0].labels)
    for name, metric in table.metrics.items():
        names.append(metric.title)
        if any(name in cell.paper for cell in table.cells):
            names += [metric.reference, "difference"]
        if metric.versus_baseline:
            names += [f"vs {', '.join(map(str, labels.values()))}" for labels in table.baselines]
    return names


def row(table: tables.Table, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells of one row: text, the class that says what kind of number it is, links to records."""
    cells = [{"text": str(value), "kind": "label"} for value in found["labels"].values()]
    for name, metric in table.metrics.items():
        summary = found["summary"][name]
        cells.append(measured(table, metric, summary, found))
        if any(name in cell.paper for cell in table.cells):
            paper = found["paper"].get(name)
            cells.append({"text": metric.printed(paper), "kind": "absent" if paper is None else "paper"})
            difference = summary["difference"]
            verdict = {True: "within", False: "outside", None: ""}[summary["within"]]
            cells.append({"text": "" if difference is None else f"{difference:+.1%}", "kind": verdict})
        if metric.versus_baseline:
            paired = summary.get("paired") or [None] * len(summary["versus"])
            for versus, pairs in zip(summary["versus"], paired, strict=True):
                cells.append({"text": tables.versus_text(metric, versus, pairs), "kind": HOW[table.kind]})
    return cells


def measured(table: tables.Table, metric: tables.Metric, summary: dict, found: dict) -> dict[str, Any]:
    if summary["mean"] is None:
        missing = f" (needs {tables.needs(tuple(found['requires']))})" if found["requires"] else ""
        return {"text": f"not run{missing}", "kind": "not-run"}
    text = metric.text(summary["mean"])
    if summary["deviation"] is not None:
        text += f" ± {metric.text(summary['deviation'])}"
    records = [
        value.get("record") or f"runs/{value['run_id']}.json"
        for value in found["values"]
        if "run_id" in value or "record" in value
    ]
    n = summary["n"] if summary["n"] in (0, len(found["values"])) else f"{summary['n']} of {len(found['values'])}"
    return {"text": text, "n": n, "kind": HOW[table.kind], "links": records}


def provenance(environments: list[dict[str, Any]]) -> list[str]:
    """Where numbers come from, each place once."""
    return sorted(
        {
            f"{e['device']} ({e['device_type']}), torch {e['torch']}, commit {(e['commit'] or 'unknown')[:10]}"
            f"{' with changes' if e['dirty'] else ''}, {e['date'][:10]}"
            for e in environments
        }
    )


def fidelity_part(page: dict[str, Any]) -> dict[str, Any]:
    """A fidelity table from the records that its page names: a summary and a plot per network and weights."""
    groups, environments = [], []
    for where, ids in page.get("gradients", {}).items():
        found = {method: record.read(RESULTS / "fidelity" / f"{name}.json", GRADIENTS) for method, name in ids.items()}
        environments += [entry["environment"] for entry in found.values()]
        if found:
            draw = by_layer if len(found) <= len(COLOURS) else by_method
            groups.append({"where": where, "rows": fidelity_rows(found, ids), "figure": draw(where, found)})
    return {"groups": groups, "provenance": provenance(environments), "head": fidelity.HEAD}


def fidelity_rows(found: dict[str, dict], ids: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "cells": fidelity.cells(entry["figures"], entry["layers"], entry["saved_share"]),
            "link": f"fidelity/{ids[method]}.json",
        }
        for method, entry in found.items()
    ]


def by_method(where: str, found: dict[str, dict]) -> Markup:
    """Cosine of the total gradient, bars one sd, and the median of its layers, a line of text per method with the bytes it keeps."""
    figure, axes = plt.subplots(figsize=(7, 0.6 + 0.22 * len(found)))
    totals = [entry["figures"]["total"] for entry in found.values()]
    medians = [
        statistics.median(entry["figures"][layer]["cosine"] for layer in entry["layers"]) for entry in found.values()
    ]
    places = range(len(found))
    spread = [total["cosine_sd"] for total in totals]
    axes.errorbar(
        [t["cosine"] for t in totals], places, xerr=spread, fmt="o", color=COLOURS[0], capsize=2, label="total"
    )
    axes.plot(medians, places, "D", color=COLOURS[1], mfc="none", label="median of layers")
    texts = [
        f"{method}: {entry['saved_share']:.1%}, n={total['n']}"
        for (method, entry), total in zip(found.items(), totals, strict=True)
    ]
    axes.set_yticks(places, texts)
    axes.invert_yaxis()
    axes.grid(axis="x", lw=0.3)
    axes.set(xlabel="cosine to the exact gradient", title=f"{where}: bytes kept, of stock; number of gradients")
    axes.legend(fontsize=7, frameon=False)
    return svg(figure, f"cosine of the gradient by method, {where}")


def by_layer(where: str, found: dict[str, dict]) -> Markup:
    """Cosine of each layer's weight gradient, a line per method, bars one sd."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for (method, entry), colour in zip(found.items(), COLOURS * 9, strict=False):
        figures = [entry["figures"][layer] for layer in entry["layers"]]
        values, spread = [f["cosine"] for f in figures], [f["cosine_sd"] for f in figures]
        label = f"{method} (n={figures[0]['n']})"
        axes.errorbar(range(len(values)), values, spread, label=label, color=colour, marker=".", lw=1, capsize=2)
    axes.set(xlabel="layer, from input to output", ylabel="cosine to the exact gradient", title=where)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    return svg(figure, f"cosine of weight gradients by layer, {where}")


def curves(page: dict[str, Any]) -> Iterator[Markup]:
    """Test accuracy, a plot per network."""
    networks: dict[str, dict[str, list]] = defaultdict(dict)
    for found in page["rows"]:
        histories = [load(value["run_id"])["history"] for value in found["values"] if "run_id" in value]
        if histories:
            labels = dict(found["labels"])
            network, method = labels.pop("network", ""), labels.pop("method")
            networks[network][", ".join([method, *(f"{name} {value}" for name, value in labels.items())])] = histories
    for network, methods in networks.items():
        draw = by_epoch if any(len(history) > 1 for found in methods.values() for history in found) else by_seed
        yield draw(network or page["title"], methods)


def by_epoch(title: str, methods: dict[str, list]) -> Markup:
    """A curve per method, bars one sd; curves that lie on each other are drawn side by side."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for i, ((method, histories), colour) in enumerate(zip(methods.items(), COLOURS * 9, strict=False)):
        epochs = list(zip(*([r["test_accuracy"] for r in history] for history in histories), strict=True))
        mean = [statistics.fmean(values) for values in epochs]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for values in epochs]
        places = [epoch + 0.02 * (i - len(methods) / 2) for epoch in range(1, len(mean) + 1)]
        label = f"{method} (n={len(histories)})"
        axes.errorbar(places, mean, spread, label=label, color=colour, marker=".", lw=1, capsize=2)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title=f"{title}: mean and sd over seeds")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, frameon=False)
    return svg(figure, f"test accuracy by epoch, {title}")


def by_seed(title: str, methods: dict[str, list]) -> Markup:
    """Accuracy after the only epoch: a line of text per method, a small dot per seed, mean and one sd."""
    figure, axes = plt.subplots(figsize=(7, 0.7 + 0.3 * len(methods)))
    for place, histories in enumerate(methods.values()):
        values = [history[-1]["test_accuracy"] for history in histories]
        spread = statistics.stdev(values) if len(values) > 1 else 0
        axes.errorbar(statistics.fmean(values), place, xerr=spread, color=COLOURS[0], fmt="o", capsize=2)
        axes.plot(values, [place] * len(values), ".", color=COLOURS[1])
    axes.set_yticks(range(len(methods)), [f"{method} (n={len(found)})" for method, found in methods.items()])
    axes.invert_yaxis()
    axes.grid(axis="x", lw=0.3)
    axes.set(xlabel="test accuracy, %", title=f"{title}: seeds, mean and sd")
    return svg(figure, f"test accuracy by method, {title}")


def svg(figure: Any, description: str) -> Markup:
    """A figure as an image inside the page, the same bytes for the same numbers."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    data = base64.b64encode(file.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(description, Markup(data))


def kernel_tables() -> list[dict[str, Any]]:
    """Every CSV file of results/kernels: measured bandwidth by device, and what ahead-of-time compilation says."""
    found = []
    for path in sorted((RESULTS / "kernels").glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        if (
            path.stem == "aot"
        ):  # one line per kernel: what the default configuration takes on sm_90, the largest over dtypes
            rows = [r for r in rows if r["config"].startswith("default") and r["arch"] == "sm_90"]
            worst = ("registers", "spill_bytes", "dynamic_shared_bytes")
            cases = defaultdict(list)
            for r in rows:
                cases[r["case"], r["kernel"]].append(r)
            rows = [
                {"case": case, "kernel": kernel} | {key: max(int(r[key]) for r in group) for key in worst}
                for (case, kernel), group in cases.items()
            ]
        found.append(
            {"name": path.name, "head": list(rows[0]) if rows else [], "rows": [list(r.values()) for r in rows]}
        )
    return found


if __name__ == "__main__":
    sys.exit(command.main(lambda: main(sys.argv[1:]), __doc__))
