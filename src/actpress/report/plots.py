"""Figures of results/report.html: SVG images inside the page, the same bytes for the same numbers."""

import base64
import io
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from actpress.tables.kind import Folder
from actpress.tables.result import Result, Section
from actpress.train import record

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
STYLE = {"svg.hashsalt": "actpress", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
Histories = list[list[dict[str, Any]]]  # of the seeds of a row: a run's epochs


def gradients(section: Section) -> Markup:
    """A section of a fidelity table: by layer, or by method where there are more methods than colours."""
    entries = {row.row.labels["method"]: row.values[0] for row in section.measured}
    draw = _by_layer if len(entries) <= len(COLOURS) else _by_method
    with matplotlib.rc_context(STYLE):
        return draw(section.name, entries)


def accuracies(result: Result, folder: Folder) -> Iterator[Markup]:
    """Test accuracy of a table of training runs, a figure for each network. folder: holds runs/."""
    networks: dict[str, dict[str, Histories]] = defaultdict(dict)
    for row in result.rows:
        histories = [record.read(folder.root / file, record.RUN)["history"] for file in row.records]
        if histories:
            labels = dict(row.row.labels)
            network, method = labels.pop("network", ""), labels.pop("method")
            networks[network][", ".join([method, *(f"{name} {value}" for name, value in labels.items())])] = histories
    for network, methods in networks.items():
        draw = _by_epoch if any(len(history) > 1 for found in methods.values() for history in found) else _by_seed
        with matplotlib.rc_context(STYLE):
            figure = draw(network or result.table.title, methods)
        yield figure


def _by_method(name: str, entries: dict[str, dict]) -> Markup:
    """Cosine of the total gradient with its standard deviation, and the median over layers; a line for each method with its saved bytes."""
    figure, axes = _axes(0.6 + 0.22 * len(entries))
    totals = [entry["figures"]["total"] for entry in entries.values()]
    medians = [
        statistics.median(entry["figures"][layer]["cosine"] for layer in entry["layers"]) for entry in entries.values()
    ]
    places = range(len(entries))
    spread = [total["cosine_sd"] for total in totals]
    axes.errorbar(
        [t["cosine"] for t in totals], places, xerr=spread, fmt="o", color=COLOURS[0], capsize=2, label="total"
    )
    axes.plot(medians, places, "D", color=COLOURS[1], mfc="none", label="median of layers")
    texts = [
        f"{method}: {entry['saved_share']:.1%}, n={total['n']}"
        for (method, entry), total in zip(entries.items(), totals, strict=True)
    ]
    _lines_of_text(axes, texts)
    axes.set(xlabel="cosine to the exact gradient", title=f"{name}: bytes kept, of stock; number of gradients")
    axes.legend(fontsize=7, frameon=False)
    return _svg(figure, f"cosine of the gradient by method, {name}")


def _by_layer(name: str, entries: dict[str, dict]) -> Markup:
    """Cosine of each layer's weight gradient with its standard deviation, a line for each method."""
    figure, axes = _axes(3.2)
    for (method, entry), colour in zip(entries.items(), COLOURS * 9, strict=False):
        figures = [entry["figures"][layer] for layer in entry["layers"]]
        values, spread = [f["cosine"] for f in figures], [f["cosine_sd"] for f in figures]
        label = f"{method} (n={figures[0]['n']})"
        axes.errorbar(range(len(values)), values, spread, label=label, color=colour, marker=".", lw=1, capsize=2)
    axes.set(xlabel="layer, from input to output", ylabel="cosine to the exact gradient", title=name)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    return _svg(figure, f"cosine of weight gradients by layer, {name}")


def _by_epoch(title: str, methods: dict[str, Histories]) -> Markup:
    """Mean and standard deviation over seeds, a curve for each method. Curves are shifted a little so that equal ones can be told apart."""
    figure, axes = _axes(3.2)
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
    return _svg(figure, f"test accuracy by epoch, {title}")


def _by_seed(title: str, methods: dict[str, Histories]) -> Markup:
    """Accuracy after the only epoch: a line for each method, a small dot for each seed, mean and standard deviation."""
    figure, axes = _axes(0.7 + 0.3 * len(methods))
    for place, histories in enumerate(methods.values()):
        values = [history[-1]["test_accuracy"] for history in histories]
        spread = statistics.stdev(values) if len(values) > 1 else 0
        axes.errorbar(statistics.fmean(values), place, xerr=spread, color=COLOURS[0], fmt="o", capsize=2)
        axes.plot(values, [place] * len(values), ".", color=COLOURS[1])
    _lines_of_text(axes, [f"{method} (n={len(found)})" for method, found in methods.items()])
    axes.set(xlabel="test accuracy, %", title=f"{title}: seeds, mean and sd")
    return _svg(figure, f"test accuracy by method, {title}")


def _axes(height: float) -> tuple[Figure, Any]:
    """height: inches."""
    figure = Figure(figsize=(7, height))
    return figure, figure.subplots()


def _lines_of_text(axes: Any, texts: Sequence[str]) -> None:
    """A text for each line of the figure, the first on top."""
    axes.set_yticks(range(len(texts)), texts)
    axes.invert_yaxis()
    axes.grid(axis="x", lw=0.3)


def _svg(figure: Figure, description: str) -> Markup:
    file = io.BytesIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None})
    data = base64.b64encode(file.getvalue()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(description, Markup(data))


OF_SECTIONS = {"fidelity": gradients}  # kind of table -> the figure of each section
OF_TABLES = {"training": accuracies}  # kind of table -> figures above the rows
