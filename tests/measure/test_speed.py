"""Throughput of steps."""

import torch

from actpress import measure


def test_throughput_counts_items():
    result = measure.throughput(lambda: torch.ones(100).sum(), items=7, device="cpu", warmup=1, steps=5)
    assert result.n == 5 and result.q25 <= result.median <= result.q75
    assert measure.items_per_second([0.5, 0.5, 0.25], 10).median == 20
