"""relu_mask: a code of a ReLU's output decodes to exact zeros where that ReLU made them, at no bytes.

It matters where block means are subtracted, or levels are fixed. Where the least value of a group is a level, that is the zero already.
"""

import copy
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import actpress
from actpress import measure
from actpress.codec import mask_of
from actpress.kernels.common.bits import packed_bytes
from actpress.methods import Division, Quantize

METHODS = {
    "division": lambda **options: Division(lfc="always", **options),
    "division auto": Division,
    "division authors": lambda **options: Division(align="authors", **options),
    "quantize": Quantize,
    "quantize group": lambda **options: Quantize(grouping="group", size=24, **options),
    "quantize normal": lambda **options: Quantize(levels="normal", **options),
}
EXACT_ANYWAY = ("division auto", "quantize", "quantize group")  # on the maps of noise used here
AFFINE = [("quantize normal", reader) for reader in ("conv", "linear")]
READERS = {  # layers that read the output of a ReLU, [2, 6, 17, 19]
    "conv": nn.Conv2d(6, 5, 3, padding=1),
    "batch norm": nn.BatchNorm2d(6),
    "linear": nn.Linear(19, 5),
}
PAIRS = [  # norms that are coded normalised have other zeros
    (method, reader)
    for method in METHODS
    for reader, layer in READERS.items()
    if (found := METHODS[method]().replacement("", layer)) is not None
    and not ("norm" in reader and found.codec.normalised)
]


class Net(nn.Module):
    """A ReLU, something done to its output, and a layer that reads it."""

    def __init__(self, reader="conv", inplace=False, between=lambda y: y):
        super().__init__()
        self.relu, self.reader, self.between = nn.ReLU(inplace), copy.deepcopy(READERS[reader]), between

    def forward(self, x):
        return self.reader(self.between(self.relu(x * 1.0)))


@pytest.fixture
def decoded(monkeypatch):
    """A function: (network, x) -> (x~ of the network's reader, how many tensors it was decoded from) of a pass there and back."""

    def run(net, x):
        results, decode = [], type(net.reader.codec).decode

        def spy(codec, kept, like, mask=None):
            results.append((decode(codec, kept, like, mask), len(kept) + (mask is not None)))
            return results[-1][0]

        with monkeypatch.context() as patch:
            patch.setattr(type(net.reader.codec), "decode", spy)
            net(x).float().square().sum().backward()
        (result,) = results
        return result

    return run


def applied(method, net):
    torch.manual_seed(0)  # the same noise
    actpress.apply(net, method)
    return net


def pair(method, *args, **options):
    """(the network under the method, the same with relu_mask)"""
    return tuple(applied(METHODS[method](relu_mask=on), Net(*args, **options)) for on in (False, True))


def feature(memory_format=torch.contiguous_format):
    return torch.randn(2, 6, 17, 19).to(memory_format=memory_format).requires_grad_()


@pytest.mark.quick(40)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("method", "reader"), PAIRS)
def test_zeros_of_the_relu_are_zeros_of_the_decoded_tensor(decoded, method, reader, inplace, memory_format, bf16):
    x, (plain, masked) = feature(memory_format), pair(method, reader, inplace)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        (expected, before), (got, after) = decoded(plain, x), decoded(masked, x)
    if reader == "linear" and memory_format == torch.channels_last:
        assert after == before and torch.equal(
            got, expected
        )  # tokens of such maps are coded in another order than the mask's
    else:
        assert after == before + 1 and got.dtype == expected.dtype
        got, expected = got.view(x.shape), expected.view(x.shape)  # tokens have three axes
        assert torch.equal(got, torch.where(x > 0, expected, 0))
        assert (expected[x <= 0] != 0).any() != (method in EXACT_ANYWAY or (method, reader) in AFFINE)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("method", METHODS)
