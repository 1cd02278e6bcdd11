"""Inverted and Few-Bit activations as methods: exactness, what they keep, which modules they find, what they warn of."""

import copy
import importlib
import shutil

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import measure
from actpress.kernels.few_bit import code_bytes
from actpress.kernels.inverted.reference import derivative_reference, left_reference
from actpress.layers import activation
from actpress.measure import derivatives
from actpress.methods import Division, FewBit, Inverted
from actpress.methods.few_bit import Interval
from actpress.methods.inverted import FromOutput
from derivative_limits import LIMITS

# Of the floor: how far above it the derivative may be where the forward pass rounds once. fp32: of that of a grid.
ABOVE_FLOOR = {"bf16": 1.05, "fp16": 1.01, "fp32": 1.5}

TORCH = {
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "silu in place": nn.SiLU(inplace=True),
}
TIMM = {name: getattr(timm.layers.activations, name)() for name in ("GELU", "GELUTanh", "QuickGELU", "Swish")}
TRANSFORMERS = (
    "GELUActivation",
    "GELUTanh",
    "NewGELUActivation",
    "FastGELUActivation",
    "QuickGELUActivation",
    "SiLUActivation",
)
METHODS = {"inverted": Inverted(), "few_bit": FewBit()}


def applied(module, method):
    """A copy of the module inside a model, with the method applied."""
    net = nn.Sequential(copy.deepcopy(module))
    actpress.apply(net, method)
    return net


