"""Progress of a long command: the current item, the time so far, how many items are left and about how long they will take."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Progress:
    """Prints each item of `todo` when it begins, and what is left when it ends.

    name: an item in words. kind: words that describe an item, from the general to the particular. known: seconds that an item took
    elsewhere, None if unknown. The time that an item will take is estimated as the mean of finished items of the same kind; without any as
    `known`; without that as the mean of finished items whose kind begins alike.
    """

    def __init__(
        self,
        todo: Sequence[Any],
        name: Callable[[Any], str],
        kind: Callable[[Any], Sequence],
        known: Callable[[Any], float | None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.todo = list(todo)
        self._left = list(todo)
        self._name, self._kind, self._now = name, kind, now
        self._known = {id(item): known(item) for item in todo}
        self._took: dict[Sequence, list[float]] = {}  # by each beginning of a kind
        self._start = now()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._start

    @contextmanager
    def item(self, item: Any, prints: bool = False) -> Iterator[list[str]]:
        """The block does the work on an item; what it appends to the list is printed as outcome. prints: the work prints lines itself."""
        head = f"  {len(self.todo) - len(self._left) + 1}/{len(self.todo)} {self._name(item)}"
        start, said = self._now(), []
        print(f"{head} ... ({self.state()})\n" if prints else f"{head} ... ", end="", flush=True)
        yield said
        self._left.remove(item)
        took = self._now() - start
        for part in self._parts(item):
            self._took.setdefault(part, []).append(took)
        print(f"{f'{head}: ' if prints else ''}{''.join(said)} ({self.state()})", flush=True)

    def state(self) -> str:
        """Time so far, number of items left and their estimated time."""
        if not self._left:
            return f"{clock(self.elapsed)} so far"
        expected = [self._expected(item) for item in self._left]
        known = [seconds for seconds in expected if seconds is not None]
        if len(known) == len(expected):
            return f"{clock(self.elapsed)} so far, {len(expected)} left: about {clock(sum(known))}"
        more = f": {len(known)} of them about {clock(sum(known))}" if known else ""
        return f"{clock(self.elapsed)} so far, {len(expected)} left{more}"

    def _expected(self, item: Any) -> float | None:
        whole, *parts = self._parts(item)
        if whole not in self._took and self._known[id(item)] is not None:
            return self._known[id(item)]
        took = next((self._took[part] for part in (whole, *parts) if part in self._took), None)
        return took and sum(took) / len(took)

    def _parts(self, item: Any) -> list[Sequence]:
        """The item's kind, then its beginnings, each one word shorter."""
        kind = self._kind(item)
        return [kind[:length] for length in range(len(kind), 0, -1)]


def clock(seconds: float) -> str:
    """Minutes and seconds, 1:05, or hours, 2:03:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