def test_no_bytes_more(method, inplace):
    x = feature()
    saved = [measure.saved_bytes(lambda net=net: net(x).sum()) for net in pair(method, "conv", inplace)]
    assert saved[0] == saved[1] > packed_bytes(x.numel(), 1)


@pytest.mark.parametrize(
    "between",
    [
        lambda y: y.add_(1),
        lambda y: y.view(-1).add_(1).view_as(y),
        lambda y: no_grad_add(y),
        lambda y: y + 0,
        lambda y: y.detach(),
    ],
    ids=["in place", "through a view", "without graph", "another tensor", "detached"],
)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_no_longer_the_output_is_decoded_plainly(decoded, method, inplace, between):
    x, (plain, masked) = feature(), pair(method, "conv", inplace, between)
    (expected, before), (got, after) = decoded(plain, x), decoded(masked, x)
    assert after == before and torch.equal(got, expected)


def no_grad_add(y):
    with torch.no_grad():
        y.add_(1)
    return y


def test_two_readers_share_code_and_mask():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x):
            x = F.relu(x)
            return self.first(x) + self.second(x)

    net, x = applied(Division(relu_mask=True), Two()), feature()
    y = net(x)  # held: up to PyTorch 2.11 what a node saved goes with the output
    nodes = [node for node, _ in y.grad_fn.next_functions]
    one, other = (
        [t for t in node.saved_tensors if t is not None and t.numel() and not t.requires_grad] for node in nodes
    )
    assert len(one) == len(other) == 5
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_closer(method):
    """Every element that the mask sets right had an error, and no other changes. Squared errors over 20 draws of the noise."""
    if method in EXACT_ANYWAY:
        pytest.skip("there is nothing to gain")
    stock = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
    if method == "quantize normal":
        stock[2] = nn.BatchNorm2d(8)
    x, dy = torch.randn(2, 3, 16, 16), torch.randn(2, stock[2].weight.shape[0], 16, 16)

    def last_gradient(net):
        net.zero_grad()
        net(x).backward(dy)
        return net[2].weight.grad.clone()

    def error(**options):
        net = applied(METHODS[method](**options), copy.deepcopy(stock))
        return sum((last_gradient(net) - exact).square().sum().item() for _ in range(20))

    exact = last_gradient(stock)
    assert error(relu_mask=True) < error()


@pytest.mark.parametrize("method", METHODS)
def test_networks_can_be_copied_and_pickled_after_a_pass(method):
    net, x = pair(method)[1], feature()
    y = net.relu(x * 1.0)
    net.reader(y).sum().backward()
    file = io.BytesIO()
    torch.save(net.relu, file)
    torch.save(y.detach(), file)
    twin = copy.deepcopy(net.reader)
    for reader in (net.reader, twin):
        reader.zero_grad()
        reader(net.relu(x * 1.0)).sum().backward()
    assert torch.equal(twin.weight.grad, net.reader.weight.grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
def test_checkpoints_find_the_mask_in_both_passes(method, inplace):
    x, net = feature(), pair(method, "conv", inplace)[1]
    twin = copy.deepcopy(net)
    twin.reader.context.draws += 1  # the noise of the second pass
    checkpoint(net, x, use_reentrant=False).square().sum().backward()
    twin(x).square().sum().backward()
    assert torch.equal(net.reader.weight.grad, twin.reader.weight.grad)


def test_the_mask_dies_with_the_output_where_nothing_saves_it():
    net, x = pair("division")[1], feature()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.shape, lambda shape: None):
        y = net.relu(x)
    gone = weakref.ref(mask_of(y))
    del y
    assert gone() is None


@pytest.mark.quick(1)
@pytest.mark.parametrize("method", METHODS)
def test_compiled_code_decodes_plainly(method):
    torch.compiler.reset()
    net, x = pair(method)[1], feature()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_a_value_that_is_no_truth_is_refused():
    with pytest.raises(ValueError, match="Division: relu_mask=1, allowed: True, False"):
        Division(relu_mask=1)
