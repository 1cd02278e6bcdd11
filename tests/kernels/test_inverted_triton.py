"""Triton kernels of inverted activations against their references and the exact derivative.

The interpreter computes roots, exponentials and logarithms to the last bit where a device approximates them. Errors are therefore also
measured with each of them off by as much as the PTX manual allows (`worst_case`).
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress.kernels.common import launch
from actpress.kernels.common.launch import triton
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.inverted import DECODERS, FITS, FUNCTIONS, cases, op, reference
from actpress.kernels.inverted import triton as kernels
from actpress.kernels.masks import pack_mask_reference
from actpress.layers import activation
from actpress.layers.formulas import FORMULAS
from actpress.measure import derivatives
from actpress.methods import FewBit, Inverted
from actpress.methods.inverted import FromOutput
from derivative_limits import LIMITS
from devices import BACKENDS, DEVICES, INTERPRETED, assert_close, assert_same, last_program_only, mimic_gpu, traffic

SIZES = [(0,), (1,), (7,), (8,), (63,), (4097,), (3, 5, 7), (2, 5, 7, 9)]
LARGE = {"GROUPS": 16384} if INTERPRETED else kernels.CONFIGS[0]  # few programs, for the interpreter
OFF_BY = {"create_sqrt": 2**-23, "create_rsqrt": 2**-22.9, "create_exp2": 2**-22}  # PTX ISA: largest relative errors
LOG_OFF_BY = 2**-22  # absolute between 1/2 and 2, relative elsewhere
CASES = {case.name: case for case in cases.cases()}
EXACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy: overflow in a sigmoid of 0
]


@pytest.fixture
def worst_case(monkeypatch):
    """Approximate instructions are off by as much as they may be, up or down at random; on a device as they are."""
    if not INTERPRETED:
        return
    builder, draw = triton.runtime.interpreter.interpreter_builder, np.random.default_rng(0)

    def off(stock, error):
        def operation(argument):
            result = stock(argument)
            exact = result.data.astype(np.float64)
            wrong = exact + draw.choice([-1, 1], exact.shape) * error(argument.data, exact)
            result.data = np.where(np.isfinite(exact), wrong, exact).astype(np.float32)
            return result

        return operation

    for name, relative in OFF_BY.items():
        monkeypatch.setattr(builder, name, off(getattr(builder, name), lambda _, y, r=relative: r * np.abs(y)), False)
    log = off(builder.create_log2, lambda x, y: LOG_OFF_BY * np.where((x > 0.5) & (x < 2), 1, np.abs(y)))
    monkeypatch.setattr(builder, "create_log2", log, False)


def tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def every(dtype, device):
    """Every finite number of a 16-bit dtype; without subnormal bf16, which the interpreter reads wrongly."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    if dtype == torch.bfloat16:
        x = x[(x == 0) | (x.float().abs() >= torch.finfo(dtype).tiny)]
    return x.to(device)


