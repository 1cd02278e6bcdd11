"""On a CUDA device: what the CPU tests cannot see, the allocator's peak and cuDNN's own forward passes. `make test-gpu`."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import actpress
from actpress import methods
from actpress.bench import steps
from actpress.codec import Context, Like
from actpress.kernels.common.layout import is_channels_last
from actpress.layers import norm
from actpress.train import models
from paths import ROOT

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
    gradients = actpress.measure.gradients(stock, (x, y), methods.Division(bits=8))
    assert not [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    fidelity = actpress.measure.gradient_fidelity(stock, methods.Division(bits=8), (x, y))
    assert fidelity["total"].cosine > 0.999


MAPS = [(64, 3, 32, 32), (64, 64, 32, 32), (64, 128, 16, 16), (64, 256, 8, 8), (64, 512, 4, 4), (1, 512, 64, 1)]
MAPS += [(8, 32, 28, 28), (8, 24, 24, 24), (2, 3, 14, 14)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_maps_of_a_network_come_back_within_a_step(shape, bits, memory_format, dtype):
    """Rows before and after the encoded ones are NaN: whoever reads or writes beyond is found."""
    x = torch.randn((shape[0] + 2, *shape[1:]), device=DEVICE, dtype=dtype).to(memory_format=memory_format)
    x[0], x[-1] = torch.nan, torch.nan
    codec, context = methods.division.DivisionCodec(8, bits, "ceil", "auto"), Context(0)
    inner = x[1:-1]
    for _ in range(10):
        kept = codec.encode(inner, context)
        decoded = codec.decode(kept, Like(inner.shape, dtype, is_channels_last(inner)))
        step = (inner.amax((2, 3), keepdim=True) - inner.amin((2, 3), keepdim=True)).float() / (2**bits - 1)
        assert ((decoded.float() - inner.float()).abs() <= 1.5 * step + 0.05).all()
    assert x[0].isnan().all() and x[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_norms_normalise_in_one_pass_as_in_three(memory_format, dtype, monkeypatch):
    x = (100 * torch.randn(8, 24, 20, 20, device=DEVICE)).to(dtype).to(memory_format=memory_format)
    mean, invstd = torch.randn(24, device=DEVICE), torch.rand(24, device=DEVICE)
    with torch.no_grad():
        one_pass = norm._normalised(x, mean, invstd)
        assert one_pass.dtype == dtype and one_pass.stride() == x.stride()
        monkeypatch.setattr(norm, "directly", lambda x: False)
        three = norm._normalised(x, mean, invstd)
    torch.testing.assert_close(one_pass.float(), three.to(dtype).float(), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_backward_of_a_convolution_makes_no_copy_of_maps():
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.Conv2d(32, 16, 1, bias=False), nn.AvgPool2d(2))
    net = net.to(DEVICE, torch.bfloat16, memory_format=torch.channels_last)
    x = torch.randn(16, 16, 64, 64, device=DEVICE, dtype=torch.bfloat16).to(memory_format=torch.channels_last)

    def copies(model):
        x.requires_grad_()
        for _ in range(3):
            y = model(x).square().sum()
            y.backward()
        y = model(x).square().sum()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            y.backward()
            torch.cuda.synchronize()
        kernels = [e.key for e in profiler.key_averages() if e.device_type == DeviceType.CUDA for _ in range(e.count)]
        assert kernels
        return sum("direct_copy_kernel" in kernel for kernel in kernels)

    stock = copies(net)
    actpress.apply(net, methods.Division())
    assert copies(net) <= stock


def test_memory_that_a_device_is_pretended_to_have_is_all_that_it_gives():
    setting = steps.Setting("resnet20", batch=64, image_size=32, num_classes=10, steps=4, memory=2**26)
    try:
        row = steps.measure(setting, "none", ROOT / "configs")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert row["status"] == "oom", row["message"]


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
