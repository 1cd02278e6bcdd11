"""Tables as text for a terminal."""

import pytest

from actpress.report import terminal


def columns(*widths: int) -> list[terminal.Column]:
    return [terminal.Column("h", ["x" * width, ""]) for width in widths]


@pytest.mark.parametrize("width,blocks", [(80, 2), (100, 2), (140, 1), (300, 1)])
def test_metrics_stand_side_by_side_while_there_is_room(width, blocks):
    labels = terminal.Group("", [terminal.Column("method", ["a", "b"], left=True)])
    groups = [terminal.Group("first", columns(20, 20)), terminal.Group("second", columns(30, 30))]
    text = terminal.layout(labels, groups, width)
    assert text.count("method") == blocks and "\nb" in text
    assert max(map(len, text.splitlines())) <= min(max(width, 100), 140)


def test_further_blocks_leave_out_rows_without_numbers():
    labels = terminal.Group("", [terminal.Column("method", ["a", "b"], left=True)])
    groups = [terminal.Group("first", columns(60)), terminal.Group("second", columns(70))]
    first, second = terminal.layout(labels, groups, 100).split("\n\n")
    assert "\nb" in first and "\nb" not in second