def derivative(y, left, function):
    """d(y, left) of the kernel in fp32, by an upstream of ones in fp32: y's dtype and dy's may differ."""
    ones = torch.ones(y.shape, device=y.device)
    packed = pack_mask_reference(left)
    return kernels.input_grad_triton(ones, y, packed, function, False, LARGE)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_sizes(device, dtype, shape):
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    y, packed = kernels.forward_triton(x, "silu")
    assert_same("bits", packed, reference.left_bits_reference(x, "silu"))
    assert_same("bits alone", kernels.left_bits_triton(x, "silu"), packed)
    assert y.shape == x.shape and y.dtype == dtype
    # one rounding, and the last bits of sigmoid
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=torch.finfo(dtype).eps, atol=1e-6)
    dx = kernels.input_grad_triton(dy, y, packed, "silu", False)
    expected = reference.input_grad_from_bits_reference(dy, y, packed, "silu", False)
    assert dx.shape == x.shape and dx.dtype == dtype
    torch.testing.assert_close(dx, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)  # atol: see input_grad_triton


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("config", kernels.CONFIGS, ids=str)
def test_configurations(config, device, dtype, name):
    case = CASES[name]
    inputs = case.tiny(dtype, device)
    ours, expected = tensors(case.kernel(*inputs, config)), tensors(case.reference(*inputs))
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_close(f"{name}, output {i}", a, b, case.tolerance if a.is_floating_point() else 0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.skipif(not INTERPRETED, reason="counted in the interpreter")
def test_bytes_moved_are_those_declared(name):
    case = CASES[name]
    inputs = case.tiny(torch.float32, "cpu")
    with traffic() as moved:
        case.kernel(*inputs)
    assert moved.total == case.moved(*inputs) == case.floor(*inputs)


@pytest.mark.parametrize("strides", ["channels_last", "transposed", "every other", "expanded"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_any_strides(device, dtype, strides):
    def view(x):
        return {
            "channels_last": x.to(memory_format=torch.channels_last),
            "transposed": x.transpose(1, 2),
            "every other": x[:, ::2],
            "expanded": x[:, :1].expand(2, 6, 5, 7),
        }[strides]

    x, dy = (view(torch.randn(2, 6, 5, 7, device=device).to(dtype)) for _ in range(2))
    y, packed = kernels.forward_triton(x, "gelu")
    channels_last = is_channels_last(x)
    assert is_channels_last(y) == channels_last
    assert_same("bits", packed, reference.left_bits_reference(x, "gelu"))
    assert_same("bits alone", kernels.left_bits_triton(x, "gelu"), packed)
    plain = reference.left_bits_reference(x.contiguous(), "gelu")
    expected = kernels.input_grad_triton(dy.contiguous(), y.contiguous(), plain, "gelu", False)
    assert_same("dx", kernels.input_grad_triton(dy, y, packed, "gelu", channels_last), expected)
    assert_same(
        "dx", kernels.input_grad_triton(dy.contiguous(), y.contiguous(), packed, "gelu", channels_last), expected
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_bits_of_every_16_bit_input(device, function, dtype):
    x = every(dtype, device)
    assert_same("bits", kernels.left_bits_triton(x, function, LARGE), reference.left_bits_reference(x, function))


@pytest.mark.quick(7, "*-bf16", "*-fp16")
@pytest.mark.parametrize(("variant", "dtype"), [key for key in LIMITS if key[1] != "fp64"], ids=lambda v: v)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("worst_case")
def test_error_over_every_input(device, variant, dtype):
    """Within what the reference promises, with stock's output."""
    compute, function = FORMULAS[variant].compute, FORMULAS[variant].function
    x = derivatives.inputs(function, dtype)
    y, left = compute(x).to(device), reference.left_reference(x, function).to(device)
    found = derivative(y, left, function)
    from_reference = (found - reference.derivative_reference(y, left, function)).abs().max()
    assert from_reference <= (2e-6 if dtype == "fp32" else 2e-4)  # as input_grad_triton says
    most, rms = measured(x, found.cpu(), function)
    assert most <= LIMITS[variant, dtype][0] and rms <= LIMITS[variant, dtype][1], f"max {most:.3e}, rms {rms:.3e}"


def measured(x, d, function):
    """(max, rms for N(0, 1) inputs) of |d - f'(x)|."""
    error = (d.double() - derivatives.slope(x.double(), function)).abs()
    return error.max().item(), (derivatives.normal_probability(x.double()) * error.square()).sum().sqrt().item()


@pytest.mark.quick(4)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("worst_case")
def test_fused_forward_over_every_input(device, function, dtype):
    x = derivatives.inputs(function, dtype)
    if dtype == "bf16":
        x = x[(x == 0) | (x.float().abs() >= torch.finfo(torch.bfloat16).tiny)]
    x = x.to(device)
    unrounded, packed = torch.empty(x.shape, device=device), reference.left_bits_reference(x, function).fill_(255)
    constants = {"FUNCTION": function, "THRESHOLD": reference.THRESHOLDS[function, x.dtype]}
    launch.run(kernels._forward_kernel, kernels._grid(x, LARGE), x, unrounded, packed, x.numel(), **constants, **LARGE)
    assert_same("bits", packed, reference.left_bits_reference(x, function))
    exact = torch.special.ndtr(x.double()) * x.double() if function == "gelu" else EXACT[function](x.double())
    assert ((unrounded.double() - exact).abs() <= 1e-6 * x.double().abs()).all()  # as forward_triton says
    y = unrounded.to(x.dtype)
    d = derivative(y, reference.left_reference(x, function), function)
    most, rms = measured(x.cpu(), d.cpu(), function)
    limits = (
        (3.2e-4, 3.1e-6) if dtype == "fp32" else LIMITS[function, dtype]
    )  # fp32: last bits of y; 16 bits: not worse for it
    assert most <= limits[0] and rms <= limits[1], f"max {most:.3e}, rms {rms:.3e}"


@pytest.mark.quick(6)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("function", [key for key in FITS if ":" in key])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("worst_case")
def test_other_decoders(device, function, dtype):
    """The reference's derivative, as input_grad_triton says, over every input."""
    stock = function.partition(":")[0]
    x = derivatives.inputs(stock, dtype)
    y, left = reference.STOCK[stock](x).to(device), reference.left_reference(x, stock).to(device)
    found, expected = derivative(y, left, function), reference.derivative_reference(y, left, function)
    assert (found - expected).abs().max() <= (2e-6 if dtype == "fp32" else 2e-4)


@pytest.mark.quick(8)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", FITS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("worst_case")
def test_no_16_bit_output_gives_nan(device, function, dtype):
    """With either bit, also outputs that the function does not have."""
    y = every(dtype, device)
    for left in (True, False):
        assert derivative(y, torch.full(y.shape, left, device=device), function).isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("worst_case")
def test_fp32_outputs_of_every_size(device, function):
    """Near the minimum, near saturation, zeros, tiny and huge: finite, and the reference's where the function has such an output."""
    fit = FITS[function]
    tops = torch.tensor([fit.y_min / fit.scale, fit.y_min / 2 / fit.scale, fit.saturation / fit.scale]).view(
        torch.int32
    )
    around = (tops[:, None] + torch.arange(-3000, 3000, dtype=torch.int32)).view(torch.float32).flatten()
    powers = torch.logspace(-45, 38, 3000, dtype=torch.float64).float()
    y = torch.cat([torch.tensor([0.0, -0.0]), around, powers, -powers]).to(device)
    for left in (True, False):
        side = torch.full(y.shape, left, device=device)
        ours, expected = derivative(y, side, function), reference.derivative_reference(y, side, function)
        assert ours.isfinite().all()
        reached = (y * fit.scale >= fit.y_min) & ((y <= 0) | (not left))
        assert (ours - expected)[reached].abs().max() <= 2e-6  # as input_grad_triton says


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("left", [True, False])
def test_not_a_number_stays_one(left, device, dtype):
    y = torch.full((9,), torch.nan, dtype=dtype, device=device)
    for function in FUNCTIONS:
        assert derivative(y, torch.full(y.shape, left, device=device), function).isnan().all()
        assert kernels.forward_triton(y, function)[0].isnan().all()


OPS = {
    "left_bits": (op._left_bits.op, lambda x: (x, "silu", is_channels_last(x))),
    "forward": (op._forward.op, lambda x: (x, "gelu_tanh", is_channels_last(x))),
    "input_grad": (
        op._input_grad.op,
        lambda x: (torch.ones_like(x), *reference.forward_reference(x, "gelu"), "gelu", is_channels_last(x)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", OPS)
def test_registration(name, channels_last, dtype):
    op, inputs = OPS[name]
    x = torch.randn(2, 3, 5, 4, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x[:, :, ::2]
    torch.library.opcheck(op, inputs(x))


@pytest.mark.parametrize("name", OPS)
def test_operations_compile(name):
    op, inputs = OPS[name]
    arguments = inputs(torch.randn(3, 7))
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(tensors(compiled(*arguments)), tensors(op(*arguments)), strict=True):
        assert_same(name, ours, expected)


METHODS = {"inverted": Inverted, "few_bit": FewBit}


@pytest.mark.parametrize("as_gpu", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("layer", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_fused_and_stock_forward_agree(monkeypatch, method, layer, as_gpu):
    """Here the fused operation runs the reference, so that all is equal bit for bit."""
    x = torch.randn(2, 6, 5, 3).to(memory_format=torch.channels_last)
    found = []
    for forward in ("stock", "fused"):
        net = nn.Sequential(copy.deepcopy(layer))
        actpress.apply(net, METHODS[method](forward=forward))
        if as_gpu:
            mimic_gpu(monkeypatch)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = net(leaf * 1)
        (y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum().backward()
        found.append((y, leaf.grad))
    for name, stock, fused in zip(("y", "dx"), *found, strict=True):
        assert torch.equal(stock, fused), name
    assert torch.equal(found[1][0], layer(x.clone(memory_format=torch.preserve_format)))


def test_only_the_plain_formula_is_fused(monkeypatch):
    """Formulas of other libraries differ in the order of operations, in-place layers in where y goes."""
    asked = []
    monkeypatch.setattr(FromOutput, "forward_activation", lambda self, x, function: asked.append(function))
    for variant in derivatives.VARIANTS:
        activation.activate(torch.randn(3, requires_grad=True), variant, FromOutput(fused=True))
    activation.activate(torch.randn(3, requires_grad=True) * 1, "silu", FromOutput(fused=True), inplace=True)
    assert asked == ["gelu", "gelu_tanh", "quick_gelu", "silu"]


@pytest.mark.parametrize("method", METHODS.values())
def test_forwards_to_choose_from(method):
    with pytest.raises(ValueError, match=r"forward='quick', allowed: stock, fused"):
        method(forward="quick")


def test_decoders_to_choose_from():
    with pytest.raises(ValueError, match=r"decoder='cheap', allowed: fine, medium, coarse"):
        Inverted(decoder="cheap")
    x, found = torch.randn(1000, dtype=torch.float32), []
    for decoder in DECODERS:
        leaf = x.clone().requires_grad_()
        activation.activate(leaf * 1, "gelu", Inverted(decoder=decoder).codec).sum().backward()
        found.append((leaf.grad.double() - derivatives.slope(x.double(), "gelu")).square().mean().item())
    assert found[0] < found[1] < found[2]


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="test_on_a_device_past_two_to_the_31_elements is for a device")
def test_past_two_to_the_31_elements():
    n = 2**31 + 4096
    x = torch.empty(n, dtype=torch.float16)
    x[-4096:] = torch.randn(4096)
    with last_program_only():
        packed = kernels.left_bits_triton(x, "gelu")
    assert_same("bits", packed[-16:], reference.left_bits_reference(x[-128:], "gelu"))


@pytest.mark.gpu
def test_on_a_device_past_two_to_the_31_elements():
    n = 2**31 + 4096
    x = torch.randn(n, dtype=torch.float16, device="cuda")
    y, packed = kernels.forward_triton(x, "gelu")
    assert_same("bits", packed[-16:], reference.left_bits_reference(x[-128:], "gelu"))
    dx = kernels.input_grad_triton(x, y, packed, "gelu", False)
    expected = reference.input_grad_from_bits_reference(x[-128:], y[-128:], packed[-16:], "gelu", False)
    assert_close("dx", dx[-128:], expected, 1e-3)
