"""Activations: those with bends are exact from one bit an element, the smooth ones keep their derivative in four bits."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import measure
from actpress.methods import Division, FewBit, Frequency, Inverted, Pooling, Quantize

pytestmark = pytest.mark.filterwarnings("ignore:actpress.*saves:UserWarning", "ignore:these activations:UserWarning")

INF, NAN = float("inf"), float("nan")
DTYPES = [pytest.param(getattr(torch, name), id=name) for name in ("float32", "float64", "bfloat16", "float16")]

BENT = {  # name -> (layer, where its slope changes)
    "leaky relu": (nn.LeakyReLU(), [0.0]),
    "leaky relu, slope 0": (nn.LeakyReLU(0.0), [0.0]),
    "leaky relu, slope 2": (nn.LeakyReLU(2.0), [0.0]),
    "relu6": (nn.ReLU6(), [0.0, 6.0]),
    "hardtanh": (nn.Hardtanh(), [-1.0, 1.0]),
    "hardtanh, uneven": (nn.Hardtanh(-2.0, 0.5), [-2.0, 0.5]),
    "hardsigmoid": (nn.Hardsigmoid(), [-3.0, 3.0]),
}
SMOOTH = {  # name -> (layer, least and greatest slope)
    "hardswish": (nn.Hardswish(), (-0.5, 1.5)),
    "sigmoid": (nn.Sigmoid(), (0.0, 0.25)),
    "tanh": (nn.Tanh(), (0.0, 1.0)),
    "elu": (nn.ELU(), (0.0, 1.0)),
    "elu, alpha 2": (nn.ELU(2.0), (0.0, 2.0)),
    "mish": (nn.Mish(), (-0.1126, 1.0885)),
    "softplus": (nn.Softplus(), (0.0, 1.0)),
    "softplus, steep": (nn.Softplus(2.0, 3.0), (0.0, 1.0)),
}
METHODS = {"division": Division(), "quantize": Quantize()}


def pair(layer, method=METHODS["division"], inplace=False):
    """(stock, ours)"""
    stock = nn.Sequential(copy.deepcopy(layer))
    if inplace:
        stock[0].inplace = True
    ours = copy.deepcopy(stock)
    actpress.apply(ours, method)
    return stock, ours


def run(net, x, dy=None):
    """(output, input gradient)"""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(leaf * 1)  # * 1: in-place layers may not touch a leaf
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    y.backward(noise if dy is None else torch.full_like(y, dy))
    return y.detach(), leaf.grad


def near_bends(bends, dtype):
    """Values at the bends, next to them, and at the ends of the dtype; a number of them that is no multiple of 8."""
    points = torch.tensor(bends, dtype=dtype)
    ends = torch.tensor([-INF, -1e4, -7.0, -0.0, 0.0, 0.25, 7.0, 1e4, INF, NAN], dtype=dtype)
    tiny = torch.finfo(dtype).smallest_normal
    beside = (
        [torch.nextafter(points, torch.full_like(points, end)) for end in (-INF, INF)] if dtype.itemsize > 2 else []
    )
    step = points.abs().clamp_min(tiny) * torch.finfo(dtype).eps
    return torch.cat([points, *beside, points - step, points + step, ends])


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BENT)
def test_the_gradient_is_that_of_stock_at_the_bends_and_beyond_all_numbers(name, dtype, inplace):
    layer, bends = BENT[name]
    if inplace and not hasattr(layer, "inplace"):
        pytest.skip("the layer has no such option")
    x = near_bends(bends, dtype)
    for dy in (1.0, -0.3, INF, NAN):
        stock, ours = pair(layer, inplace=inplace)
        (y_stock, expected), (y, got) = run(stock, x, dy), run(ours, x, dy)
        torch.testing.assert_close(y, y_stock, rtol=0, atol=0, equal_nan=True)
        # PyTorch's slope of hardsigmoid is 1 / 6 in fp32, also for fp64
        rtol = 1e-7 if name == "hardsigmoid" and dtype == torch.float64 else 0
        torch.testing.assert_close(got, expected, rtol=rtol, atol=0, equal_nan=True, msg=lambda m, d=dy: f"dy={d}: {m}")


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last", "transposed", "expanded"])
@pytest.mark.parametrize("name", {**BENT, **SMOOTH})
def test_the_layout_of_the_input_changes_nothing(name, memory_format):
    layer, _ = {**BENT, **SMOOTH}[name]
    x = 3 * torch.randn(3, 5, 7, 9)
    if memory_format == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif memory_format == "transposed":
        x = x.transpose(1, 3)
    elif memory_format == "expanded":
        x = x[:1].expand(3, -1, -1, -1)
    stock, ours = pair(layer)
    (y_stock, expected), (y, got) = run(stock, x), run(ours, x)
    assert torch.equal(y, y_stock)
    assert y.stride() == y_stock.stride()
    tolerance = 0 if name in BENT else 0.08  # half a step of hardswish's slope, times dy
    assert ((got - expected).abs() <= tolerance * 4).all()
    if name in BENT:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("method", [Division(), Quantize(), Pooling(), Frequency()], ids=repr)
@pytest.mark.parametrize("name", BENT)
def test_one_bit_an_element_is_kept(name, method):
    _, ours = pair(BENT[name][0], method)
    x = torch.randn(33, 127, requires_grad=True)
    assert measure.saved_bytes(lambda: ours(x * 1).sum()) == -(-x.numel() // 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SMOOTH)
def test_the_derivative_is_kept_to_within_half_a_step_of_four_bits(name, dtype, method):
    layer, (least, greatest) = SMOOTH[name]
    stock, ours = pair(layer, METHODS[method])
    x = (3 * torch.randn(7, 301)).to(dtype)
    (y_stock, expected), (y, got) = run(stock, x, 1.0), run(ours, x, 1.0)
    assert torch.equal(y, y_stock)
    half_step = (greatest - least) / 15 / 2
    rounding = (
        4 * 2**-8 if dtype == torch.bfloat16 else 2**-8
    )  # of the bounds of a group, and in bf16 of the derivative
    assert (got.double() - expected.double()).abs().max() <= half_step + rounding * max(greatest, -least)


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_activations_in_eight_bits(name):
    layer, (least, greatest) = SMOOTH[name]
    stock, ours = pair(layer, Quantize(bits=8))
    x = 3 * torch.randn(7, 301)
    error = (run(ours, x, 1.0)[1] - run(stock, x, 1.0)[1]).abs().max()
    assert error <= (greatest - least) / 255  # bounds are rounded, too


@pytest.mark.parametrize("name", ["hardswish", "elu", "mish"])
def test_smooth_activations_in_place(name):
    stock, ours = pair(SMOOTH[name][0], inplace=True)
    plain, _ = pair(SMOOTH[name][0])
    for shape in ((7, 301), (3,)):  # a code, and a tensor too small for one
        x = 3 * torch.randn(shape)
        (y_stock, _), (y, got), (_, expected) = run(stock, x), run(ours, x), run(plain, x)
        assert torch.equal(y, y_stock)
        assert (got - expected).abs().max() < 0.3
        overwritten = x.clone().requires_grad_() * 1
        ours(overwritten)
        assert torch.equal(overwritten, y)


@pytest.mark.quick(40)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", {**BENT, **SMOOTH})
def test_never_more_bytes_than_stock(name, dtype, method):
    stock, ours = pair({**BENT, **SMOOTH}[name][0], METHODS[method])
    for size in (1, 2, 3, 5, 9, 31, 257, 2000):
        x = torch.randn(size, dtype=dtype, requires_grad=True)
        before, after = (measure.saved_bytes(lambda net=net: net(x * 1).sum()) for net in (stock, ours))  # noqa: B023 - called at once
        assert after <= before, size
    assert after < before / 1.5  # of 2000 elements


@pytest.mark.parametrize("name", {**BENT, **SMOOTH})
def test_an_unused_gradient_keeps_nothing(name):
    _, ours = pair({**BENT, **SMOOTH}[name][0])
    x = torch.randn(5, 33)
    assert measure.saved_bytes(lambda: ours(x).sum()) == 0
    with torch.no_grad():
        assert measure.saved_bytes(lambda: ours(x.clone().requires_grad_()).sum()) == 0


class Calling(nn.Module):
    """A module whose forward calls a function that it holds."""

    def __init__(self, function, arguments=()):
        super().__init__()
        self.function, self.arguments = function, arguments

    def forward(self, x):
        return self.function(x * 1, *self.arguments)


FUNCTIONS = {
    "F.relu": Calling(F.relu),
    "F.relu, in place": Calling(F.relu, (True,)),
    "torch.relu": Calling(torch.relu),
    "torch.relu_": Calling(torch.relu_),
    "F.leaky_relu": Calling(F.leaky_relu, (0.2,)),
    "F.leaky_relu, in place": Calling(F.leaky_relu, (0.2, True)),
    "F.leaky_relu_": Calling(F.leaky_relu_, (0.2,)),
    "F.relu6": Calling(F.relu6),
    "F.hardtanh": Calling(F.hardtanh, (-0.5, 2.0)),
    "F.hardtanh, in place": Calling(F.hardtanh, (-0.5, 2.0, True)),
    "F.hardtanh_": Calling(F.hardtanh_),
    "F.hardsigmoid": Calling(F.hardsigmoid),
    "F.hardsigmoid, in place": Calling(F.hardsigmoid, (True,)),
    "F.hardswish": Calling(F.hardswish),
    "F.hardswish, in place": Calling(F.hardswish, (True,)),
    "F.sigmoid": Calling(F.sigmoid),
    "torch.sigmoid": Calling(torch.sigmoid),
    "Tensor.sigmoid": Calling(torch.Tensor.sigmoid),
    "torch.sigmoid_": Calling(torch.sigmoid_),
    "F.tanh": Calling(F.tanh),
    "torch.tanh": Calling(torch.tanh),
    "torch.tanh_": Calling(torch.tanh_),
    "F.elu": Calling(F.elu, (0.7,)),
    "F.elu, in place": Calling(F.elu, (0.7, True)),
    "F.elu_": Calling(F.elu_),
    "F.mish": Calling(F.mish),
    "F.softplus": Calling(F.softplus, (2.0, 5.0)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functional_forms(name, method):
    stock = copy.deepcopy(FUNCTIONS[name])
    ours = copy.deepcopy(stock)
    report = actpress.apply(ours, METHODS[method])
    assert list(report.replaced) == [f"{stock.function.__name__}()"]
    x = 2 * torch.randn(9, 127)
    (y_stock, expected), (y, got) = run(stock, x), run(ours, x)
    assert torch.equal(y, y_stock)
    exact = any(part in name for part in ("relu", "hardtanh", "hardsigmoid"))
    assert (got - expected).abs().max() <= (0 if exact else 0.3)  # half a step, .07 at most, times dy of 4 at most
    leaf = x.clone().requires_grad_()
    before, after = (measure.saved_bytes(lambda net=net: net(leaf).sum()) for net in (stock, ours))
    assert after < before / 7


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["leaky relu", "hardsigmoid", "mish", "hardswish"])
def test_compiled(name):
    layer, _ = {**BENT, **SMOOTH}[name]
    inplace = hasattr(layer, "inplace")
    stock, ours = pair(layer, inplace=inplace)
    torch._dynamo.reset()
    x = 3 * torch.randn(5, 37)
    (y_stock, expected), (y, got) = run(stock, x), run(torch.compile(ours, backend="aot_eager"), x)
    torch.testing.assert_close(y, y_stock)  # decompositions round otherwise
    assert (got - expected).abs().max() <= (1e-6 if name in BENT else 0.3)


ACTIVATIONS = {  # in place -> the method that replaces it
    "relu": (nn.ReLU(inplace=True), F.relu, Division()),
    "leaky_relu": (nn.LeakyReLU(inplace=True), F.leaky_relu, Division()),
    "relu6": (nn.ReLU6(inplace=True), F.relu6, Division()),
    "hardtanh": (nn.Hardtanh(inplace=True), F.hardtanh, Division()),
    "hardsigmoid": (nn.Hardsigmoid(inplace=True), F.hardsigmoid, Quantize()),
    "hardswish": (nn.Hardswish(inplace=True), F.hardswish, Division()),
    "elu": (nn.ELU(inplace=True), F.elu, Division()),
    "mish": (nn.Mish(inplace=True), F.mish, Quantize()),
    "silu, few-bit": (nn.SiLU(inplace=True), F.silu, FewBit()),
    "silu, inverted": (nn.SiLU(inplace=True), F.silu, Inverted()),
}


class InPlace(nn.Module):
    """One activation, in place, in all situations."""

    def __init__(self, layer, function):
        super().__init__()
        self.scales = nn.Parameter(torch.randn(6))
        self.layer, self.function = copy.deepcopy(layer), function

    def forward(self, x):
        dropped, dropped_function, again, before, view, part = (x * scale for scale in self.scales)
        self.layer(dropped)  # changes its input
        self.function(dropped_function, inplace=True)
        again = self.layer(again) + 2 * again
        before = 2 * before + self.layer(before)
        self.layer(view.flatten(1))
        self.layer(part[:, 1:3])
        return torch.cat([dropped, dropped_function, again, before, view, part])


COMPILED = [
    ("relu", "eager"),
    ("relu", "aot_eager"),
    ("elu", "eager"),
    ("silu, few-bit", "aot_eager"),
]  # one of each kind


@pytest.mark.quick(11, "*-not compiled", "relu-eager")
@pytest.mark.parametrize("name,mode", [*((name, "not compiled") for name in ACTIVATIONS), *COMPILED])
def test_an_activation_in_place_changes_its_input(name, mode):
    layer, function, method = ACTIVATIONS[name]
    stock, x = InPlace(layer, function), torch.randn(2, 3, 5, 7)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, method)
    torch._dynamo.reset()
    results = []
    for net in (stock, ours if mode == "not compiled" else torch.compile(ours, backend=mode)):
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        y.sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[1][0], results[0][0])
    expected, got = (gradient for _, gradient in results)
    assert (got - expected).norm() < 0.2 * expected.norm()  # derivatives in 3 or 4 bits
