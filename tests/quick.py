"""Which parameter sets of a test are quick: `make test` runs these, `make test-all` also those marked slow.

@pytest.mark.quick(4)                           4 of the test's parameter sets stay quick, the others are marked slow
@pytest.mark.quick(4, "*fp16*", "relu-*")       4 of those whose ids match one of the patterns (fnmatch)
@pytest.mark.quick(1, per=family)               1 for each value of family(**parameters)

The choice depends on nothing but the order of collection. It takes different values of every parameter, far apart in that order. Tests that
need a GPU and tests marked slow are not counted.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import pytest


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Mark slow what `quick` does not choose. Parameter sets that the command line names (test.py::test_name[id]) stay as they are."""
    functions = defaultdict(list)
    named = {argument.rpartition("::")[2] for argument in items[0].config.args} if items else set()
    for item in items:
        excluded = item.name in named or any(map(item.get_closest_marker, ("slow", "gpu")))
        if item.get_closest_marker("quick") and not excluded:
            functions[item.nodeid.partition("[")[0]].append(item)
    for found in functions.values():
        chosen = set(_chosen(found, *(marker := found[0].get_closest_marker("quick")).args, **marker.kwargs))
        for item in found:
            if item not in chosen:
                item.add_marker(pytest.mark.slow)


def _chosen(
    items: Sequence[pytest.Item], n: int, *patterns: str, per: Callable[..., Any] | None = None
) -> list[pytest.Item]:
    matched = {
        pattern: {item for item in items if fnmatchcase(item.callspec.id, pattern)} for pattern in patterns or "*"
    }
    for pattern in patterns:
        if not matched[pattern]:
            raise pytest.UsageError(f"{items[0].nodeid}: quick: no parameter set matches {pattern}")
    groups = defaultdict(list)
    for item in items:
        if any(item in found for found in matched.values()):
            groups[per and per(**item.callspec.params)].append(item)
    return [group[i] for group in groups.values() for i in spread([_values(item) for item in group], n)]


def _values(item: pytest.Item) -> dict[str, int]:
    """Parameter -> identity of its value: parametrize hands the same object to all combinations."""
    return {name: id(value) for name, value in item.callspec.params.items()}


def spread(combinations: Sequence[dict[Any, int]], n: int) -> list[int]:
    """The positions of at most n of the combinations, each of which maps parameters to values.

    Starts at the first combination. Then takes the one whose values were taken least; of several, the one farthest from all taken.
    """
    count = len(combinations)
    uses: Counter = Counter()
    distances = [count] * count  # to the nearest combination taken; 0 for those taken
    for _ in range(min(n, count)):
        open_ = [i for i in range(count) if distances[i]]
        best = min(open_, key=lambda i: (sum(uses[value] for value in combinations[i].items()), -distances[i]))
        uses.update(combinations[best].items())
        distances = [min(distance, abs(i - best)) for i, distance in enumerate(distances)]
    return [i for i in range(count) if not distances[i]]
