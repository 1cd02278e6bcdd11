"""saved_bytes and SavedBytes against sizes worked out by hand."""

import contextlib

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from actpress import measure


def chain():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


X_BYTES, HIDDEN_BYTES, OUT_BYTES = 3 * 8 * 4, 3 * 16 * 4, 3 * 4 * 4


def test_saved_bytes_counts_each_storage_once_and_no_parameter():
    net, x = chain(), torch.randn(3, 8)
    # x for the first layer's weight; ReLU's output, which the last layer reads too
    assert measure.saved_bytes(lambda: net(x).sum()) == X_BYTES + HIDDEN_BYTES
    assert measure.saved_bytes(lambda: net(x).square().sum()) == X_BYTES + HIDDEN_BYTES + OUT_BYTES


def test_saved_bytes_of_a_view_is_its_whole_storage():
    x = torch.randn(10, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: (x[:1] * 2).square().sum()) == 8 * 4
    y = torch.randn(10, 8)
    assert measure.saved_bytes(lambda: (x[:1] * y[:1]).sum()) == y.nbytes


def test_saved_bytes_leaves_out_buffers_but_not_batch_statistics():
    net, x = nn.BatchNorm2d(4), torch.randn(2, 4, 3, 3)
    assert measure.saved_bytes(lambda: net(x).sum()) == x.nbytes + 2 * 4 * 4  # mean and inverse deviation


@pytest.mark.parametrize("outside", [False, True], ids=["autocast inside", "autocast outside"])
def test_saved_bytes_leaves_out_autocast_copies_of_parameters(outside):
    net, x = chain(), torch.randn(3, 8)
    expected = (X_BYTES + HIDDEN_BYTES) // 2

    def loss():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(x).sum()

    if outside:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            net(x)  # fills autocast's cache
            assert measure.saved_bytes(lambda: net(x).sum()) == expected
    else:
        assert measure.saved_bytes(loss) == expected


def test_saved_bytes_is_zero_without_a_graph():
    net, x = chain(), torch.randn(3, 8)
    with torch.no_grad():
        assert measure.saved_bytes(lambda: net(x).sum()) == 0


def test_saved_bytes_forgets_a_dropped_graph():
    net, x = chain(), torch.randn(3, 8)

    def loss():
        net(torch.randn(100, 8)).sum()
        return net(x).sum()

    assert measure.saved_bytes(loss) == X_BYTES + HIDDEN_BYTES


def test_saved_bytes_of_a_checkpoint_is_its_input():
    net, x = chain(), torch.randn(3, 8, requires_grad=True)
    assert measure.saved_bytes(lambda: checkpoint(net, x, use_reentrant=False).sum()) == X_BYTES


# Of chain: x, and the hidden tensor, of which ReLU and the last layer save a copy each.
SAVES = X_BYTES + 2 * HIDDEN_BYTES


@pytest.mark.parametrize("order", ["hooks inside", "hooks outside"])
@pytest.mark.parametrize("pin_memory", [False, True], ids=["plain", "pinned"])
def test_device_and_host_bytes_are_two_numbers_under_save_on_cpu(pin_memory, order):
    net, x, saved = chain(), torch.randn(3, 8), measure.SavedBytes()
    contexts = [saved, save_on_cpu(pin_memory=pin_memory)]
    with contextlib.ExitStack() as stack:
        for context in contexts if order == "hooks inside" else reversed(contexts):
            stack.enter_context(context)
        loss = net(x).sum()
    assert (saved.bytes, saved.host_bytes) == (0, SAVES)
    loss.backward()
    stock = chain()
    stock.load_state_dict(net.state_dict())
    stock(x).sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), stock.parameters(), strict=True))
    del loss
    assert saved.host_bytes == 0


def test_saved_bytes_says_that_tensors_are_on_the_host():
    def loss():
        with save_on_cpu():
            return chain()(torch.randn(3, 8)).sum()

    with pytest.warns(UserWarning, match=f"{SAVES} bytes more are offloaded to the host"):
        assert measure.saved_bytes(loss) == 0


class Box:
    def __init__(self, tensor):
        self.inside = {"half": [tensor.half()]}


PACKS = {
    "tensor": (lambda t: t.half(), lambda t: t.float(), SAVES // 2),
    "object": (Box, lambda box: box.inside["half"][0].float(), SAVES // 2),
    "closure": (lambda t: _closure(t), lambda f: f().float(), SAVES // 2),
    "same storage": (lambda t: t.detach(), lambda t: t, X_BYTES + HIDDEN_BYTES),
}


def _closure(tensor):
    half = tensor.half()
    return lambda: half


@pytest.mark.parametrize("kind", PACKS)
def test_what_a_users_hook_keeps_is_counted(kind):
    pack, unpack, expected = PACKS[kind]

    def loss():
        with saved_tensors_hooks(pack, unpack):
            return chain()(torch.randn(3, 8)).sum()

    assert measure.saved_bytes(loss) == expected


def test_arrays_count_for_the_host():
    with measure.SavedBytes() as saved, saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        loss = chain()(torch.randn(3, 8)).sum()
    assert (saved.bytes, saved.host_bytes) == (0, SAVES)
    loss.backward()


def test_a_hook_that_hides_what_it_keeps_is_named():
    store = []

    def pack_to_disk(tensor):
        store.append(tensor.detach())
        return len(store) - 1

    with measure.SavedBytes() as saved, saved_tensors_hooks(pack_to_disk, store.__getitem__):
        loss = chain()(torch.randn(3, 8)).sum()
    with pytest.warns(UserWarning, match=f"pack_to_disk hides what it keeps of 3 saved tensors, {SAVES} bytes"):
        assert saved.bytes == 0
    assert list(saved.hidden_bytes.values()) == [SAVES]
    loss.backward()


def test_nested_counters_agree_and_hooks_are_put_back():
    enter = saved_tensors_hooks.__enter__
    net, x = chain(), torch.randn(3, 8)
    with measure.SavedBytes() as outer, measure.SavedBytes() as inner:
        loss = net(x).sum()
    assert outer.bytes == inner.bytes == X_BYTES + HIDDEN_BYTES
    assert saved_tensors_hooks.__enter__ is enter
    loss.backward()


def test_counting_does_not_hide_changes_in_place():
    x = torch.randn(3, 8, requires_grad=True)
    with measure.SavedBytes():
        y = x.exp()
        loss = y.sum()
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_tensors_count_by_their_parts():
    weight = torch.eye(4).to_sparse()
    x = torch.randn(4, 2, requires_grad=True)
    parts = weight.coalesce()
    assert measure.saved_bytes(lambda: torch.sparse.mm(parts, x).sum()) >= parts.values().nbytes


def test_saved_bytes_wants_a_scalar():
    with pytest.raises(ValueError, match=r"scalar.*\(3, 4\)"):
        measure.saved_bytes(lambda: chain()(torch.randn(3, 8)))


def test_the_measured_step_can_go_backward():
    net, x = chain(), torch.randn(3, 8)
    with measure.SavedBytes() as saved:
        loss = net(x).sum()
    assert saved.bytes > 0
    loss.backward()
    del loss
    assert saved.bytes == 0
