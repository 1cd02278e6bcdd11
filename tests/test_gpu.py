"""On a CUDA device: what the CPU tests cannot see, the allocator's peak and cuDNN's own forward passes. `make test-gpu`."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import methods, models

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16}


@pytest.fixture(params=["contiguous", "channels_last"])
def pair(request):
    """A stock ResNet-18 in CIFAR geometry, the same with Division, and a batch x [64, 3, 32, 32], y [64]."""
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[request.param]
    stock = models.create("resnet18", num_classes=10, image_size=32).to(DEVICE, memory_format=memory_format)
    x = torch.randn(64, 3, 32, 32, device=DEVICE).contiguous(memory_format=memory_format)
    y = torch.randint(10, (64,), device=DEVICE)
    division = copy.deepcopy(stock)
    actpress.apply(division, methods.Division())
    return stock, division, x, y


def loss_of(model, x, y, dtype):
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype is not None):
        return F.cross_entropy(model(x).float(), y)


@pytest.mark.parametrize("precision", AUTOCAST)
def test_forward_is_that_of_stock(pair, precision):
    stock, division, x, y = pair
    losses = [loss_of(model, x, y, AUTOCAST[precision]) for model in (stock, division)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("precision", AUTOCAST)
def test_less_is_saved_and_the_peak_falls(pair, precision):
    *pair_of_models, x, y = pair
    saved, peak = [], []
    for model in pair_of_models:

        def step(model=model):
            model.zero_grad()
            loss_of(model, x, y, AUTOCAST[precision]).backward()

        step()
        saved.append(actpress.measure.saved_bytes(lambda model=model: loss_of(model, x, y, AUTOCAST[precision])))
        peak.append(actpress.measure.peak_bytes(step, DEVICE, [model]))
    # 2.3 bits of 32 (16) per element for two of three layers, 1 bit for the third; small maps and the head cost more
    assert saved[1] < saved[0] / {"fp32": 8, "bf16": 4}[precision]
    assert peak[0] > saved[0]
    assert peak[1] < peak[0]


def test_weight_gradients_stay_close_to_exact(pair):
    stock, _, x, y = pair
    fidelity = actpress.measure.gradient_fidelity(stock, methods.Division(bits=8), (x, y))
    assert fidelity["total"].cosine > 0.999


def test_a_captured_step_draws_new_noise_in_each_replay():
    """Replays differ in their noise alone, and one that begins at a saved position has that position's noise."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)).to(DEVICE)
    actpress.apply(net, methods.Division())
    x = torch.randn(4, 3, 40, 40, device=DEVICE)

    def step():
        net.zero_grad(set_to_none=True)
        loss = net(x).square().mean()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        net.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()

    def replay():
        graph.replay()
        return [loss.clone(), *(p.grad.clone() for p in net.parameters())]

    first, state, second = replay(), actpress.swap.state(net), replay()
    (added,) = state["contexts"][0]["added"].values()
    assert list(added.values()) == [1, 1, 1]  # a draw of each layer but the ReLU
    assert torch.equal(first[0], second[0])
    for position in (1, 3, 5):  # weights: of convolutions, and of the norm
        assert not torch.equal(first[position], second[position])
    actpress.swap.load_state(net, state)
    assert all(torch.equal(again, tensor) for again, tensor in zip(replay(), second, strict=True))
    (added,) = actpress.swap.state(net)["contexts"][0]["added"].values()
    assert list(added.values()) == [2, 2, 2]
    assert not torch.equal(replay()[1], second[1])
