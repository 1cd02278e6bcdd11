"""One line per claim of a paper: claim | measured here | verdict. Written in a table's YAML, filled in from what was measured.

headlines:
  - paper: DIVISION
    claim: what the paper says
    row: {method: DIVISION, batch: 64}      the labels of the row that speaks to it; labels left out match anything
    metric: saved_bytes
    show: versus                            mean, difference (to the paper), versus (first baseline) or paired (to it)
    text: "{:.1f}x less than stock"         what was measured, in words
    at_least: 10                            or at_most: for which value the claim holds; paired: none, the t-test speaks

A paired headline speaks to a claim at another scale than the paper's. So its verdict neither holds nor fails: it is "lower" or
"higher" where the paired t-test finds p < .05, "no difference seen" otherwise.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actpress import tables
from actpress.train import record

PAGE = dict.fromkeys(("table", "title", "kind", "measured"), str)  # what every table's JSON holds
SHOW = ("mean", "difference", "versus", "paired")


def fill(headlines: Sequence[Mapping[str, Any]], results: Sequence[tables.Result]) -> list[dict[str, str]]:
    """Each headline as {paper, claim, measured, verdict}; "not run" where its row was not measured. Raises ValueError if no row fits."""
    return [_fill(headline, results) for headline in headlines]


def _fill(headline: Mapping[str, Any], results: Sequence[tables.Result]) -> dict[str, str]:
    row = next((r for r in results if headline["row"].items() <= r.cell.labels.items()), None)
    if row is None or headline["metric"] not in row.summaries:
        raise ValueError(f"headline {headline['claim']!r}: no row {headline['row']} with metric {headline['metric']!r}")
    if headline["show"] not in SHOW:
        raise ValueError(f"headline {headline['claim']!r}: show {headline['show']!r}, allowed: {', '.join(SHOW)}")
    summary = row.summaries[headline["metric"]]
    value = getattr(summary, headline["show"])
    if isinstance(value, list):  # to each baseline
        value = value[0] if value else None
    told = {"paper": headline["paper"], "claim": headline["claim"]}
    if isinstance(value, dict):
        return told | {"measured": headline["text"].format(**value), "verdict": _difference(value)}
    if not isinstance(value, float):
        return told | {"measured": "not run", "verdict": "open"}
    holds = value >= headline["at_least"] if "at_least" in headline else value <= headline["at_most"]
    return told | {"measured": headline["text"].format(value), "verdict": "holds" if holds else "does not hold"}


def _difference(pairs: Mapping[str, float]) -> str:
    if pairs["p"] >= 0.05:
        return "no difference seen"
    return "higher" if pairs["mean"] > 0 else "lower"


def by_paper(pages: Iterable[dict[str, Any]]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """(headline, its page) of all pages, those of a paper together."""
    found = [(told, page) for page in pages for told in page.get("headlines", [])]
    return sorted(found, key=lambda one: one[0]["paper"])


def index(folder: Path) -> str:
    """Markdown over all tables rendered into `folder`: the headlines, then a line per table."""
    pages = [record.read(path, PAGE) for path in sorted(folder.glob("*.json"))]
    lines = [
        "# Results",
        "",
        "Made by `make reproduce-table` and `make tables` from what is in this folder; nothing is typed.",
        "",
    ]
    lines += ["| paper | claim | measured here | verdict | table |", "| --- | --- | --- | --- | --- |"]
    for told, page in by_paper(pages):
        link = f"[{page['table']}](tables/{page['table']}.md)"
        lines.append(f"| {told['paper']} | {told['claim']} | {told['measured']} | {told['verdict']} | {link} |")
    lines += ["", "| table | what | rows measured |", "| --- | --- | --- |"]
    for page in pages:
        lines.append(f"| [{page['table']}](tables/{page['table']}.md) | {page['title']} | {page['measured']} |")
    return "\n".join(
        [
            *lines,
            "",
            "The records of training runs are in [runs](runs); dated notes, negative results too, in [LOG.md](LOG.md).",
            "",
        ]
    )
