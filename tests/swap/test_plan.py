"""Plans: what `apply` executes, refuses, restricts and undoes; how plans compose."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import layers
from actpress.codec import DENSE
from actpress.methods import Checkpoint, Division, Offload
from actpress.swap import Around, Functions, Graph, Method, Swap

X = torch.randn(4, 6)


def net():
    return nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3))


@dataclass(frozen=True)
class Planned(Method):
    """A method with a given plan."""

    edits: tuple

    def plan(self, model):
        return self.edits


@dataclass(frozen=True)
class Noting:
    """Notes each call in `seen`."""

    name: str
    seen: list

    def __call__(self, forward, *args, **kwargs):
        self.seen.append(self.name)
        return forward(*args, **kwargs)


def test_calls_around_a_forward_run_outermost_last_and_only_where_gradients_are_recorded():
    model, seen = net(), []
    method = Planned((Around("0", Noting("inner", seen)), Around("0", Noting("outer", seen))))
    report = actpress.apply(model, method)
    assert report.replaced == {"0.forward()": ("nn.Sequential", f"nn.Sequential under {actpress.swap.label(method)}")}
    model(X)
    assert seen == ["outer", "inner"]
    with torch.no_grad():
        model(X)
    assert seen == ["outer", "inner"]
    assert actpress.restore(model) == ["0"] and type(model[0]) is nn.Sequential
    model(X)
    assert seen == ["outer", "inner"]


def test_functions_are_replaced_inside_of_other_calls():
    class Relu(nn.Module):
        def forward(self, x):
            return F.relu(x)

    model, seen = nn.Sequential(Relu()), []

    def relu(x, inplace=False):
        seen.append("relu")
        return layers.relu(x)

    actpress.apply(model, Planned((Around("0", Noting("around", seen)), Around("0", Functions({"relu": relu})))))
    model(X.clone().requires_grad_())
    assert seen == ["around", "relu"]


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (Swap("2", layers.Linear, DENSE), ValueError, "names the module '2', which the model does not have"),
        ("Linear", TypeError, "its plan holds 'Linear', allowed: Swap, Around, Graph"),
    ],
)
def test_a_plan_that_cannot_be_executed_is_refused(edit, error, message):
    model = net()
    with pytest.raises(error, match=message):
        actpress.apply(model, Planned((edit,)))
    assert actpress.restore(model) == []


def test_a_plan_changes_a_module_once():
    twice = (Swap("1", layers.Linear, DENSE), Swap("1", layers.Linear, DENSE))
    with pytest.raises(ValueError, match=r"holds two edits Swap of '1'"):
        actpress.apply(net(), Planned(twice))


def test_a_graph_edit_compiles_in_place_and_restore_undoes_it():
    torch.compiler.reset()
    model, graphs = net(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    keys = list(model.state_dict())
    actpress.apply(model, Planned((Graph("", backend),)))
    expected = net()
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(X), expected(X)) and len(graphs) == 1 and list(model.state_dict()) == keys
    actpress.restore(model)
    torch.compiler.reset()
    model(X)
    assert len(graphs) == 1


def test_where_restricts_what_a_method_does_around_the_whole_model_to_the_topmost_modules():
    model = net()
    report = actpress.apply(model, Offload(), where=lambda name, module: name.startswith("0"))
    assert list(report.replaced) == ["0.forward()"] and actpress.restore(model) == ["0"]


def test_where_that_allows_nothing_is_an_error():
    with pytest.raises(ValueError, match="matches nothing"):
        actpress.apply(net(), Offload(), where=lambda name, module: False)


@pytest.mark.parametrize("order", [(Checkpoint(), Division()), (Division(), Checkpoint())], ids=["first", "last"])
def test_plans_compose_in_any_order(order):
    block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = copy.deepcopy(block)

        def forward(self, x):
            return F.relu(x + self.inner(x))

    model = nn.Sequential(Block(), Block())
    report = actpress.apply(model, actpress.compose(*order))
    assert {"0.forward()", "1.forward()", "0.relu()", "0.inner.0", "1.inner.1"} <= set(report.replaced)
    stock, x = copy.deepcopy(model), torch.randn(64, 6)
    actpress.restore(stock)
    saved = [actpress.measure.saved_bytes(lambda m=m: m(x).sum()) for m in (stock, model)]
    assert saved[1] <= 2 * x.nbytes < saved[0]  # the input of each block; x itself is counted, too
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_wrapped_model_can_be_copied_and_pickled(tmp_path):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(2)))
    actpress.apply(model, Offload())
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(X), model(X)) and actpress.restore(twin) == [""] and type(twin) is nn.Sequential
