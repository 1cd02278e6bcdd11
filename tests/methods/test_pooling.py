"""The pooling method: what it keeps, where it is exact, what it refuses."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import measure
from actpress.codec import Like
from actpress.methods import Pooling

MIB = 2**20


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=True))


def gradients(net, x):
    leaf = x.clone().requires_grad_()
    net.zero_grad()
    net(leaf).square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters()} | {"x": leaf.grad}


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("size", [8, 15])
def test_input_and_bias_gradients_are_exact_and_weight_gradients_are_those_at_the_decoded_input(size, reduce):
    stock, x = convnet(), torch.randn(2, 3, size, size)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, Pooling(2, reduce=reduce))
    exact, got = gradients(stock, x), gradients(ours, x)
    for name in ("x", "1.weight", "1.bias", "3.bias"):
        torch.testing.assert_close(
            got[name], exact[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    with torch.no_grad():
        hidden = stock[2](stock[1](stock[0](x)))
        upsampled = ours[3].codec.decode(
            ours[3].codec.encode(hidden, ours[3].context), Like(hidden.shape, hidden.dtype, False)
        )
    y = stock(x)
    (expected,) = torch.autograd.grad(
        F.conv2d(upsampled, stock[3].weight, stock[3].bias), stock[3].weight, 2 * y.detach()
    )
    torch.testing.assert_close(got["3.weight"], expected, rtol=1e-4, atol=1e-4)


def test_block_1_is_lossless():
    stock, x = convnet(), torch.randn(2, 3, 9, 9)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, Pooling(1))
    exact, got = gradients(stock, x), gradients(ours, x)
    for name, gradient in exact.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_saved_bytes_follow_the_formula(block, reduce):
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.randn(2, 3, 11, 7)
    actpress.apply(net, Pooling(block, reduce=reduce))
    blocks = -(-11 // block) * -(-7 // block)
    mask = -(-2 * 8 * 77 // 8)
    assert measure.saved_bytes(lambda: net(x).sum()) == 2 * (3 + 8) * blocks * 4 + mask


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "name,k2,k4", [("resnet18", 0.431, 0.495), ("resnet34", 0.408, 0.480), ("resnet50", 0.355, 0.434)]
)
def test_saves_what_masks_and_one_pooled_copy_promise(name, k2, k4):
    def saved(method):
        with measure.fake_model(getattr(torchvision.models, name)) as net:
            actpress.apply(net, method)
            x, y = torch.empty(32, 3, 224, 224), torch.zeros(32, dtype=torch.long)
            return measure.saved_bytes(lambda: F.cross_entropy(net(x), y))

    stock = saved(actpress.methods.Stock())
    assert 1 - saved(Pooling(2)) / stock >= k2 - 0.0005  # the promise is rounded to .1%
    assert 1 - saved(Pooling(4)) / stock >= k4 - 0.0005


def test_stages_choose_the_block_by_name():
    net = convnet()
    actpress.apply(net, Pooling(2, stages={"0": 1, "[0-9]": 4}, reduce="max"))
    assert (net[0].codec.block, net[3].codec.block) == (1, 4)
    assert net[0].codec.reduce == net[3].codec.reduce == "max"


def test_stock_relu_leaves_everything_but_convolutions():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    report = actpress.apply(net, Pooling(2, relu="stock"))
    assert list(report.replaced) == ["0"] and type(net[1]) is nn.ReLU and type(net[2]) is nn.MaxPool2d


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"block": 0}, r"block=0, allowed: integers from 1"),
        ({"align": "floor"}, r"align='floor', allowed: ceil, authors"),
        ({"relu": "bits"}, r"relu='bits', allowed: mask, stock"),
        ({"reduce": "min"}, r"reduce='min', allowed: mean, max"),
        ({"stages": {"layer1.*": 1.5}}, r"stages\['layer1.\*'\]=1.5, allowed: integers from 1"),
    ],
)
def test_bad_arguments_name_the_value_and_the_allowed_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pooling(**arguments)


def test_compose_takes_the_first_rule():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))
    report = actpress.apply(net, actpress.compose(Pooling(2), actpress.methods.Division()))
    assert set(report.replaced) == {"0", "1", "2"}
    assert type(net[0].codec).__name__ == "PoolingCodec" and type(net[2].codec).__name__ == "DivisionCodec"
    with pytest.raises(TypeError, match="got 'pooling'"):
        actpress.compose("pooling")


def test_compose_reports_what_no_method_replaces_and_why():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten())
    net.add_module("head", nn.Linear(4, 2))
    report = actpress.apply(net, actpress.compose(Pooling(2), actpress.methods.BlockPruning()))
    assert report.untouched["1"] == "nn.GELU untouched: no rule"
    assert report.untouched["head"] == "nn.Linear untouched: the method leaves it dense by its name"
