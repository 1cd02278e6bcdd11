"""Functions that a forward calls: found however they are reached, and handed to the method's own."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as nnf
from torch import nn
from torch import relu as torch_relu
from torch.nn import functional as F
from torch.nn.functional import relu
from torch.nn.functional import relu as act

import actpress
from actpress import measure, swap
from actpress.methods import Division
from actpress.swap import functional
from actpress.swap.calls import calls

BY_NAME = {"relu": F.relu}


def helper(x):
    return helper_of_helper(x)


def helper_of_helper(x):
    return act(x)


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3), F.relu

    def attend(self, x):
        return nnf.relu(x)

    @staticmethod
    def static(x):
        return nnf.relu(x)


class Parent(Base):
    def forward(self, x):
        return relu(x)


def forwards():
    closed = nnf.relu

    def from_import(self, x):
        return relu(self.conv(x))

    def from_torch(self, x):
        return torch_relu(self.conv(x))

    def module_alias(self, x):
        return nnf.relu(self.conv(x))

    def whole_path(self, x):
        return torch.nn.functional.relu(self.conv(x))

    def alias(self, x):
        return act(self.conv(x))

    def local_import(self, x):
        from torch.nn.functional import relu as inner

        return inner(self.conv(x))

    def local_alias(self, x):
        f = F.relu if self.training else torch.relu
        return f(self.conv(x))

    def default(self, x, f=F.relu):
        return f(self.conv(x))

    def closure(self, x):
        return closed(self.conv(x))

    def attribute(self, x):
        return self.function(self.conv(x))

    def own_method(self, x):
        return self.attend(self.conv(x))

    def own_static_method(self, x):
        return self.static(self.conv(x))

    def helper_function(self, x):
        return helper(self.conv(x))

    def handed_on(self, x):
        return next(map(F.relu, [self.conv(x)]))

    def tensor_method(self, x):
        return self.conv(x).relu()

    return {name: f for name, f in locals().items() if name != "closed"}


def module(forward, base=Base):
    return type("Net", (base,), {"forward": forward, "__module__": __name__})()


@pytest.mark.parametrize("name", forwards())
def test_a_relu_is_found_and_replaced_however_it_is_reached(name):
    net, x = module(forwards()[name]), torch.randn(2, 3, 8, 8)
    assert calls(net, type(net)).found == {"relu"}
    stock = copy.deepcopy(net)
    report = actpress.apply(net, Division())
    assert report.replaced["relu()"] == ("relu()", "actpress.relu()")
    assert torch.equal(net(x), stock(x))
    dense = 2 * 4 * 6 * 6 * 4
    assert measure.saved_bytes(lambda: net(x).sum()) < measure.saved_bytes(lambda: stock(x).sum()) - 0.9 * dense


def test_super_is_followed():
    class Child(Parent):
        def forward(self, x):
            return super().forward(self.conv(x))

    assert calls(Child(), Child).found == {"relu"}


def test_a_call_of_a_submodule_is_no_function():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.blocks = nn.ReLU(), nn.ModuleList([nn.ReLU()])

        def forward(self, x):
            return self.blocks[0].relu(self.relu(x))

    assert calls(Net(), Net).found == set()


def test_what_cannot_be_read_is_named_in_the_report():
    scope = {"nn": nn, "F": F}
    exec("class Made(nn.Module):\n    def forward(self, x): return F.relu(x)\n", scope)
    report = actpress.apply(nn.Sequential(scope["Made"](), nn.ReLU()), Division())
    assert report.untouched["0: Made.forward()"].startswith("functions untouched: no source")


def test_pytorchs_own_composite_layers_are_read():
    report = actpress.apply(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), Division())
    assert "relu()" in report.replaced
    assert "self_attn.multi_head_attention_forward()" in report.untouched


def taken(name, call):
    """Arguments, as torch.nn.functional's function names them, that the replacement of `name` gets from call()."""
    seen = {}

    def ours(*args, **kwargs):
        seen["args"] = (args, kwargs)
        return torch.zeros(())

    with functional.Replacing(functional.table_of({name: ours})):
        call()
    return seen.get("args")


X = torch.randn(2, 4, 8, 8)
V = torch.ones(4)


@pytest.mark.parametrize(
    "name,call,args,kwargs",
    [
        ("gelu", lambda: F.gelu(input=X, approximate="tanh"), (), {"input": X, "approximate": "tanh"}),
        ("relu", lambda: torch.relu(input=X), (), {"input": X}),
        ("relu", lambda: F.relu(input=X, inplace=True), (X,), {"inplace": True}),
        ("hardswish", lambda: F.hardswish(input=X), (X,), {"inplace": False}),
        ("sigmoid", lambda: F.sigmoid(input=X), (X,), {}),
        ("tanh", lambda: X.tanh(), (X,), {}),
        ("leaky_relu", lambda: F.leaky_relu(X, 0.2), (X,), {"negative_slope": 0.2, "inplace": False}),
        ("elu", lambda: F.elu(X), (X,), {"alpha": 1.0, "inplace": False}),
        ("dropout", lambda: F.dropout(X, 0.2, False), (X,), {"p": 0.2, "training": False, "inplace": False}),
        ("dropout", lambda: torch.dropout(X, 0.2, train=True), (X, 0.2, True), {}),
        ("max_pool2d", lambda: torch.max_pool2d(X, 2), (X, 2, None, 0, 1, False), {}),
        ("layer_norm", lambda: torch.layer_norm(X, (8,), eps=1e-3), (X, (8,), None, None, 1e-3), {}),
        ("group_norm", lambda: torch.group_norm(X, 2), (X, 2, None, None, 1e-5), {}),
        (
            "batch_norm",
            lambda: torch.batch_norm(X, V, None, None, None, True, 0.1, 1e-5, False),
            (X, None, None, V, None, True, 0.1, 1e-5),
            {},
        ),
        ("linear", lambda: F.linear(X, weight=torch.ones(3, 8)), (X,), {"weight": torch.ones(3, 8)}),
        ("conv2d", lambda: torch.conv2d(X, torch.ones(3, 4, 1, 1), padding=1), (X, torch.ones(3, 4, 1, 1)), {"padding": 1}),
        ("softmax", lambda: X.softmax(1), (X, 1), {"dtype": None}),
    ],
)  # fmt: skip
def test_a_replacement_gets_the_arguments_of_the_functional_form(name, call, args, kwargs):
    got = taken(name, call)
    torch.testing.assert_close(got[0], args, check_device=False)
    assert got[1].keys() == kwargs.keys()
    assert all(torch.equal(v, kwargs[k]) if isinstance(v, torch.Tensor) else v == kwargs[k] for k, v in got[1].items())


