"""What every method promises, for every file in configs/method."""

import copy
import io
from pathlib import Path

import hydra
import pytest
import torch
import torchvision
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import actpress
from actpress import measure
from actpress.methods import Division

CONFIGS = sorted((Path(__file__).parents[1] / "configs/method").glob("*.yaml"))
METHODS = {path.stem: hydra.utils.instantiate(OmegaConf.load(path)) for path in CONFIGS}


class Block(nn.Module):
    """One tensor read by two convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(8, 12, 1, 2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.first(x) + self.second(x))


def convnet():
    """Every kind of layer that methods replace, at odd sizes."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Block(),
        nn.BatchNorm2d(12),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.Dropout(0.2),
        nn.Flatten(1, 2),
        nn.Linear(3, 5),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(36 * 5, 10),
    )


def batch(n=3, memory_format=torch.contiguous_format):
    return torch.randn(n, 3, 21, 19).to(memory_format=memory_format), torch.randint(10, (n,))


@pytest.fixture(params=METHODS, ids=str)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def pair(method):
    """(stock network, the same with the method applied)"""
    stock = convnet()
    ours = copy.deepcopy(stock)
    actpress.apply(ours, method)
    return stock, ours


def grads(net, x, y):
    net.zero_grad()
    torch.manual_seed(5)
    F.cross_entropy(net(x), y).backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("n", [1, 3], ids=["batch 1", "batch 3"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_forward_is_bit_identical(pair, n, memory_format, bf16):
    x, _ = batch(n, memory_format)
    outputs = []
    for net in pair:
        net.to(memory_format=memory_format)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            torch.manual_seed(3)
            outputs.append(net(x))
    assert torch.equal(*outputs)
    torch.testing.assert_close(dict(pair[0].named_buffers()), dict(pair[1].named_buffers()), rtol=0, atol=0)


def test_parameters_and_keys_survive(method):
    net = convnet()
    parameters, keys, modules = dict(net.named_parameters()), list(net.state_dict()), list(net.modules())
    values = copy.deepcopy(net.state_dict())
    actpress.apply(net, method)
    assert all(p is parameters[name] for name, p in net.named_parameters()) and len(parameters) == len(
        list(net.parameters())
    )
    assert list(net.state_dict()) == keys
    assert all(new is old for new, old in zip(net.modules(), modules, strict=True))
    assert all(torch.equal(value, values[key]) for key, value in net.state_dict().items())  # pretrained weights survive


def test_weights_load_into_and_from_stock(pair):
    stock, ours = pair
    fresh = convnet()
    fresh.load_state_dict(ours.state_dict())
    ours.load_state_dict(stock.state_dict())


def test_no_grad_and_evaluation_keep_nothing(pair):
    (x, y), ours = batch(), pair[1]
    ours.eval()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert measure.saved_bytes(lambda: F.cross_entropy(ours(x), y)) == 0


def test_never_keeps_more_than_stock(pair):
    x, y = batch()
    stock, ours = (measure.saved_bytes(lambda net=net: F.cross_entropy(net(x), y)) for net in pair)
    assert ours <= stock


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_an_applied_model_can_be_copied(pair, kind):
    ours = pair[1]
    if kind == "deepcopy":
        twin = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    x, y = batch()
    expected, got = grads(ours, x, y), grads(twin, x, y)
    assert all(torch.equal(got[name], g) for name, g in expected.items())  # the noise stream is copied too


def test_gradients_are_finite_and_near_stock(pair):
    x, y = batch()
    exact, ours = grads(pair[0], x, y), grads(pair[1], x, y)
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (exact, ours)]
    assert flat[1].isfinite().all()
    assert (
        F.cosine_similarity(*flat, dim=0) > 0.7
    )  # 2 bits on random maps of a few pixels; the paper's claim is for large ones


def test_works_inside_a_checkpoint(pair):
    x, y = batch()
    ours = pair[1]
    ours[7].p = 0.0
    loss = F.cross_entropy(checkpoint(ours, x, use_reentrant=False), y)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_compiles_in_one_graph(pair):
    x, y = batch()
    ours = pair[1]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    F.cross_entropy(compiled(x), y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


def test_eight_bits_give_nearly_exact_weight_gradients():
    net = torchvision.models.resnet18(num_classes=10)
    result = measure.gradient_fidelity(net, Division(bits=8), (torch.randn(4, 3, 64, 64), torch.randint(10, (4,))))
    worst = min((f.cosine, name) for name, f in result.items())
    assert worst[0] > 0.999, f"{worst[1]}: cosine {worst[0]:.5f}"
