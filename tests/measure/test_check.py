"""actpress.check: bytes, gradients and time of a method on a model, which does not change."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import measure
from actpress.methods import Division, Inverted
from actpress.swap import Method, Replacement


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


BATCH = (torch.randn(4, 3, 8, 8), torch.randint(5, (4,)))


def test_numbers_are_those_of_saved_bytes():
    model = net()
    found = actpress.check(model, Division(bits=8), BATCH, draws=2, steps=1)
    ours = copy.deepcopy(model)
    actpress.apply(ours, Division(bits=8))
    for saved, twin in ((found.saved_before, model), (found.saved_after, ours)):
        assert saved == measure.saved_bytes(lambda twin=twin: F.cross_entropy(twin(BATCH[0]), BATCH[1]))
    assert found.ratio == found.saved_before / found.saved_after > 2
    # 8 bits: errors below a percent.
    assert 0.99 < found.cosine < 1 and found.norm_ratio == pytest.approx(1, abs=0.05)
    assert found.step_ratio > 0 and found.draws == 2 and found.loss == "cross-entropy"
    assert "0.weight" in {g.name for g in found.gradients} and found.gradients[0].cosine == min(
        g.cosine for g in found.gradients
    )


def test_the_model_is_left_alone():
    model = net().eval()
    model(BATCH[0]).sum().backward()
    state, grads = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    seed = torch.get_rng_state()
    actpress.check(model, Division(), BATCH, steps=1)
    assert not model.training and type(model[0]) is nn.Conv2d
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), seed)


def test_one_table_names_what_stayed_dense():
    text = str(actpress.check(nn.Sequential(net(), nn.Softsign()), Division(), BATCH, steps=1))
    rows = [line.split("  ")[0] for line in text.splitlines()]
    for row in ("kept for backward", "step time", "gradient: cosine", "gradient: size", "stayed dense: nn.Softsign"):
        assert row in rows, text
    assert text.count("lowest cosine: ") == 3


class Doubled(nn.Linear):
    """A layer whose gradient is wrong: twice the size, or of the other sign."""

    factor = 2.0

    def forward(self, x):
        y = super().forward(x)
        return self.factor * y - (self.factor - 1) * y.detach()


class Reversed(Doubled):
    factor = -1.0


@pytest.mark.parametrize("layer,cosine,size", [(Doubled, 1, 2), (Reversed, -1, 1)], ids=["size", "direction"])
def test_wrong_gradients_are_warned_of(layer, cosine, size):
    class Wrong(Method):
        closer = "a layer that is right"

        def rules(self):
            return {nn.Linear: Replacement(layer)}

    told = rf"under Wrong the gradient of Linear has cosine {cosine:.3f} and {size:.3f} times .*; closer with a layer that is right"
    with pytest.warns(UserWarning, match=told):
        found = actpress.check(nn.Linear(6, 3), Wrong(), torch.randn(4, 6), steps=1)
    assert not found.is_faithful and "FAR FROM EXACT" in str(found)
    assert (found.cosine, found.norm_ratio) == pytest.approx((cosine, size))


class Losses(nn.Module):
    """Returns what libraries return: an object with a loss, logits, or a dict of losses."""

    def __init__(self, kind):
        super().__init__()
        self.linear, self.kind = nn.Linear(4, 4), kind

    def forward(self, x):
        y = self.linear(x)
        kinds = {
            "loss": SimpleNamespace(loss=y.exp().sum(), logits=y),
            "logits": SimpleNamespace(logits=y),
            "losses": {"a": y.sum(), "b": y.square().sum()},
            "tuple": (y, y),
        }
        return kinds[self.kind]


@pytest.mark.parametrize(
    "kind,used",
    [
        ("loss", "the model's loss"),
        ("losses", "sum of the model's losses"),
        ("logits", "mean of squares of the output"),
        ("tuple", "mean of squares of the output"),
    ],
)
def test_the_loss_that_is_used_is_named(kind, used):
    found = actpress.check(Losses(kind), Division(bits=8), {"x": torch.randn(8, 4)}, steps=1)
    assert found.loss == used and used in str(found)


def test_targets_decide_the_loss_and_a_loss_can_be_given():
    x = torch.randn(8, 4)
    assert actpress.check(nn.Linear(4, 3), Division(), (x, torch.randn(8, 3)), steps=1).loss == "mean squared error"
    assert actpress.check(nn.Linear(4, 3), Division(), (x, torch.randn(8, 3)), F.l1_loss, steps=1).loss == "l1_loss"
    with pytest.raises(ValueError, match=r"targets are torch.float32 \(8, 7\) for outputs \(8, 3\), allowed: int64"):
        actpress.check(nn.Linear(4, 3), Division(), (x, torch.randn(8, 7)))


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"batch": (1, 2, 3)}, "batch is a tuple of 3, allowed: a tensor"),
        ({"draws": 0}, "draws=0, allowed: integers from 1"),
        ({"method": Inverted()}, "Inverted matches nothing in Linear"),
        ({"loss": lambda y: y}, "the loss must be a scalar tensor"),
        ({"loss": lambda y: 0 * y.sum()}, "the exact gradient is zero"),
        ({"batch": torch.full((8, 4), float("nan"))}, "the exact gradient is not finite, of 'weight' for one"),
        ({"model": nn.Linear(4, 3).requires_grad_(False)}, "no parameter of the model requires a gradient"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        actpress.check(**{"model": nn.Linear(4, 3), "method": Division(), "batch": torch.randn(8, 4)} | arguments)


def test_a_model_that_has_a_method_is_compared_as_it_was_without():
    model = net()
    before = actpress.check(model, Division(), BATCH, steps=1).saved_before
    actpress.apply(model, Division(bits=4))
    assert actpress.check(model, Division(), BATCH, steps=1).saved_before == before
    assert actpress.layers.applied.of(model[0]).method == "Division(bits=4)"


def test_inference_mode_is_named():
    with torch.inference_mode(), pytest.raises(RuntimeError, match="check: inference mode is on"):
        actpress.check(nn.Linear(4, 3), Division(), torch.randn(8, 4))
