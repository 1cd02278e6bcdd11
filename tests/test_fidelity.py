"""Comparing methods by their gradients on one network."""

import re

import pytest
import torch
from torch import nn

from actpress import fidelity
from actpress.methods import Division, Stock


@pytest.fixture(scope="module")
def found():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 64, 5))
    batches = [(torch.randn(4, 3, 12, 12), torch.randint(5, (4,))) for _ in range(2)]
    methods = {"stock": Stock(), "two bits": Division(), "eight bits": Division(bits=8)}
    return fidelity.compare(net, methods, batches, draws=3)


def test_figures_are_means_over_batches_and_draws(found):
    assert found["stock"]["0.weight"] == pytest.approx({"cosine": 1, "cosine_sd": 0, "norm_ratio": 1, "n": 6}, abs=1e-9)
    two, eight = found["two bits"]["total"], found["eight bits"]["total"]
    assert two["cosine"] < eight["cosine"] < 1 and eight["cosine"] > 0.999
    assert two["cosine_sd"] > 0  # the noise differs between draws


def test_rendered_lines_count_who_is_closer(found):
    layers = ["0.weight", "2.weight"]
    text = fidelity.render(found, layers, ("two bits", "eight bits"))
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 3
    assert re.search(
        r"two bits has at least the mean cosine of eight bits in 0 of 2 layers. The largest shortfall.* is \d", text
    )
    assert fidelity.render(found, layers, ("eight bits", "two bits")).endswith("in 2 of 2 layers.")
