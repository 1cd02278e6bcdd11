"""Comparing methods by their gradients on one network."""

import pytest
import torch
from torch import nn

from actpress.methods import BlockPruning, Division, Stock
from actpress.tables import gradients


@pytest.fixture(scope="module")
def found():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 64, 5))
    batches = [(torch.randn(4, 3, 12, 12), torch.randint(5, (4,))) for _ in range(2)]
    methods = {"stock": Stock(), "two bits": Division(), "eight bits": Division(bits=8)}
    return gradients.compare(net, methods, batches, draws=3)


def test_figures_are_means_over_batches_and_draws(found):
    exact = {"cosine": 1, "cosine_sd": 0, "norm_ratio": 1, "bias": 0, "noise": 0, "excess": None, "n": 2}
    assert found["stock"]["0.weight"] == pytest.approx(exact, abs=1e-9)  # one draw of each batch is enough
    two, eight = found["two bits"]["total"], found["eight bits"]["total"]
    assert two["cosine"] < eight["cosine"] < 1 and eight["cosine"] > 0.999
    assert two["cosine_sd"] > 0  # the noise differs between draws
    assert two["n"] == 6 and two["noise"] > eight["noise"] > 0


def test_bias_of_an_unbiased_method_is_what_chance_explains():
    """The last layer's weight gradient is linear in the decoded input, whose expectation is the input; top-k pruning is biased."""
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    batch = (torch.randn(32, 64), torch.randint(5, (32,)))
    methods = {
        "division": Division(),
        "sample": BlockPruning(sparsity=0.5, select="sample"),
        "top-k": BlockPruning(sparsity=0.5),
    }
    last = {
        label: figures["2.weight"] for label, figures in gradients.compare(net, methods, [batch], draws=100).items()
    }
    for label in ("division", "sample"):
        # about 1 is expected; systematic sampling follows a single number, whose mean strays by 2 standard errors in one of twenty
        assert last[label]["excess"] < 2, f"{label}: bias is {last[label]['excess']:.2f} standard errors"
        assert last[label]["bias"] < last[label]["noise"] / 5
    assert last["top-k"]["noise"] == 0 and last["top-k"]["bias"] > 0.1


def test_parameters_without_a_gradient_have_no_figures():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 5))
    nn.init.zeros_(net[1].weight)
    found = gradients.compare(net, {"two bits": Division()}, [(torch.randn(4, 8), torch.randint(5, (4,)))], draws=2)
    assert set(found["two bits"]) == {"1.weight", "1.bias", "total"}


def test_saved_share():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batch = (torch.randn(4, 3, 16, 16), torch.randint(5, (4,)))
    assert gradients.saved_share(net, Stock(), batch) == 1
    assert 2 / 32 < gradients.saved_share(net, Division(), batch) < 4 / 32
