"""The largest batch that can be trained, by search: each probe is a batch size that fits or does not.

`next_batch` is a function of the probes made so far alone, so that a search that was interrupted goes on from its list.
"""

from collections.abc import Sequence
from typing import NamedTuple

AIM = 0.97  # of the batch that the memory is extrapolated to hold


class Probe(NamedTuple):
    """One tried batch size. peak: bytes, None if unknown."""

    batch: int
    fits: bool
    peak: int | None = None


def bounds(probes: Sequence[Probe]) -> tuple[int, int | None]:
    """(largest batch that fits, 0 if none does; smallest above it that does not, None if unknown)."""
    fitting = max((probe.batch for probe in probes if probe.fits), default=0)
    return fitting, min((probe.batch for probe in probes if not probe.fits and probe.batch > fitting), default=None)


def next_batch(
    probes: Sequence[Probe], start: int, step: int, highest: int, capacity: int | None = None, fineness: float = 1 / 32
) -> int | None:
    """The batch to try next, a multiple of `step`; None when the largest is known to `step` or to the share `fineness` of it.

    First `start`, then its double; two peaks are extrapolated to `capacity` bytes, since memory is nearly affine in the batch. After a
    failure the interval is cut just below it, after two in half. Batches above `highest` are not tried.
    """
    fitting, failing = bounds(probes)
    if not probes:
        return min(start, highest)
    if fitting >= highest:
        return None
    room = max(step, int(fitting * fineness) // step * step)
    if failing is not None and failing - fitting <= room:
        return None
    failures = sum(not probe.fits for probe in probes)
    if failures == 0:
        guess = _extrapolated(probes, capacity) or 2 * fitting
    elif failures == 1:
        guess = max((fitting + failing) // 2, int(0.9 * failing))
    else:
        guess = (fitting + failing) // 2
    lowest = fitting + (room if failures == 0 and fitting else step)
    most = highest if failing is None else failing - step
    return max(min(max(guess // step * step, lowest), most), step)


def _extrapolated(probes: Sequence[Probe], capacity: int | None) -> int | None:
    """The batch whose peak would be a little below `capacity`, by a line through the two largest that fit."""
    known = sorted(probe for probe in probes if probe.fits and probe.peak)[-2:]
    if capacity is None or len(known) < 2 or known[1].peak <= known[0].peak:
        return None
    slope = (known[1].peak - known[0].peak) / (known[1].batch - known[0].batch)
    return int(AIM * (known[1].batch + (capacity - known[1].peak) / slope))
