"""The choice of quick parameter sets."""

import itertools

import pytest

from quick import spread

pytest_plugins = ["pytester"]


def products(*sizes):
    return [dict(enumerate(values)) for values in itertools.product(*map(range, sizes))]


@pytest.mark.parametrize(
    ("sizes", "n", "expected"),
    [((9,), 3, [0, 4, 8]), ((3,), 5, [0, 1, 2]), ((2, 2), 2, [0, 3]), ((1,), 1, [0])],
    ids=str,
)
def test_a_spread_reaches_from_end_to_end(sizes, n, expected):
    assert spread(products(*sizes), n) == expected


@pytest.mark.parametrize("sizes", [(4, 4), (2, 6), (3, 2, 5)], ids=str)
def test_a_spread_takes_every_value_of_every_parameter(sizes):
    combinations = products(*sizes)
    values = {value for i in spread(combinations, max(sizes)) for value in combinations[i].items()}
    assert values == {value for combination in combinations for value in combination.items()}


TESTS = """
import pytest

two = pytest.mark.parametrize("a", range(6))

@pytest.mark.quick(2)
@two
def test_counted(a): pass

@pytest.mark.quick(1, "3", "5")
@two
def test_matched(a): pass

@pytest.mark.quick(1, per=lambda a: a % 2)
@two
def test_grouped(a): pass

@two
def test_all(a): pass

@pytest.mark.quick(1)
@pytest.mark.parametrize("a", [pytest.param(0, marks=pytest.mark.gpu), pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_marked(a): pass
"""


def test_what_is_not_chosen_is_slow(pytester):
    pytester.makeini("[pytest]\nmarkers =\n  quick\n  slow\n  gpu\naddopts = --strict-markers")
    pytester.makeconftest("from quick import mark_slow\ndef pytest_collection_modifyitems(items): mark_slow(items)")
    pytester.makepyfile(TESTS)
    result = pytester.inline_run("--collect-only", "-q", "-m", "not slow and not gpu")
    found = {item.name for item in result.getcall("pytest_collection_finish").session.items}
    expected = {"counted": "05", "matched": "3", "grouped": "01", "all": "012345", "marked": "2"}
    assert found == {f"test_{name}[{value}]" for name, values in expected.items() for value in values}
    (file,) = pytester.path.glob("test_*.py")
    pytester.inline_run(f"{file.name}::test_matched[0]", "-m", "not slow").assertoutcome(passed=1)


def test_a_pattern_that_matches_nothing_is_named(pytester):
    pytester.makeini("[pytest]\nmarkers =\n  quick\n")
    pytester.makeconftest("from quick import mark_slow\ndef pytest_collection_modifyitems(items): mark_slow(items)")
    pytester.makepyfile(
        "import pytest\n@pytest.mark.quick(1, 'b*')\n@pytest.mark.parametrize('a', ['c', 'd'])\ndef test(a): pass"
    )
    result = pytester.runpytest_inprocess()
    result.stderr.fnmatch_lines(["*::test?c?: quick: no parameter set matches b*"])
