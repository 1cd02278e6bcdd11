"""Claims of papers beside what was measured."""

import pytest

import small_tables
from actpress.tables import headlines
from actpress.tables.result import summarise

MIB = 2**20


@pytest.fixture
def small(tmp_path):
    return small_tables.paper_table(tmp_path)


def rows(table):
    sizes = (4, 8, 1, 2)
    return summarise(table, table.rows, [*([{"saved_bytes": size * MIB}] for size in sizes), [], []])


CLAIM = {"paper": "P", "claim": "small", "metric": "saved_bytes", "text": "{:.1f}x", "show": "versus"}


@pytest.mark.parametrize(
    "row,limit,measured,verdict",
    [
        ({"method": "division", "batch": 2}, {"at_least": 3}, "4.0x", "holds"),
        ({"method": "division", "batch": 2}, {"at_least": 5}, "4.0x", "does not hold"),
        ({"method": "division", "batch": 2}, {"at_most": 5}, "4.0x", "holds"),
        ({"method": "actnn"}, {"at_least": 3}, "not run", "open"),
    ],
)
def test_headlines_say_what_was_measured(small, row, limit, measured, verdict):
    (told,) = headlines.fill([CLAIM | {"row": row} | limit], rows(small))
    assert told == {"paper": "P", "claim": "small", "measured": measured, "verdict": verdict}


def test_headlines_name_mistakes(small):
    with pytest.raises(ValueError, match="no row"):
        headlines.fill([CLAIM | {"row": {"method": "nosuch"}, "at_least": 1}], rows(small))
    with pytest.raises(ValueError, match="show 'ratio', allowed: mean, difference, versus, paired"):
        headlines.fill([CLAIM | {"row": {"method": "none"}, "at_least": 1, "show": "ratio"}], rows(small))


def test_a_paired_claim_is_lower_or_higher_where_the_t_test_finds_a_difference(tmp_path):
    table, values = small_tables.paired_table(tmp_path)
    claim = CLAIM | {"show": "paired", "text": "{mean:+.2f}, n={n}"}
    labels = [{"method": "division", "batch": 1}, {"method": "division", "batch": 2}]
    lower, not_run = headlines.fill([claim | {"row": row} for row in labels], summarise(table, table.rows, values))
    assert (lower["measured"], lower["verdict"]) == ("-0.83, n=3", "lower")
    assert (not_run["measured"], not_run["verdict"]) == ("not run", "open")
    values[2][2]["seed"] = 4  # two pairs are left: too few to tell
    (unclear,) = headlines.fill([claim | {"row": labels[0]}], summarise(table, table.rows, values))
    assert unclear["verdict"] == "no difference seen"


def test_claims_of_one_paper_stand_together():
    pages = [{"headlines": [{"paper": name}]} for name in ("b", "a", "b")]
    assert [(claim["paper"], page is pages[1]) for claim, page in headlines.by_paper([*pages, {}])] == [
        ("a", True),
        ("b", False),
        ("b", False),
    ]