def run(net, x):
    """(y, dx) with an upstream that is no constant."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(leaf * 1)  # in-place layers may not touch a leaf
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    return y, leaf.grad


def mlp(*between, width=256, activation=nn.GELU):
    return nn.Sequential(nn.Linear(64, width), activation(), *between, nn.Linear(width, 64))


@pytest.mark.quick(15, "*-bf16", "*-fp16", "silu-fp32")
@pytest.mark.parametrize("variant,dtype", LIMITS, ids=lambda v: v)
def test_error_over_every_input(variant, dtype):
    error = derivatives.derivative_error(FromOutput(), variant, dtype)
    most, rms = LIMITS[variant, dtype]
    assert error.max <= most, f"{variant} {dtype}: max {error.max:.3e} at x = {error.worst_x}"
    assert error.rms <= rms, f"{variant} {dtype}: rms {error.rms:.3e}"
    if variant in ("gelu", "gelu_tanh", "silu") and dtype in ABOVE_FLOOR:
        assert error.max <= ABOVE_FLOOR[dtype] * error.floor_max


@pytest.mark.parametrize("bits,most,rms", [(1, 0.51, 0.22), (2, 0.18, 0.096), (3, 0.13, 0.059), (4, 0.062, 0.029)])
def test_few_bit_error(bits, most, rms):
    error = derivatives.derivative_error(Interval(bits), "gelu", "bf16")
    assert error.max <= most and error.rms <= rms


@pytest.mark.parametrize(
    "arguments,message",
    [(("relu", "fp32"), "variant='relu', allowed: gelu"), (("gelu", "fp8"), "dtype='fp8', allowed: fp64")],
)
def test_error_of_unknown_things(arguments, message):
    with pytest.raises(ValueError, match=message):
        derivatives.derivative_error(FromOutput(), *arguments)


@pytest.mark.quick(60)
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(1),
        torch.randn(3, 5, 7),
        torch.randn(2, 6, 5, 3),
        torch.randn(2, 6, 5, 3).to(memory_format=torch.channels_last),
        torch.randn(2, 6, 5, 3).to(memory_format=torch.channels_last)[:, 1:, ::2],
        torch.randn(9, 4).T,
        torch.randn(0, 4),
    ],
    ids=["1", "odd", "nchw", "nhwc", "nhwc strided", "transposed", "empty"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", [*TORCH.values(), *TIMM.values()], ids=[*TORCH, *(f"timm {name}" for name in TIMM)])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_forward_is_that_of_stock_and_the_gradient_is_near(method, module, dtype, x):
    x = x.to(dtype)
    y_stock, dx_stock = run(nn.Sequential(copy.deepcopy(module)), x)
    y, dx = run(applied(module, method), x)
    assert y.dtype == y_stock.dtype and torch.equal(y, y_stock)
    assert dx.dtype == dx_stock.dtype
    # the derivative's own largest error (tests above) and two roundings of dx, times an upstream of at most 2
    most = 0.13 if isinstance(method, FewBit) else {2: 0.0155, 4: 1.7e-4, 8: 1.7e-6}[dtype.itemsize]
    rounding = {2: 2**-6, 4: 1e-6, 8: 1e-12}[dtype.itemsize]
    assert ((dx - dx_stock).abs() <= 2 * (most + rounding)).all()


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_activations_of_transformers(method, dtype, name):
    library = pytest.importorskip("transformers.activations")
    module = getattr(library, name)()
    x = torch.randn(3, 5, 7).to(dtype)
    net = applied(module, method)
    assert type(net[0]).__module__ == "actpress.layers.activation"
    (y_stock, dx_stock), (y, dx) = run(nn.Sequential(module), x), run(net, x)
    assert torch.equal(y, y_stock)
    # an rms error of .06 in a derivative of rms .65, see test_few_bit_error: about 1 - (.06 / .65)^2 / 2 = .996 on average
    assert F.cosine_similarity(dx.flatten().float(), dx_stock.flatten().float(), dim=0) > 0.985


def test_python_formulas_of_transformers_stay_as_they_are():
    library = pytest.importorskip("transformers.activations")
    assert activation.layer_for(library.GELUActivation(use_gelu_python=True)) is None


def test_only_exact_types_are_replaced():
    class Mine(nn.GELU):
        def forward(self, x):
            return x.relu6()

    net = nn.Sequential(Mine(), nn.Sigmoid(), nn.SiLU())
    assert list(actpress.apply(net, Inverted()).replaced) == ["2"]


def test_every_replaced_type_of_an_installed_library_exists():
    for path in activation.REPLACEMENTS:
        module, _, name = path.rpartition(".")
        if module.startswith("transformers"):
            continue  # optional, and its names differ between versions
        assert hasattr(importlib.import_module(module), name), path


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_functions_called_in_a_forward_are_replaced_too(method):
    class Net(nn.Module):
        def forward(self, x):
            return F.gelu(x, approximate="tanh") + F.silu(x)

    net, x = Net(), torch.randn(4, 32)
    expected = run(net, x)
    report = actpress.apply(net, method)
    assert sorted(report.replaced) == ["gelu()", "silu()"]
    y, dx = run(net, x)
    assert torch.equal(y, expected[0])
    assert not torch.equal(dx, expected[1]) and F.cosine_similarity(dx.flatten(), expected[1].flatten(), dim=0) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "silu"])
def test_gradient_is_that_of_the_kernel(function, dtype):
    layer = nn.SiLU() if function == "silu" else nn.GELU("tanh" if function == "gelu_tanh" else "none")
    x = torch.randn(5, 9).to(dtype).requires_grad_()
    y = applied(layer, Inverted())(x)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    d = derivative_reference(y.detach(), left_reference(x.detach(), function), function)
    assert torch.equal(dx, (d * dy).to(dtype))


def test_gradcheck_in_double_precision():
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    for layer in (nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()):
        assert torch.autograd.gradcheck(applied(layer, Inverted()), x)  # its tolerance, 1e-5, is above the fit's 2e-6


def test_in_place_silu_works_in_place_and_refuses_a_leaf():
    net = applied(nn.SiLU(inplace=True), Inverted())
    x = torch.randn(6, requires_grad=True)
    h = x * 1
    y = net(h)
    assert y.data_ptr() == h.data_ptr() and torch.equal(y, F.silu(x))
    with pytest.raises(RuntimeError, match="leaf Variable"):
        net(x)
    with torch.no_grad():
        assert net(h).data_ptr() == h.data_ptr()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("numel", [1, 7, 64, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_bytes_of_one_activation(method, numel, dtype):
    net, x = applied(nn.GELU(), method), torch.randn(numel, dtype=dtype, requires_grad=True)
    expected = {
        "inverted": numel * dtype.itemsize + -(-numel // 8),
        "few_bit": code_bytes(numel, 3),
    }
    assert measure.saved_bytes(lambda: net(x).sum()) == expected[next(k for k, m in METHODS.items() if m is method)]


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("activation", [nn.GELU, nn.SiLU, timm.layers.activations.QuickGELU])
def test_output_is_shared_with_the_next_layer(activation, bf16):
    """Hidden tensors kept by Linear-activation-Linear: stock 2, inverted 1 + 1 bit per element."""
    x, hidden = torch.randn(32, 64), 32 * 256
    kept = {}
    for name, method in {"stock": None, **METHODS}.items():
        net = mlp(activation=activation)
        if method is not None:
            actpress.apply(net, method)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            total = measure.saved_bytes(lambda net=net: net(x).sum())
        itemsize = 2 if bf16 else 4
        kept[name] = (total - x.numel() * itemsize) / (hidden * itemsize)
    bits = 16 if bf16 else 32
    stock = 2 if activation in (nn.GELU, nn.SiLU) else 3  # QuickGELU's formula keeps x and its sigmoid
    assert kept["inverted"] == 1 + 1 / bits
    assert kept["few_bit"] == 1 + (3 + 8 / 1024) / bits  # a byte for each chunk says whether it holds a NaN
    assert kept["stock"] >= stock


def test_evaluation_and_frozen_inputs_keep_nothing():
    net = applied(nn.GELU(), Inverted())
    x = torch.randn(8)
    assert measure.saved_bytes(lambda: net(x).sum()) == 0
    with torch.no_grad():
        assert measure.saved_bytes(lambda: net(x.requires_grad_()).sum()) == 0


def test_in_place_change_of_the_output_is_caught():
    x = torch.randn(8, requires_grad=True)
    y = applied(nn.GELU(), Inverted())(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_derivative_is_refused():
    x = torch.randn(8, requires_grad=True)
    (dx,) = torch.autograd.grad(applied(nn.GELU(), Inverted())(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


@pytest.mark.parametrize("bits", [0, 5, 8, "3", 2.5])
def test_bits_of_few_bit(bits):
    with pytest.raises(ValueError, match=rf"bits={bits!r}, allowed: 1, 2, 3, 4"):
        FewBit(bits)


@pytest.mark.quick(1)
@pytest.mark.parametrize("precision,saving", [("fp32", 23.8), ("bf16", 23.0)])
def test_vit_saves_what_was_predicted(precision, saving):
    """ViT-B/16 with SDPA attention, weights and activations in one precision: percent of all saved bytes, within .3 points."""
    kept, dtype = [], torch.float32 if precision == "fp32" else torch.bfloat16
    for method in (None, Inverted()):
        with measure.fake_model(lambda: timm.create_model("vit_base_patch16_224").to(dtype)) as net:
            if method is not None:
                actpress.apply(net, method)
            kept.append(measure.saved_bytes(lambda net=net: net(torch.empty(2, 3, 224, 224, dtype=dtype)).sum()))
    assert 100 * (1 - kept[1] / kept[0]) == pytest.approx(saving, abs=0.3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile for the CPU needs g++")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_compiled_code_gives_the_same_gradients(method):
    net = mlp()
    actpress.apply(net, method)
    x = torch.randn(32, 64)
    found = []
    for run_as in (torch.compile(net, fullgraph=True), net):
        net.zero_grad()
        run_as(x).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    # the same sums in another order; where an output is at its minimum, one ulp of y moves d by 1e-4
    assert (found[0] - found[1]).norm() <= 1e-4 * found[1].norm()


def test_composed_with_another_method_on_a_network_with_other_layers():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 5))
    report = actpress.apply(net, actpress.compose(Inverted(), Division()))
    assert set(report.replaced) == {"0", "1", "3"} and set(report.untouched) == {"2"}