def test_only_what_the_method_maps_is_intercepted():
    assert taken("gelu", lambda: (F.relu(X), X.sigmoid(), F.max_pool2d(X, 2))) is None
    assert taken("sigmoid", lambda: torch.sigmoid(X, out=torch.empty_like(X))) is None  # autograd records no such call


@pytest.mark.parametrize("name", ["max_pool2d", "dropout", "layer_norm", "hardswish", "sigmoid", "linear"])
def test_functional_forms_run_under_the_mode(name):
    """The stock function in its own place: outputs and gradients are stock's."""
    arguments = {"max_pool2d": (2,), "layer_norm": ((8,),), "linear": (torch.ones(3, 8),), "dropout": (0.5,)}
    stock = getattr(F, name)
    grads = []
    for rules in ({}, {name: lambda *args, **kwargs: stock(*args, **kwargs)}):
        x = X.clone().requires_grad_()
        torch.manual_seed(0)
        with functional.Replacing(functional.table_of(rules)):
            getattr(F, name)(x, *arguments.get(name, ())).square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_second_method_adds_its_functions():
    class Half(swap.Method):
        def rules(self):
            return {}

        def functions(self):
            return {"relu": lambda x, inplace=False: x * 0, "glu": lambda x, dim=-1: F.glu(x, dim)}

    def forward(self, x):
        return F.glu(F.relu(self.conv(x)), 1)

    net, x = module(forward), torch.randn(1, 3, 8, 8)
    stock = copy.deepcopy(net)
    actpress.apply(net, Division())
    report = actpress.apply(net, Half())
    assert set(net._around[0].rules) == {"relu", "glu"} and list(report.replaced) == ["glu()"]
    assert torch.equal(net(x), stock(x))  # the first rule for relu stays
    assert net._actpress[:3] == ("", "Division + Half", type(stock))


def test_an_intercepted_module_keeps_its_signature_and_its_class_name():
    import inspect

    net = Parent()
    actpress.apply(net, Division())
    assert list(inspect.signature(net.forward).parameters) == ["x"]
    assert type(net).__qualname__ == "Parent" and isinstance(net, Parent)
    assert type(pickle.loads(pickle.dumps(net))).__name__ == "Parent"


class Locked(nn.Module):
    """Says itself what of it is copied."""

    def __init__(self):
        super().__init__()
        self.conv, self.lock, self.codec = nn.Conv2d(3, 4, 3), threading.Lock(), "its own"

    def __getstate__(self):
        return {**self.__dict__, "lock": None}

    def forward(self, x):
        return F.relu(self.conv(x))


class LockedLinear(nn.Linear):
    def __init__(self):
        super().__init__(64, 64)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {**self.__dict__, "lock": None}

    def forward(self, x):
        return 2 * F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("make,shape", [(Locked, (2, 3, 8, 8)), (LockedLinear, (2, 64))], ids=["functions", "layer"])
def test_a_copy_is_made_as_the_class_says(make, shape, way):
    net, x = make(), torch.randn(shape)
    actpress.apply(net, Division(bits=8), where=lambda *_: True)
    twin = way(net)
    assert twin.lock is None and type(twin).forward is not make.forward
    assert torch.equal(twin(x), net(x))
    kept = [measure.saved_bytes(lambda model=model: model(x).sum()) for model in (net, twin)]
    assert kept[0] == kept[1]
    assert actpress.restore(twin) and type(twin) is make
    assert make is not Locked or twin.codec == "its own", "restore takes only what apply gave"


def test_the_generated_code_of_a_traced_graph_stays_dense_and_is_named():
    graph, x = torch.fx.symbolic_trace(module(lambda self, x: F.relu(self.conv(x)))), torch.randn(2, 3, 8, 8)
    report = actpress.apply(graph, Division(), sample=x)
    assert report.replaced.keys() == {"conv"}
    assert report.untouched["relu()"] == "relu() untouched: called by the generated code of a torch.fx.GraphModule"
    expected = graph(x)
    graph.recompile()
    for net in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(net(x), expected)


def test_a_function_that_cannot_be_differentiated_twice_is_named_with_module_and_method():
    class Net(nn.Module):
        def forward(self, x):
            return F.elu(x)

    net, x = nn.Sequential(nn.Linear(8, 64), Net()), torch.randn(4, 8, requires_grad=True)
    actpress.apply(net, Division(bits=4), where=lambda *_: True)
    (gradient,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"elu\(\) in '1' under Division\(bits=4\) made this gradient"):
        gradient.sum().backward()
