"""Seeds on a device, of CPU tensors: the same as the host's, no launch a draw, new ones in each replay, and where a run goes on."""

import copy
import io
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import actpress
from actpress import codec, swap
from actpress.codec import Context
from actpress.kernels.common import seeds
from actpress.methods import Division
from devices import mimic_gpu
from networks import convolutions

X = torch.empty(3)


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    """CPU tensors get their seeds as CUDA tensors do."""
    monkeypatch.setattr(codec, "banked", lambda x: True)


@pytest.fixture
def capture(monkeypatch):
    """capture(True): draws are captured from now on; an addition to a seed is then what a replay would repeat."""
    state = {"on": False}
    monkeypatch.setattr(seeds, "capturing", lambda device: state["on"])
    return lambda on: state.update(on=on)


class Launches(TorchDispatchMode):
    """Names of the operations that write to a tensor or make one."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def drawn(context, count):
    return [int(context.seed_for(X)) for _ in range(count)]


def host(context, first, count):
    return [seeds.seed_of(context.seed, draw) for draw in range(first, first + count)]


def test_the_seeds_are_those_of_the_host_all_the_way_round():
    context = Context(2**63 - 5)
    assert drawn(context, 2 * seeds.COUNT + 9) == host(context, 1, 2 * seeds.COUNT + 9)


def test_draws_launch_nothing_but_the_moves_of_a_half():
    context = Context(7)
    context.seed_for(X)
    with Launches() as launched:
        for _ in range(2 * seeds.COUNT):
            context.seed_for(X)
    assert [name for name in launched.names if "slice" not in name] == ["add_.Tensor", "bitwise_and_.Scalar"] * 4


@pytest.mark.parametrize("draws", [0, seeds.QUARTER - 2, seeds.HALF - 2, seeds.HALF])
def test_a_seed_that_is_read_late_is_still_there(draws):
    context = Context(7)
    context.draws = draws
    late = context.seed_for(X)
    for _ in range(seeds.QUARTER):
        context.seed_for(X)
    assert int(late) == seeds.seed_of(7, draws + 1)


def test_a_training_step_fills_no_seed_and_no_two_draws_share_one(monkeypatch):
    mimic_gpu(monkeypatch)
    net = convolutions()
    actpress.apply(net, Division())
    found, inner = [], Context.seed_for

    def noted(self, x):
        seed = inner(self, x)
        found.append(int(seed))
        return seed

    monkeypatch.setattr(Context, "seed_for", noted)
    x = torch.randn(4, 3, 11, 10)
    net(x).sum().backward()
    with Launches() as launched:
        for _ in range(2):
            net(x).sum().backward()
    assert len(found) == len(set(found)) == 9
    assert not any(name.startswith(("full", "randint")) for name in launched.names)


@pytest.mark.parametrize("draws", [5, seeds.HALF - 2, 3 * seeds.HALF, 5 * seeds.COUNT])
def test_a_position_can_be_set(draws):
    context = Context(3)
    drawn(context, 2)
    context.draws = draws
    assert drawn(context, 4) == host(context, draws + 1, 4)
    context.draws = 0
    assert drawn(context, 1) == host(context, 1, 1)


def test_captured_draws_add_on_the_device_and_never_meet(capture):
    context = Context(3)
    eager = drawn(context, 5)
    capture(True)
    views = [context.seed_for(X) for _ in range(3)]
    capture(False)
    found = eager + [int(view) for view in views]
    for _ in range(4):  # a replay
        for view in views:
            view.add_(1)
            found.append(int(view))
    found += drawn(context, seeds.COUNT + 9)  # once round: the places of the captured draws are drawn from again
    for view in views:
        view.add_(1)
        found.append(int(view))
    assert len(found) == len(set(found))


def test_a_half_that_is_used_up_in_a_capture_moves_on_afterwards(capture):
    context = Context(3)
    context.draws = seeds.QUARTER - 3
    drawn(context, 1)
    capture(True)
    with Launches() as launched:
        captured = drawn(context, 4)
    capture(False)
    assert [name for name in launched.names if name.startswith(("add_", "copy_", "bitwise"))] == ["add_.Tensor"] * 4
    assert captured == [seed + 1 for seed in host(context, seeds.QUARTER - 1, 4)]
    assert drawn(context, seeds.COUNT - 9) == host(context, seeds.QUARTER + 3, seeds.COUNT - 9)


def test_what_cannot_be_captured_is_refused(capture):
    context = Context(3)
    capture(True)
    with pytest.raises(RuntimeError, match="run a training step before"):
        context.seed_for(X)
    capture(False)
    drawn(context, 1)
    capture(True)
    context.draws = 2 * seeds.HALF
    with pytest.raises(RuntimeError, match="more than 1024 draws"):
        context.seed_for(X)


def replayed(capture):
    """A context with a captured draw that was replayed twice."""
    context = Context(3)
    drawn(context, 4)
    capture(True)
    view = context.seed_for(X)
    capture(False)
    view.add_(2)
    return context, view


@pytest.mark.parametrize("again", [False, True], ids=["a new graph", "the same graph"])
def test_a_state_holds_what_replays_added(capture, again):
    context, view = replayed(capture)
    state = copy.deepcopy(context.state())
    assert state["added"] == {"cpu": {5: 3}}
    if again:
        view.add_(7)
        drawn(context, 6)
    else:
        context = Context(0)
    context.load_state(state)
    assert context.state() == state
    assert drawn(context, 3) == host(context, 6, 3)
    assert int(context._banks[X.device]._views[5]) == seeds.seed_of(3, 5) + 3
    context.draws = seeds.COUNT + 4  # the place of the captured draw
    assert drawn(context, 1) == [seeds.seed_of(3, seeds.COUNT + 5) + 3]


def test_a_model_goes_on_where_it_was_saved():
    def stepped(net, steps):
        for _ in range(steps):
            context.seed_for(X)
        return int(net[0].context.seed_for(X))

    nets = [convolutions() for _ in range(2)]
    for net in nets:
        actpress.apply(net, Division())
        context = net[0].context
        stepped(net, 3)
    swap.load_state(nets[1], swap.state(nets[0]))
    assert int(nets[0][0].context.seed_for(X)) == int(nets[1][0].context.seed_for(X))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_by_itself(capture, how):
    context = replayed(capture)[0]
    context.epoch = 2
    file = io.BytesIO()
    torch.save(context, file)
    twin = copy.deepcopy(context) if how == "deepcopy" else torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert twin.state() == context.state() and twin.epoch == 2
    assert drawn(twin, 3) == drawn(context, 3)
    assert twin.seed_for(X).data_ptr() != context.seed_for(X).data_ptr()


def test_threads_never_share_a_draw():
    context, found = Context(1), []

    def draw():
        for _ in range(1500):
            found.append(int(context.seed_for(X)))  # noqa: PERF401 - appended as they come

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert context.draws == 3000
    assert sorted(found) == sorted(host(context, 1, 3000))
