"""torch.compile within a budget: exact gradients, fewer bytes, undone by restore."""

import copy

import pytest
import torch
from torch import nn

import actpress
from actpress import measure
from actpress.methods import CompileBudget


def net():
    return nn.Sequential(*(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(3)))


def saved(budget: float, x: torch.Tensor) -> tuple[int, torch.Tensor]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = net()
    actpress.apply(model, CompileBudget(budget))
    model(x)  # compiles
    with measure.SavedBytes(casts=False, modules=False) as counted:
        loss = model(x).square().sum()
    kept = counted.bytes
    loss.backward()
    return kept, model[0][0].weight.grad


@pytest.mark.slow
def test_a_smaller_budget_saves_fewer_bytes_and_the_gradients_stay_exact():
    x = torch.randn(256, 32)
    (much, first), (little, second) = saved(1.0, x), saved(0.2, x)
    assert little < much
    torch.manual_seed(0)
    stock = net()
    stock(x).square().sum().backward()
    for found in (first, second):
        torch.testing.assert_close(found, stock[0][0].weight.grad, rtol=1e-4, atol=1e-4)


def test_restore_takes_the_compilation_away():
    model = net()
    twin = copy.deepcopy(model)
    report = actpress.apply(model, CompileBudget())
    assert report.replaced == {"forward()": ("nn.Sequential", "nn.Sequential under CompileBudget")}
    assert actpress.restore(model) == [""] and vars(model).keys() == vars(twin).keys()


@pytest.mark.parametrize("budget", [-0.1, 1.5, True, "half"])
def test_refuses_other_budgets(budget):
    with pytest.raises(ValueError, match=r"CompileBudget: budget=.*, allowed: 0 <= budget <= 1"):
        CompileBudget(budget)


def test_what_was_compiled_before_is_neither_compiled_again_nor_lost():
    model = net()
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="'' is compiled in place already"):
        actpress.apply(model, CompileBudget())
    assert model._compiled_call_impl is not None


def test_bytes_of_compiled_code_are_not_mistaken_for_those_of_stock():
    model, x = net(), torch.randn(4, 32)
    with pytest.raises(ValueError, match="copies are not compiled"):
        actpress.apply(copy.deepcopy(model), CompileBudget(), sample=x)
    with pytest.raises(ValueError, match="CompileBudget compiles the model"):
        actpress.check(model, CompileBudget(), x)
    actpress.apply(model, CompileBudget())
    with pytest.raises(ValueError, match="was compiled in place"):
        measure.saved_bytes(lambda: model(x).sum())
    assert not actpress.swap.is_compiled(copy.deepcopy(model))
