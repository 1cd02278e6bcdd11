"""Summaries: mean and spread over seeds, difference to the paper, comparison with baselines."""

import pytest

import small_tables
from actpress.tables.result import summarise

MIB = 2**20


@pytest.fixture
def small(tmp_path):
    return small_tables.paper_table(tmp_path)


def results(table):
    stock, division = (
        [[{"saved_bytes": 4 * MIB}], [{"saved_bytes": 8 * MIB}]],
        [[{"saved_bytes": MIB}], [{"saved_bytes": 2 * MIB}]],
    )
    return summarise(table, table.rows, stock + division + [[], []])


def test_measured_paper_difference_and_verdict(small):
    found = [r.summaries["saved_bytes"] for r in results(small)]
    assert (found[0].mean, found[0].difference, found[0].within) == (4.0, 0.0, True)
    assert found[1].mean == 8.0 and found[1].difference is None  # the paper ran out of memory
    assert found[2].difference == pytest.approx(-1 / 3) and found[2].within is False
    assert found[3].within is True and found[3].versus == [4.0]
    assert found[4].mean is None and found[4].n == 0


def test_spread_over_seeds_and_words(small):
    mixed = [{"saved_bytes": value} for value in ("OOM", 2 * MIB, "OOM")]
    values = [[{"saved_bytes": v * MIB} for v in (3, 5)], [{"saved_bytes": "OOM"}], mixed, [], [], []]
    first, second, third, *_ = (row.summaries["saved_bytes"] for row in summarise(small, small.rows, values))
    assert (first.mean, first.n) == (4.0, 2) and first.deviation == pytest.approx(2**0.5)
    assert (second.mean, second.n) == ("OOM", 0)
    assert (third.mean, third.n, third.deviation) == (2.0, 1, None)


def test_differences_to_the_baseline_are_paired_by_seed(tmp_path):
    table, values = small_tables.paired_table(tmp_path)
    found = summarise(table, table.rows, values)[2].summaries["saved_bytes"].paired[0]
    assert found["n"] == 3 and found["mean"] == pytest.approx(-5 / 6) and 0 < found["p"] < 0.1
    values[2][2]["seed"] = 4  # two pairs are left
    assert summarise(table, table.rows, values)[2].summaries["saved_bytes"].paired[0]["n"] == 2
    values[2][1]["seed"] = 5
    assert summarise(table, table.rows, values)[2].summaries["saved_bytes"].paired[0] is None


@pytest.mark.parametrize(
    ("versus", "baseline", "value", "expected"),
    [
        ("ratio", 4, 1, 4.0),
        ("ratio", 4, 0, None),
        ("difference", 4, 0, -4.0),
        ("difference", 0, 4, 4.0),
        ("change", 4, 1, -0.75),
        ("change", 0, 4, None),
    ],
)
def test_a_comparison_that_would_divide_by_zero_is_left_out(tmp_path, versus, baseline, value, expected):
    table = small_tables.paper_table(tmp_path, **{"versus_baseline: ratio": f"versus_baseline: {versus}"})
    values = [[{"saved_bytes": baseline * MIB}], [], [{"saved_bytes": value * MIB}], [], [], []]
    assert summarise(table, table.rows, values)[2].summaries["saved_bytes"].versus == [expected]
