"""Headlines: one line for each claim of a paper: claim | measured here | verdict. A table's YAML states them, its results fill them in.

headlines:
  - paper: DIVISION
    claim: what the paper says
    row: {method: DIVISION, batch: 64}      labels of the row that tests the claim; labels left out match anything
    metric: saved_bytes
    show: versus                            mean, difference (to the paper), versus (first baseline) or paired (to it)
    text: "{:.1f}x less than stock"         what was measured, in words
    at_least: 10                            or at_most: for which values the claim holds; not for paired

A paired headline compares at another scale than the paper's claim, so its verdict is neither "holds" nor "does not hold": it is "lower"
or "higher" where the paired t-test finds p < .05, and "no difference seen" otherwise.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from actpress.tables.result import RowResult

SHOW = ("mean", "difference", "versus", "paired")


def fill(headlines: Sequence[Mapping[str, Any]], rows: Sequence[RowResult]) -> list[dict[str, str]]:
    """Each headline as {paper, claim, measured, verdict}; "not run" where its row was not measured. Raises ValueError if no row fits."""
    return [_fill(headline, rows) for headline in headlines]


def _fill(headline: Mapping[str, Any], rows: Sequence[RowResult]) -> dict[str, str]:
    row = next((r for r in rows if headline["row"].items() <= r.row.labels.items()), None)
    if row is None or headline["metric"] not in row.summaries:
        raise ValueError(f"headline {headline['claim']!r}: no row {headline['row']} with metric {headline['metric']!r}")
    if headline["show"] not in SHOW:
        raise ValueError(f"headline {headline['claim']!r}: show {headline['show']!r}, allowed: {', '.join(SHOW)}")
    value = getattr(row.summaries[headline["metric"]], headline["show"])
    if isinstance(value, list):  # one for each baseline
        value = value[0] if value else None
    claim = {"paper": headline["paper"], "claim": headline["claim"]}
    if isinstance(value, dict):
        return claim | {"measured": headline["text"].format(**value), "verdict": _difference(value)}
    if not isinstance(value, float):
        return claim | {"measured": "not run", "verdict": "open"}
    holds = value >= headline["at_least"] if "at_least" in headline else value <= headline["at_most"]
    return claim | {"measured": headline["text"].format(value), "verdict": "holds" if holds else "does not hold"}


def _difference(pairs: Mapping[str, float]) -> str:
    if pairs["p"] >= 0.05:
        return "no difference seen"
    return "higher" if pairs["mean"] > 0 else "lower"


def by_paper(pages: Iterable[dict[str, Any]]) -> list[tuple[dict[str, str], dict[str, Any]]]:
    """(claim, page that it is on) for the JSON of many tables; claims of one paper stand together."""
    found = [(claim, page) for page in pages for claim in page.get("headlines", [])]
    return sorted(found, key=lambda one: one[0]["paper"])
