"""The check for outputs that nobody shares: one warning, on the first training forward pass, and only where it is true."""

import contextlib
import copy
import io
import threading
import warnings

import pytest
import torch
from torch import nn

import actpress
from actpress import measure
from actpress.methods import Division, FewBit, Inverted


def mlp(*between, width=256, activation=nn.GELU):
    return nn.Sequential(nn.Linear(64, width), activation(), *between, nn.Linear(width, 64))


def frozen(net):
    net[-1].requires_grad_(False)
    return net


UNSHARED = {
    "dropout": (lambda: mlp(nn.Dropout(0.1)), r"'1': '2' is dropout \(p=0\.1\)"),
    "frozen": (lambda: frozen(mlp()), "'1': '2' is frozen"),
    "both": (lambda: frozen(mlp(nn.Dropout(0.1))), r"'1': '2' is dropout \(p=0\.1\)"),
}
SHARED = {
    "plain": lambda: mlp(),
    "dropout off": lambda: mlp(nn.Dropout(0.0)),
    "handed on": lambda: mlp(nn.Identity(), nn.Flatten(1), nn.Unflatten(1, (256,))),
    "frozen convolution": lambda: frozen(nn.Sequential(nn.Conv2d(1, 2, 1), nn.SiLU(), nn.Conv2d(2, 2, 1))),
    "gate": lambda: nn.Sequential(nn.Linear(64, 64), Gate()),
}


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.act = nn.Linear(64, 64), nn.Linear(64, 64), nn.SiLU()

    def forward(self, x):
        return self.act(self.gate(x)) * self.up(x)


def batch_for(net):
    return torch.randn(2, 1, 4, 4) if isinstance(net[0], nn.Conv2d) else torch.randn(3, 64)


def hooks(net):
    return sum(
        len(h)
        for m in net.modules()
        for h in (
            m._forward_hooks,
            m._forward_pre_hooks,
            m._forward_hooks_always_called,
            m._forward_pre_hooks_with_kwargs,
        )
    )


def first_steps(net, **kwargs):
    """Messages of the first two training forward passes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            net(batch_for(net), **kwargs).sum().backward()
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("case", UNSHARED)
def test_warns_once_where_sharing_cannot_happen(case):
    build, expected = UNSHARED[case]
    net = build()
    actpress.apply(net, Inverted())
    with pytest.warns(UserWarning, match=expected):
        net(batch_for(net)).sum().backward()
    assert hooks(net) == 0
    assert first_steps(net) == []


@pytest.mark.parametrize("case", UNSHARED)
def test_the_warning_is_true(case):
    stock = UNSHARED[case][0]()
    ours = copy.deepcopy(stock)
    actpress.apply(ours, Inverted())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kept = [measure.saved_bytes(lambda net=net: net(batch_for(net)).sum()) for net in (stock, ours)]
    assert kept[1] > kept[0]


@pytest.mark.parametrize("case", SHARED)
def test_does_not_warn_where_it_can(case):
    net = SHARED[case]()
    actpress.apply(net, Inverted())
    assert first_steps(net) == []
    assert hooks(net) == 0


@pytest.mark.parametrize("case", SHARED)
def test_where_it_does_not_warn_it_saves(case):
    stock = SHARED[case]()
    ours = copy.deepcopy(stock)
    actpress.apply(ours, Inverted())
    kept = [measure.saved_bytes(lambda net=net: net(batch_for(net)).sum()) for net in (stock, ours)]
    assert kept[1] < kept[0]


def test_warns_of_a_codec_on_the_next_layer():
    net = mlp()
    actpress.apply(net, actpress.compose(Inverted(), Division()))
    with pytest.warns(UserWarning, match="'1': '2' keeps a code of its input"):
        net(torch.randn(3, 64)).sum().backward()


def test_warns_where_autocast_copies():
    net = nn.Sequential(nn.GELU(), nn.Linear(64, 4))
    actpress.apply(net, Inverted())
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(UserWarning, match="'0': '1' keeps a copy in bfloat16"):
            net(x).sum().backward()
        assert measure.saved_bytes(lambda: net(x).sum()) == 3 * 64 * (4 + 2 + 1 / 8)


def test_few_bit_needs_no_sharing():
    net = mlp(nn.Dropout(0.5))
    actpress.apply(net, FewBit())
    assert first_steps(net) == [] and hooks(net) == 0


def test_the_check_waits_for_training():
    net = mlp(nn.Dropout(0.5)).eval()
    actpress.apply(net, Inverted())
    assert first_steps(net) == []
    with torch.no_grad():
        net.train()(torch.randn(3, 64))
    with pytest.warns(UserWarning, match="dropout"):
        net(torch.randn(3, 64))


def test_a_failed_forward_leaves_the_check_to_the_next():
    net = mlp(nn.Dropout(0.5))
    actpress.apply(net, Inverted())
    before = hooks(net)
    with pytest.raises(RuntimeError):
        net(torch.randn(3, 65))
    assert hooks(net) == before
    with pytest.warns(UserWarning, match="dropout"):
        net(torch.randn(3, 64))
    assert hooks(net) == 0


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_has_a_check_of_its_own(kind):
    net = mlp(nn.Dropout(0.5))
    actpress.apply(net, Inverted())
    if kind == "deepcopy":
        twin = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    for model in (twin, net):
        with pytest.warns(UserWarning, match="dropout"):
            model(torch.randn(3, 64))
        assert hooks(model) == 0


def test_compiled_models_are_not_checked_until_they_run_eagerly():
    net = mlp(nn.Dropout(0.5))
    actpress.apply(net, Inverted())
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert first_steps_of_compiled(compiled) == []
    with pytest.warns(UserWarning, match="dropout"):
        net(torch.randn(3, 64))


def first_steps_of_compiled(net):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net(torch.randn(3, 64)).sum().backward()
    return [str(w.message) for w in caught if "activations keep an output" in str(w.message)]


class Interrupting(nn.Module):
    def forward(self, x):
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", [Division(), Inverted()], ids=["division", "inverted"])
def test_an_interrupted_pass_leaves_no_hooks_behind(method):
    net = mlp(Interrupting())
    actpress.apply(net, method)
    before = hooks(net)
    with contextlib.suppress(KeyboardInterrupt):
        net(torch.randn(3, 64))
    assert hooks(net) == before
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert torch.autograd.graph.saved_tensors_hooks.__enter__.__name__ == "__enter__"
    net[2] = nn.Identity()
    net(torch.randn(3, 64))
    assert hooks(net) == 0, "the next pass is watched"


def test_what_an_exception_holds_on_to_is_cleaned_up_by_the_next_apply():
    net = mlp(Interrupting())
    actpress.apply(net, Division())
    with pytest.raises(KeyboardInterrupt) as held:
        net(torch.randn(3, 64))
    actpress.apply(mlp(), Division())
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    assert held


def test_two_threads_in_the_first_pass():
    inside, leave, errors = threading.Event(), threading.Event(), []

    class Wait(nn.Module):
        def forward(self, x):
            if threading.current_thread().name == "first":
                inside.set()
                assert leave.wait(30)
            return x

    def run():
        try:
            net(torch.randn(3, 64)).sum().backward()
            assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        except BaseException as error:
            errors.append(error)
        finally:
            leave.set() if threading.current_thread().name == "second" else None

    net = mlp(Wait())
    actpress.apply(net, Division())
    threads = [threading.Thread(target=run, name=name) for name in ("first", "second")]
    threads[0].start()
    assert inside.wait(30)
    threads[1].start()
    for thread in threads:
        thread.join()
    assert errors == [] and hooks(net) == 0
