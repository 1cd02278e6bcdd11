"""What apply says about the memory it saves: measured with a sample, watched on the first training step without."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import actpress
from actpress import measure, swap
from actpress.methods import BlockPruning, Division, Inverted, Stock


class Dense(nn.Module):
    """A module that no method knows and that keeps two tensors of its input's size."""

    def forward(self, x):
        return (x.exp() * 0.1).cos()


def useless():
    """One small layer that Division replaces, and much that it does not."""
    return nn.Sequential(nn.Linear(64, 64), Dense(), Dense(), Dense())


def useful():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())


X, IMAGES = torch.randn(32, 64), torch.randn(4, 3, 16, 16)


def said(step):
    """Warnings of actpress about the saving that step() issues."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    return [str(w.message) for w in caught if "actpress: " in str(w.message) and " saves " in str(w.message)]


def hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_the_report_says_what_each_line_saves_given_a_sample():
    net = useful()
    before = measure.saved_bytes(lambda: net(IMAGES).sum())
    buffers, seed = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    report = actpress.apply(net, Division(), sample=IMAGES)
    assert all(torch.equal(value, buffers[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed) and hooks(net) == 0
    assert report.saving.saved_before == before
    assert report.saving.saved_after == measure.saved_bytes(lambda: net(IMAGES).sum())
    (line,) = [line for line in str(report).splitlines() if "nn.ReLU -> actpress.ReLU" in line]
    relus = 4 * 16 * (14 * 14 + 12 * 12) * 4 / 2**20
    assert line.split()[0] == "2" and line.split()[-2:] == [f"{relus:.2f}", f"{relus / 32:.2f}"]
    assert f"{report.saving.ratio:.2f}x less" in str(report)


def test_a_sample_names_what_stayed_dense_and_its_share():
    with pytest.warns(UserWarning, match=r"Division saves \d+% .*\n.*tests.Dense .*\(9\d%\)"):
        report = actpress.apply(useless(), Division(), sample=X)
    (item,) = [item for item in report.saving.dense if item.type == "tests.Dense"]
    assert item.bytes == 6 * X.nbytes and item.share == item.bytes / report.saving.saved_after


@pytest.mark.parametrize("sample", [X, (X,), {"input": X}], ids=["tensor", "tuple", "dict"])
def test_forms_of_a_sample(sample):
    assert actpress.apply(useless()[:1], Division(), sample=sample).saving.saved_before == X.nbytes


def test_another_sample_is_refused_before_anything_changes():
    net = useful()
    with pytest.raises(ValueError, match="sample is a list, allowed: a tensor, a tuple"):
        actpress.apply(net, Division(), sample=[IMAGES])
    assert type(net[0]) is nn.Conv2d


def test_the_first_training_pass_warns_once():
    net = useless()
    assert said(lambda: actpress.apply(net, Division())) == []
    (message,) = said(lambda: net(X).sum().backward())
    assert message.startswith("actpress: Division saves about ") and "tests.Dense" in message
    assert said(lambda: net(X).sum().backward()) == [] and hooks(net) == 0


@pytest.mark.parametrize(
    "build,method,x", [(useful, Division(), IMAGES), (useless, Stock(), X)], ids=["saves", "stock"]
)
def test_nothing_is_said_where_it_saves_or_means_to_change_nothing(build, method, x):
    net = build()
    actpress.apply(net, method)
    assert said(lambda: net(x).sum().backward()) == [] and hooks(net) == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_the_estimate_is_near_what_a_sample_measures(autocast, bias):
    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            *useful(), nn.MaxPool2d(2), Dense(), nn.Flatten(), nn.Linear(576, 64, bias=bias), *useless()
        )

    exact, watched = build(), build()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with pytest.warns(UserWarning, match="Division saves"):
            report = actpress.apply(exact, Division(), sample=IMAGES[:2])
            report.saving.warn_below(float("inf"))
        actpress.apply(watched, Division())
        (watch,) = [hook.__self__ for hook in watched._forward_hooks.values()]
        watch.worth = float("inf")
        (message,) = said(lambda: watched(IMAGES[:2]))
    estimate = float(message.split(", ")[1].partition("x less")[0])
    assert estimate == pytest.approx(
        report.saving.ratio, rel=0.05
    )  # statistics and the casts of parameters are not estimated


def test_the_watch_changes_no_number():
    nets = [useful(), useful()]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        torch.manual_seed(0)
        actpress.apply(net, Division())
    actpress.swap.first_pass.remove_all(nets[1])
    for _ in range(2):
        grads = []
        for net in nets:
            net.zero_grad()
            net(IMAGES).square().sum().backward()
            grads.append([p.grad for p in net.parameters()])
        assert all(map(torch.equal, *grads))


def test_the_ruler_sees_through_the_watch():
    net = useless()
    actpress.apply(net, Division())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = measure.saved_bytes(lambda: net(X).sum())
    assert hooks(net) == 0 and first == measure.saved_bytes(lambda: net(X).sum())


RUNS = {
    "checkpointed": lambda net: checkpoint(net, X.clone().requires_grad_(), use_reentrant=False),
    "offloaded": lambda net: _under(save_on_cpu(), net),
    "hooks of a user": lambda net: _under(saved_tensors_hooks(lambda t: t.detach(), lambda t: t), net),
    "func": lambda net: torch.func.functional_call(net, dict(net.named_parameters()), (X,)),
    "compiled": lambda net: torch.compile(net, backend="aot_eager", fullgraph=True)(X),
    "evaluation": lambda net: net.eval()(X),
}


def _under(context, net):
    with context:
        return net(X)


@pytest.mark.parametrize("kind", RUNS)
def test_training_goes_on_under_everything_that_cannot_be_watched(kind):
    net = useless()
    stock = copy.deepcopy(net)
    actpress.apply(net, Division(bits=8))
    torch._dynamo.reset()  # shapes of other tests would be taken for ones that vary
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        RUNS[kind](net).sum().backward()
    stock(X).sum().backward()
    for p, q in zip(net.parameters(), stock.parameters(), strict=True):
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.999, kind
    if kind != "func":  # a plain pass, which is watched
        assert hooks(net) == 2
        assert len(said(lambda: net.train()(X).sum().backward())) == 1


def test_checkpoints_inside_the_model_say_nothing():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = useless()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    net = Inside()
    actpress.apply(net, Division())
    assert said(lambda: net(X.clone().requires_grad_()).sum().backward()) == []


def test_the_watch_can_be_copied_pickled_and_survives_an_error():
    net = useless()
    actpress.apply(net, Division())
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 3))
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net):
        assert len(said(lambda twin=twin: twin(X).sum().backward())) == 1 and hooks(twin) == 0
    assert saved_tensors_hooks.__enter__.__name__ == "__enter__"


def test_two_methods_on_one_model_are_watched_together():
    net = nn.Sequential(nn.GELU(), *useless())
    actpress.apply(net, Inverted())
    actpress.apply(net, BlockPruning(skip=()))
    (message,) = said(lambda: net(X.clone().requires_grad_()).sum().backward())
    assert message.startswith("actpress: Inverted + BlockPruning(skip=()) saves")


def test_a_late_method_is_watched_once_it_has_started():
    net = nn.Sequential(useless(), Dense())
    actpress.apply(net, BlockPruning(start_epoch=1, skip=()))
    assert said(lambda: net(X).sum().backward()) == []
    swap.set_epoch(net, 1)
    assert len(said(lambda: net(X).sum().backward())) == 1


class Standardised(nn.Conv2d):
    """A convolution that computes its weight, as weight standardisation does."""

    def forward(self, x):
        weight = (self.weight - self.weight.mean()) * self.weight.std()
        return F.conv2d(x, weight, self.bias)


def test_weights_that_a_layer_computes_are_named_as_dense():
    net, x = nn.Sequential(Standardised(64, 64, 3)), torch.randn(1, 64, 4, 4)
    actpress.apply(net, Division())
    (message,) = said(lambda: net(x).sum().backward())
    assert "weights computed by tests.Standardised" in message


def test_a_model_of_one_layer_is_not_watched():
    net = nn.Linear(8, 8)
    actpress.apply(net, Division())
    assert hooks(net) == 0
