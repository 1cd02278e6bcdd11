"""Applying methods: what is replaced, what is refused, what is shared."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

import actpress
from actpress import layers, measure, swap
from actpress.layers import applied
from actpress.methods import BlockPruning, Division, FewBit, Frequency, Inverted, Pooling, Quantize, Stock


def test_report_names_what_changed_and_what_did_not():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.GELU()))
    report = actpress.apply(net, Division())
    assert report.replaced == {"0": ("nn.Conv2d", "actpress.Conv2d"), "1.0": ("nn.BatchNorm2d", "actpress.BatchNorm2d")}
    assert report.untouched == {"1.1": "nn.GELU untouched: no rule"}
    assert "1  nn.Conv2d -> actpress.Conv2d" in str(report)


def test_a_model_that_is_one_layer_is_replaced_too():
    net = nn.Conv2d(3, 4, 3)
    assert actpress.apply(net, Division()).replaced == {"": ("nn.Conv2d", "actpress.Conv2d")}
    assert type(net) is layers.Conv2d


def test_subclasses_with_a_forward_of_their_own_are_left_alone():
    class Leaky(nn.ReLU):
        def forward(self, x):
            return torch.where(x > 0, x, 0.1 * x)

    net = nn.Sequential(Leaky(), nn.ReLU())
    report = actpress.apply(net, Division())
    assert list(report.replaced) == ["1"]
    assert "a subclass of nn.ReLU" in report.untouched["0"]


def test_no_matching_layer_is_an_error_that_names_the_layers():
    with pytest.raises(ValueError, match=r"Division.*matches nothing in Sequential.*nn\.GELU, nn\.Identity"):
        actpress.apply(nn.Sequential(nn.GELU(), nn.Identity()), Division())
    net = nn.Sequential(nn.ReLU())
    actpress.apply(net, Division())
    with pytest.raises(ValueError, match="matches nothing"):
        actpress.apply(net, Division())


def test_stock_replaces_nothing():
    assert actpress.apply(nn.Sequential(nn.ReLU()), Stock()).replaced == {}


def test_a_method_must_be_a_method():
    with pytest.raises(TypeError, match="division"):
        actpress.apply(nn.ReLU(), "division")


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"bits": 3}, "bits=3, allowed: 1, 2, 4, 8"),
        ({"block": 0}, "block=0, allowed: integers from 1"),
        ({"block": 2.5}, "block=2.5, allowed"),
        ({"align": "floor"}, "align='floor', allowed: ceil, authors"),
        ({"lfc": "never"}, "lfc='never', allowed: auto, always"),
    ],
)
def test_bad_arguments_name_the_value_and_the_allowed_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        Division(**arguments)


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("align,copies", [("ceil", 1), ("authors", 2)])
def test_one_tensor_read_by_two_layers_is_encoded_once(align, copies):
    net, x = TwoReaders(), torch.randn(2, 4, 16, 16)
    actpress.apply(net, Division(align=align))
    once = measure.saved_bytes(lambda: net.a(x).sum())
    assert measure.saved_bytes(lambda: net(x).sum()) == copies * once
    assert net.a.context.draws == copies + 1


def test_a_changed_tensor_is_encoded_again():
    net, x = TwoReaders(), torch.randn(2, 4, 16, 16)
    actpress.apply(net, Division(bits=8))
    y = net.a(x)
    x.mul_(-1)
    (y + net.b(x)).sum().backward()
    stock = TwoReaders()
    stock.load_state_dict(net.state_dict())
    stock.b(x).sum().backward()
    assert (
        torch.nn.functional.cosine_similarity(net.b.weight.grad.flatten(), stock.b.weight.grad.flatten(), dim=0) > 0.999
    )
    assert (
        torch.nn.functional.cosine_similarity(net.a.weight.grad.flatten(), stock.b.weight.grad.flatten(), dim=0)
        < -0.999
    )


def test_the_code_is_not_kept_once_the_graph_is_gone():
    net, x, kept = TwoReaders(), torch.randn(2, 4, 16, 16), []

    def note(tensor):
        kept.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor.detach()

    actpress.apply(net, Division())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = net(x).sum()
    loss.backward()
    codes = [
        reference for reference in kept if reference.cdata not in {p.untyped_storage()._cdata for p in net.parameters()}
    ]
    del loss
    assert codes and all(reference.expired() for reference in codes)


def test_each_pass_over_one_batch_draws_new_noise():
    net, x = TwoReaders(), torch.randn(2, 4, 16, 16)
    actpress.apply(net, Division())
    for draws in (1, 2):
        net(x).sum().backward()
        assert net.a.context.draws == draws


def test_noise_is_reproducible_and_can_be_put_back():
    x = torch.randn(2, 4, 16, 16)

    def gradient(net):
        net.zero_grad()
        net(x.clone()).square().sum().backward()
        return net.a.weight.grad.clone()

    nets = []
    for _ in range(2):
        torch.manual_seed(7)
        net = TwoReaders()
        actpress.apply(net, Division())
        nets.append(net)
    first, second = gradient(nets[0]), gradient(nets[0])
    assert torch.equal(gradient(nets[1]), first) and not torch.equal(second, first)
    state = swap.state(nets[0])
    third = gradient(nets[0])
    swap.load_state(nets[0], state)
    assert torch.equal(gradient(nets[0]), third)
    assert swap.state(TwoReaders()) == {}
    with pytest.raises(ValueError, match="does not fit"):
        swap.load_state(TwoReaders(), state)


def test_the_global_generator_is_not_touched():
    net, x = TwoReaders(), torch.randn(2, 4, 16, 16)
    actpress.apply(net, Division())
    state = torch.get_rng_state()
    net(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_on_replaced_modules_still_run():
    net, seen = copy.deepcopy(TwoReaders()), []
    net.a.register_forward_hook(lambda *_: seen.append("a"))
    actpress.apply(net, Division())
    net(torch.randn(1, 4, 8, 8))
    assert seen == ["a"]


class Functional(nn.Module):
    """Calls functions where others have modules."""

    def __init__(self):
        super().__init__()
        self.conv, self.gelu = nn.Conv2d(3, 4, 3), nn.GELU()

    def forward(self, x):
        x = torch.relu(self.conv(x))
        x = F.relu(x - 0.5, inplace=True)
        return self.gelu(x).softmax(-1)


def test_functions_called_in_forward_are_replaced_and_the_others_named():
    stock, x = Functional(), torch.randn(2, 3, 8, 8)
    ours = copy.deepcopy(stock)
    report = actpress.apply(ours, Division())
    assert report.replaced["relu()"] == ("relu()", "actpress.relu()")
    assert report.untouched == {"gelu": "nn.GELU untouched: no rule", "softmax()": "softmax() untouched: no rule"}
    assert torch.equal(ours(x), stock(x)) and isinstance(ours, Functional)
    stock_bytes, our_bytes = (measure.saved_bytes(lambda net=net: net(x).sum()) for net in (stock, ours))
    hidden = 2 * 4 * 6 * 6 * 4
    assert stock_bytes == x.nbytes + 3 * hidden  # the image, both relus (gelu reads the second), softmax
    assert our_bytes < stock_bytes - hidden  # the first relu and the image; gelu keeps its input, softmax its output


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "compile"])
def test_a_model_with_replaced_functions_can_be_copied_and_compiled(how):
    net, x = Functional(), torch.randn(2, 3, 8, 8)
    actpress.apply(net, Division())
    if how == "compile":
        twin = torch.compile(net, fullgraph=True, backend="aot_eager")
    else:
        twin = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
        assert list(twin.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(twin(x), net(x))
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parameters())


def test_densenets_last_relu_is_replaced():
    with measure.fake_model(torchvision.models.densenet121) as net:
        report = actpress.apply(net, Division())
    assert "relu()" in report.replaced
    kept_dense = {why for name, why in report.untouched.items()}
    assert not any(
        word in why for why in kept_dense for word in ("Conv2d", "BatchNorm2d", "relu", "AvgPool2d untouched: a")
    )


def test_changed_modules_know_their_name_method_and_stock_class():
    net = nn.Sequential(Functional(), nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1)))
    actpress.apply(net, Division(bits=4))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    for model in (net, twin):
        noted = {note[:4] for module in model.modules() if (note := applied.of(module)) is not None}
        assert noted == {
            ("0", "Division(bits=4)", Functional, f"{__name__}.Functional"),
            ("0.conv", "Division(bits=4)", nn.Conv2d, "actpress.layers.conv.Conv2d"),
            ("1.0", "Division(bits=4)", nn.Linear, "actpress.layers.matmul.Linear"),
        }


def test_a_label_shows_the_options_that_differ_from_their_defaults():
    assert swap.label(Division()) == "Division"
    assert swap.label(Division(bits=8), also=("block",)) == "Division(block=8, bits=8)"
    assert swap.label(actpress.compose(Stock(), Division(block=4))) == "Stock + Division(block=4)"


def parts():
    torch.manual_seed(3)
    net = nn.ModuleDict(
        {"body": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), "head": nn.Linear(8 * 196, 4)}
    )
    actpress.apply(net["body"], Quantize())
    actpress.apply(net["head"], Division())
    return net


def step(net, x):
    net.zero_grad()
    net["head"](net["body"](x)).square().sum().backward()
    return [p.grad.clone() for p in net.parameters()]


def test_the_state_holds_the_noise_of_every_apply():
    net, fresh, x = parts(), parts(), torch.randn(4, 3, 16, 16)
    step(net, x)
    net["body"](x).sum().backward()  # the parts draw a different number of times
    state = swap.state(net)
    assert [context["draws"] for context in state["contexts"]] == [2, 1]
    assert state == pickle.loads(pickle.dumps(state))
    swap.load_state(fresh, state)
    assert all(map(torch.equal, step(fresh, x), step(net, x)))


def test_a_state_of_an_older_version_is_read():
    net = nn.Sequential(nn.Linear(8, 8))
    actpress.apply(net, Division())
    swap.load_state(net, {"seed": 5, "draws": 7, "epoch": 1})
    assert net[0].context.state() == {"seed": 5, "draws": 7, "epoch": 1}
    with pytest.warns(UserWarning, match="holds 1 of 2 positions"):
        swap.load_state(parts(), {"seed": 5, "draws": 7, "epoch": 1})
    with pytest.raises(ValueError, match="does not fit a model with 1 applied"):
        swap.load_state(net, swap.state(parts()))


def test_where_restricts_a_method_to_some_modules():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), Functional()))
    report = actpress.apply(net, Division(), where=lambda name, module: name.startswith("1.0"))
    assert list(report.replaced) == ["1.0"]
    assert report.untouched["0"] == "nn.Linear untouched: left out by where"
    assert type(net[0]) is nn.Linear and type(net[1][1]) is Functional
    with pytest.raises(ValueError, match="matches nothing"):
        actpress.apply(nn.Sequential(nn.Linear(4, 4)), Division(), where=lambda name, module: False)


class Norm(nn.BatchNorm2d):
    """A subclass with a forward of its own that calls the stock one."""

    def forward(self, x):
        return F.relu(super().forward(x))


def restorable():
    return nn.Sequential(Functional(), Norm(4), nn.GELU(), nn.Flatten(), nn.Linear(4 * 36, 5))


@pytest.mark.parametrize("copied", [False, True], ids=["itself", "after pickling"])
def test_restore_is_the_way_back(copied):
    net, x, ran = restorable(), torch.randn(2, 3, 8, 8), []
    stock = copy.deepcopy(net)
    net[4].register_forward_hook(lambda *_: ran.append(1) and None) if not copied else None
    classes = [type(module) for module in net.modules()]
    attributes = [set(vars(module)) for module in net.modules()]
    actpress.apply(net, Inverted())
    actpress.apply(net, Division(relu_mask=True))
    net = pickle.loads(pickle.dumps(net)) if copied else net
    parameters = dict(net.named_parameters())
    changed = actpress.restore(net)
    assert {"0", "0.conv", "0.gelu", "1", "2", "4"} == set(changed)
    assert [type(module) for module in net.modules()] == classes
    assert [set(vars(module)) for module in net.modules()] == attributes
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == (0 if copied else 1)
    for model in (net, stock):
        model(x).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), stock.parameters(), strict=True))
    assert copied or ran == [1]
    assert actpress.restore(net) == []
    assert actpress.apply(net, Division()).replaced


def test_applying_twice_says_what_to_do():
    net = nn.Sequential(nn.ReLU())
    actpress.apply(net, Division())
    with pytest.raises(ValueError, match=r"Division is applied already, actpress.restore\(model\) undoes that"):
        actpress.apply(net, Division())


@pytest.mark.parametrize("why", ["where", "sample", "interrupted"])
def test_an_apply_that_fails_leaves_the_model_as_it_was(why):
    net = restorable()
    actpress.apply(net, Inverted())
    classes = [type(module) for module in net.modules()]
    attributes = [dict(vars(module)) for module in net.modules()]

    def where(name, module):
        if name == "4":
            raise KeyboardInterrupt if why == "interrupted" else ZeroDivisionError
        return True

    with pytest.raises((ZeroDivisionError, KeyboardInterrupt, RuntimeError)):
        if why == "sample":
            net[4].register_forward_hook(lambda module, *_: 1 / 0 if hasattr(module, "codec") else None)
            attributes = [dict(vars(module)) for module in net.modules()]
            with pytest.raises(ZeroDivisionError):
                actpress.apply(net, Division(), sample=torch.randn(2, 3, 8, 8))
            raise ZeroDivisionError
        actpress.apply(net, Division(), where=where)
    assert [type(module) for module in net.modules()] == classes
    assert [dict(vars(module)) for module in net.modules()] == attributes


def test_restore_refuses_to_drop_what_another_tool_mixed_in():
    net, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU()), torch.randn(4, 32)
    actpress.apply(net, Division())
    nn.utils.parametrizations.weight_norm(net[0])
    with pytest.raises(RuntimeError, match=r"restore: '0' is a ParametrizedLinear, made by another tool after apply"):
        actpress.restore(net)
    net(x).sum().backward()
    nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    assert actpress.restore(net) == ["0", "1"]
    net(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda: actpress.apply("model", Division()),
        lambda: actpress.restore(None),
        lambda: actpress.check(lambda x: x, Division(), torch.randn(2, 3)),
    ],
    ids=["apply", "restore", "check"],
)
def test_what_is_no_model_is_named(call):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got"):
        call()


def test_where_must_be_a_function():
    with pytest.raises(TypeError, match=r"where must be a function of .name, module., got 'layer'"):
        actpress.apply(nn.Linear(2, 2), Division(), where="layer")


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: Division(bits=2.0), "Division: bits=2.0, allowed: 1, 2, 4, 8"),
        (lambda: Division(bits=True), "Division: bits=True, allowed: 1, 2, 4, 8"),
        (lambda: Division(block=True), "Division: block=True, allowed: integers from 1"),
        (lambda: Quantize(bits=4.0), "Quantize: bits=4.0, allowed: 1, 2, 4, 8"),
        (lambda: Quantize(bits=[2]), r"Quantize: bits=\[2\], allowed: 1, 2, 4, 8"),
        (lambda: Quantize(size=True), "Quantize: size=True, allowed: integers from 1 to 16384"),
        (lambda: Frequency(bits=4.0), "Frequency: bits=4.0, allowed: 1, 2, 4, 8"),
        (lambda: Frequency(block=True), "Frequency: block=True, allowed: integers from 1"),
        (lambda: FewBit(bits=3.0), "FewBit: bits=3.0, allowed: 1, 2, 3, 4"),
        (lambda: FewBit(bits=True), "FewBit: bits=True, allowed: 1, 2, 3, 4"),
        (lambda: Inverted(decoder=1), "Inverted: decoder=1, allowed: fine, medium, coarse"),
        (lambda: Pooling(block=True), "Pooling: block=True, allowed: integers from 1"),
        (lambda: Pooling(stages=None), "Pooling: stages=None, allowed: a dict of name pattern and block"),
        (lambda: Pooling(stages={1: 2}), "Pooling: stages={1: 2}, allowed: a dict of name pattern and block"),
        (lambda: BlockPruning(block=(1, True)), r"BlockPruning: block=\(1, True\), allowed: two integers from 1"),
        (lambda: BlockPruning(select=[]), r"BlockPruning: select=\[\], allowed: topk, sample"),
    ],
)
def test_an_option_of_another_type_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_methods_are_hashable():
    assert len({Division(), Quantize(), Pooling(), Pooling(stages={"a": 2}), BlockPruning(), Inverted(), FewBit()}) == 7
