"""Triton kernels of Few-Bit activations against their references: codes and gradients equal bit for bit, the fused output nearly."""

import pytest
import torch
from torch.nn import functional as F

from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.few_bit import BITS, cases, op, reference
from actpress.kernels.few_bit import triton as kernels
from actpress.kernels.few_bit.tables import TABLES
from actpress.kernels.inverted.triton import forward_triton as inverted_forward_triton
from devices import BACKENDS, DEVICES, INTERPRETED, assert_close, assert_same, last_program_only, traffic

SIZES = [(0,), (1,), (7,), (8,), (63,), (4097,), (3, 5, 7), (2, 5, 7, 9)]
LARGE = {"GROUPS": 16384} if INTERPRETED else kernels.CONFIGS[0]  # few programs, for the interpreter
CASES = {case.name: case for case in cases.cases()}
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy: overflow in a sigmoid of 0
]


def tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


@pytest.mark.quick(16)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_sizes(device, dtype, bits, shape):
    x, dy = 2 * torch.randn(2, *shape, device=device).to(dtype)
    x.view(-1)[:2000:5] = torch.nan  # code 0; and chunks without any follow
    dy.view(-1)[::3] = torch.inf
    planes = kernels.encode_triton(x, "silu", bits)
    assert_same("planes", planes, reference.encode_reference(x, "silu", bits))
    y, fused = kernels.forward_triton(x, "silu", bits)
    assert_same("planes of the fused kernel", fused, planes)
    # one rounding, and the last bits of sigmoid
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=torch.finfo(dtype).eps, atol=1e-6, equal_nan=True)
    ours = kernels.input_grad_triton(dy, planes, "silu", bits, False)
    assert_same("dx", ours, reference.input_grad_reference(dy, planes, "silu", bits, False))


@pytest.mark.quick(12)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("function", TABLES)
@pytest.mark.parametrize("device", DEVICES)
def test_every_16_bit_input_and_both_neighbours_of_every_border(device, function, bits, dtype):
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = x[x.isfinite() & ((x == 0) | (x.float().abs() >= torch.finfo(dtype).tiny))]  # see inverted's tests
    else:
        borders = torch.tensor(reference.BORDERS[function, bits, dtype]).view(torch.int32)
        x = (borders[:, None] + torch.arange(-9, 10, dtype=torch.int32)).view(dtype)
        x = torch.cat([x[~x.isnan()], -x[~x.isnan()]])  # what lies below 0 is above -0
    x = x.to(device)
    planes = kernels.encode_triton(x, function, bits, LARGE)
    assert_same("planes", planes, reference.encode_reference(x, function, bits))
    ones = torch.ones(x.shape, device=device)
    d = kernels.input_grad_triton(ones, planes, function, bits, False, LARGE)
    assert_same("d", d, reference.input_grad_reference(ones, planes, function, bits, False))
    assert len(d.unique()) == 2**bits  # no level is left out


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
    y, planes = kernels.forward_triton(x, "gelu", 3)
    channels_last = is_channels_last(x)
    assert is_channels_last(y) == channels_last
    assert_same("planes alone", kernels.encode_triton(x, "gelu", 3), planes)
    plain = reference.encode_reference(x.contiguous(), "gelu", 3)
    expected = reference.input_grad_reference(dy.contiguous(), plain, "gelu", 3, False)
    assert_same("dx", kernels.input_grad_triton(dy, planes, "gelu", 3, channels_last), expected)
    assert_same("dx", kernels.input_grad_triton(dy.contiguous(), planes, "gelu", 3, channels_last), expected)


@pytest.mark.parametrize("function", TABLES)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_the_fused_output_is_that_of_inverted(device, dtype, function):
    x = 3 * torch.randn(1000, device=device).to(dtype)
    y, planes = kernels.forward_triton(x, function, 4)
    assert_same("y", y, inverted_forward_triton(x, function)[0])
    assert_same("planes", planes, reference.encode_reference(x, function, 4))


OPS = {
    "encode": (op._encode.op, lambda x: (x, "silu", 2, is_channels_last(x))),
    "forward": (op._forward.op, lambda x: (x, "gelu_tanh", 4, is_channels_last(x))),
    "input_grad": (
        op._input_grad.op,
        lambda x: (torch.ones_like(x), op.encode(x, "gelu", 3), "gelu", 3, is_channels_last(x)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["strided", "channels_last"])
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


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="test_on_a_device_past_two_to_the_31_elements is for a device")
def test_past_two_to_the_31_elements():
    n = 2**31 + 4096
    x = torch.empty(n, dtype=torch.float16)
    x[-4096:] = torch.randn(4096)
    with last_program_only():
        code = kernels.encode_triton(x, "gelu", 3)
    planes, nans = reference.planes_of(code, n, 3)
    assert not nans[-1].any()  # of the last program, which alone has run
    last, _ = reference.planes_of(reference.encode_reference(x[-128:], "gelu", 3), 128, 3)
    assert_same("planes", planes[:, -16:], last)


@pytest.mark.gpu
def test_on_a_device_past_two_to_the_31_elements():
    n = 2**31 + 4096
    x = torch.randn(n, dtype=torch.float16, device="cuda")
    _, code = kernels.forward_triton(x, "gelu", 3)
    planes, _ = reference.planes_of(code, n, 3)
    last, _ = reference.planes_of(reference.encode_reference(x[-128:], "gelu", 3), 128, 3)
    assert_same("planes", planes[:, -16:], last)
    dx = kernels.input_grad_triton(x, code, "gelu", 3, False)
    expected = reference.input_grad_reference(
        x[-128:], reference.encode_reference(x[-128:], "gelu", 3), "gelu", 3, False
    )
    assert_same("dx", dx[-128:], expected)
