"""Gradient fidelity: exact for the stock method, 0 for a lost gradient."""

import copy

import pytest
import torch
from torch import nn

from actpress import measure
from actpress.methods import Stock


def test_gradient_fidelity_of_stock_is_perfect_and_leaves_the_model_alone():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batch = (torch.randn(6, 8), torch.randint(4, (6,)))
    before = copy.deepcopy(net.state_dict())
    result = measure.gradient_fidelity(net, Stock(), batch)
    assert set(result) == {*dict(net.named_parameters()), "total"}
    assert all(
        f.cosine == pytest.approx(1, abs=1e-9) and f.norm_ratio == pytest.approx(1, abs=1e-9) for f in result.values()
    )
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_gradient_of_zero_has_cosine_0():
    assert measure.fidelity(torch.zeros(3), torch.ones(3)) == measure.Fidelity(0.0, 0.0)
