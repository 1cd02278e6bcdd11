"""What a long command says of the time that is left."""

import pytest

from actpress.tables import progress


def test_progress_says_what_is_left(capsys):
    times = iter([0.0, 0.0, 60.0, 60.0, 60.0, 60.0, 80.0, 80.0])
    known = {"a": None, "b": 30.0, "c": 3600.0}
    work = progress.Progress(["a", "b", "c"], str, str, known.get, lambda: next(times))
    with work.item("a") as said:
        said.append("4 MiB")
    with work.item("b", prints=True) as said:
        said.append("5 MiB")
    first, *second = capsys.readouterr().out.splitlines()
    assert first == "  1/3 a ... 4 MiB (1:00 so far, 2 left: about 1:00:30)"
    assert second == [
        "  2/3 b ... (1:00 so far, 2 left: about 1:00:30)",
        "  2/3 b: 5 MiB (1:20 so far, 1 left: about 1:00:00)",
    ]


@pytest.mark.parametrize(
    "left,expected",
    [
        (["ab"], "1 left: about 0:10"),  # as the finished one
        (["ac"], "1 left: about 0:10"),  # as what it resembles
        (["zz", "b"], "2 left: 1 of them about 0:30"),  # unknown; known from elsewhere
        (["zz"], "1 left)"),
    ],
)
def test_time_left_is_that_of_items_alike_or_of_what_is_known(capsys, left, expected):
    times = iter([0.0, 0.0, 10.0, 10.0])
    work = progress.Progress(["ab", *left], str, str, {"b": 30.0}.get, lambda: next(times))
    with work.item("ab"):
        pass
    assert f"(0:10 so far, {expected}" in capsys.readouterr().out
