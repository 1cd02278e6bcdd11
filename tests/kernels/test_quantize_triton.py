"""Triton kernels of group quantisation against the reference."""

import pytest
import torch

from actpress.codec import Context
from actpress.kernels import quantize
from actpress.kernels.common import launch
from actpress.kernels.common.launch import triton
from actpress.kernels.common.layout import dense, is_channels_last
from actpress.kernels.common.noise import noise_bits, uniform_reference
from actpress.kernels.quantize import Format, decode_reference, encode_reference, op
from actpress.kernels.quantize.cases import cases, decode_moved, encode_moved
from actpress.kernels.quantize.triton import CONFIGS, decode_triton, encode_triton
from devices import BACKENDS, DEVICES, assert_same, last_program_only, mimic_gpu, traffic

SEED = 2**40 + 77
# shape, channels_last, grouping, size: one line for each way through the launchers, and what is ugly about it
PATHS = {
    "whole groups": ((3, 5, 16, 16), False, "group", 256),
    "a short last group": ((2, 7, 8), False, "group", 24),
    "one short group a sample": ((5, 7, 9), False, "group", 256),
    "rows begin within eights": ((3, 1001), False, "group", 256),
    "odd size": ((2, 3, 7, 7), False, "group", 5),
    "rows of half eights": ((5, 3, 12, 197), False, "group", 256),
    "map": ((2, 5, 8, 8), False, "channel", 256),
    "map of odd size": ((3, 11, 7, 7), False, "channel", 256),
    "map of half eights": ((2, 5, 14, 14), False, "channel", 256),
    "map of more than a tile": ((1, 2, 72, 72), False, "channel", 256),
    "odd map of more than a program": ((1, 2, 71, 71), False, "channel", 256),
    "map in parts": ((1, 1, 131, 131), False, "channel", 256),
    "map of one": ((3, 7, 1, 1), False, "channel", 256),
    "map in three dimensions": ((2, 3, 3, 5, 4), False, "channel", 256),
    "channels_last": ((2, 24, 9, 7), True, "channel", 256),
    "many channels": ((1, 264, 5, 5), True, "channel", 256),
    "odd channels": ((3, 13, 6, 5), True, "channel", 256),
    "channels_last groups": ((2, 5, 8, 8), True, "group", 256),
    "tokens": ((2, 197, 24), False, "channel", 256),
    "one token": ((3, 1, 16), False, "channel", 256),
    "sample": ((3, 1001), False, "sample", 256),
    "sample in parts": ((1, 17, 1000), False, "sample", 256),
    "one element": ((1,), False, "group", 256),
    "scalar": ((), False, "sample", 256),
    "empty": ((0, 3), False, "group", 256),
    "no pixels": ((2, 3, 0, 4), False, "channel", 256),
}
EVERY_KERNEL = ["whole groups", "map of odd size", "sample in parts", "channels_last", "odd channels", "tokens"]
CASES = {case.name: case for case in cases()}
NAN_SPREADS = triton.__version__.startswith("3.6.")
# Triton's interpreter computes with numpy, which warns where a group holds what is not finite, or a lane no group.
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]


def tensor(path, device, dtype):
    shape, channels_last, *_ = PATHS[path]
    x = torch.randn(shape, device=device).to(dtype)
    return x.to(memory_format=torch.channels_last) if channels_last else x


def check(x, grouping, size, bits, config=CONFIGS[0], stochastic=True):
    """Every byte of the code, and what is decoded from it."""
    format = Format(grouping, size, bits)
    like, channels_last = dense(x), is_channels_last(dense(x))
    seed = torch.tensor([SEED], device=x.device) if stochastic else None
    noise = torch.empty_like(like, dtype=torch.float32)
    (noise.permute(0, 2, 3, 1) if channels_last else noise).reshape(-1).copy_(
        uniform_reference(SEED, x.numel(), noise_bits(bits))
    )
    expected = encode_reference(like, noise if stochastic else None, format)
    code = encode_triton(x, seed, format, config)
    for name, ours, reference in zip(code._fields, code, expected, strict=True):
        assert ours.dtype == reference.dtype, name
        assert_same(name, ours.view(torch.uint8), reference.view(torch.uint8))
    how = (x.shape, x.dtype, channels_last, format)
    decoded = decode_triton(code, *how, config)
    assert decoded.stride() == torch.empty_like(like).stride()
    assert_same("x~", decoded, decode_reference(expected, *how))


@pytest.mark.quick(20)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_code_and_decoded(path, bits, device, dtype):
    check(tensor(path, device, dtype), *PATHS[path][2:], bits)


@pytest.mark.quick(6)
@pytest.mark.parametrize("path", EVERY_KERNEL)
@pytest.mark.parametrize("config", CONFIGS[1:], ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_every_configuration(path, config, device, dtype):
    check(tensor(path, device, dtype), *PATHS[path][2:], 2, config)


@pytest.mark.parametrize("path", EVERY_KERNEL)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_to_the_nearest(path, device, dtype):
    check(tensor(path, device, dtype), *PATHS[path][2:], 2, stochastic=False)


@pytest.mark.quick(14)
@pytest.mark.parametrize("path", EVERY_KERNEL)
@pytest.mark.parametrize(
    "kind",
    [
        "nan",
        "inf",
        "-inf",
        "constant",
        "zeros of both signs",
        "subnormal",
        "near overflow",
        "the end",
        "all magnitudes",
    ],
)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_ugly_values(path, kind, device, dtype):
    """The end: as many signs as one, so that the range of a group fits in fp32."""
    if device == "cpu" and NAN_SPREADS and kind not in ("constant", "zeros of both signs", "subnormal"):
        pytest.skip("in this version's interpreter, not on a GPU, the minimum of NaN and a number is NaN")
    x = tensor(path, device, dtype).float()
    if kind in ("nan", "inf", "-inf"):
        x = x.contiguous()
        x.view(-1)[3] = float(kind)  # one of its group
    else:
        magnitudes = torch.logspace(-44, 38, x.numel(), device=device).view(x.shape)
        scale = {"subnormal": 1e-41, "near overflow": 6e37, "all magnitudes": magnitudes}
        if kind == "the end":
            x = (x.tanh().abs() + 1).clamp(max=2) / 2
            scale["the end"] = torch.finfo(dtype).max * (-1 if path == "map of odd size" else 1)
        zeros = torch.where(x < 0, -0.0, 0.0)
        x = x * scale[kind] if kind in scale else zeros if kind.startswith("zeros") else torch.full_like(x, 3.1415926)
    x = x.to(memory_format=torch.channels_last) if PATHS[path][1] else x
    check(x.to(dtype), *PATHS[path][2:], 2)


@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded", "channels_last slice", "odd offset"])
@pytest.mark.parametrize("grouping", ["group", "channel"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_any_strides(strides, grouping, device, dtype):
    x = torch.randn(2, 8, 5, 8, device=device).to(dtype)
    x = {
        "transposed": x.transpose(1, 2),
        "every other": x[:, ::2],
        "expanded": x[:, :1].expand(2, 6, 5, 8),
        "channels_last slice": x.to(memory_format=torch.channels_last)[:, :, 1:],
        "odd offset": x.view(-1)[1:-7].view(1, 8, 1, 79),
    }[strides]
    check(x, grouping, 256, 2)


@pytest.mark.parametrize("name", CASES)
def test_cases_move_no_more_than_allowed(name):
    case = CASES[name]
    for dtype in case.dtypes:
        inputs = case.make(dtype, "meta")
        moved, floor = case.moved(*inputs), case.floor(*inputs)
        # Samples do not fit in a program, nor do channels of a map of 56 x 56 in channels_last order: x is read twice.
        twice = (
            launch.nbytes(inputs[0])
            if name.startswith(("quantize_encode_samples", "quantize_encode_channels_last_56"))
            else 0
        )
        assert moved <= 1.1 * floor + twice, f"{dtype}: {moved / floor:.3f} of the floor"


@pytest.mark.parametrize(
    "path",
    [
        "whole groups",
        "a short last group",
        "map of half eights",
        "map of more than a tile",
        "channels_last",
        "many channels",
        "channels_last of two reads",
        "tokens",
        "sample in parts",
    ],
)
def test_moves_what_it_declares(path, dtype=torch.float32):
    shape, channels_last, *how = {**PATHS, "channels_last of two reads": ((1, 16, 40, 40), True, "channel", 256)}[path]
    x, format = torch.randn(shape).to(dtype), Format(*how, 2)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    with traffic() as moved:
        code = encode_triton(x, None, format)
    assert moved.total == encode_moved(x, None, format)
    with traffic() as moved:
        decode_triton(code, x.shape, dtype, channels_last, format)
    assert moved.total == decode_moved(code, x.shape, dtype, channels_last, format)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_tiny_cases(name, device, dtype):
    case = CASES[name]
    inputs = case.tiny(dtype, device)
    ours, expected = case.kernel(*inputs), case.reference(*inputs)
    for a, b in zip(ours, expected, strict=True):
        assert_same(name, a, b)


def samples(x, seed, bits=2):
    code = encode_reference(x, None, Format("channel", 256, bits))
    how, channels_last = ("channel", 256, bits), is_channels_last(x)
    return (x, seed, *how, channels_last), (*code, list(x.shape), x.dtype, channels_last, *how)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("seed", [torch.tensor([5]), None], ids=["stochastic", "nearest"])
def test_operations_are_registered_well(channels_last, seed):
    x = torch.randn(2, 3, 5, 5)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    encode_inputs, decode_inputs = samples(x, seed)
    torch.library.opcheck(op._encode.op, encode_inputs)
    torch.library.opcheck(op._decode.op, decode_inputs)


def test_operations_compile_to_one_graph():
    x = torch.randn(2, 3, 5, 5)

    @torch.compile(fullgraph=True)
    def there_and_back(x, seed):
        code = op._encode.op(x, seed, "channel", 256, 2, False)
        return op._decode.op(*code, x.shape, x.dtype, False, "channel", 256, 2)

    seed = torch.tensor([5])
    code = op._encode.op(x, seed, "channel", 256, 2, False)
    assert_same("x~", there_and_back(x, seed), op._decode.op(*code, x.shape, x.dtype, False, "channel", 256, 2))


@pytest.mark.parametrize("source", [Context(3), None], ids=["stochastic", "nearest"])
def test_gpu_tensors_take_the_operations(monkeypatch, source):
    mimic_gpu(monkeypatch)
    x = torch.randn(2, 3, 9, 9)
    code = quantize.encode(x, source, Format("channel", bits=4))
    seed = None if source is None else Context(3).seed_for(x)
    for name, ours, expected in zip(code._fields, code, op._encode.op(x, seed, "channel", 256, 4, False), strict=True):
        assert_same(name, ours, expected)
    decoded = quantize.decode(code, x.shape, x.dtype, False, Format("channel", bits=4))
    assert ((decoded - x).abs() <= 1.001 * code.step.float().view(2, 3, 1, 1)).all()  # fp32 rounding of the sum


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_public_functions_on_a_gpu(dtype):
    x = torch.randn(2, 16, 14, 14, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    code = quantize.encode(x, Context(3), Format("channel", bits=8))
    decoded = quantize.decode(code, x.shape, dtype, True, Format("channel", bits=8))
    # a step of the code, and the rounding of x~ to bf16
    assert ((decoded - x).abs() <= code.step.view(2, 16, 1, 1).to(dtype) + 2**-8 * x.abs()).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "grouping"), [((1, 2**31 + 4096), "group"), ((2**21 + 3, 16, 64), "channel")], ids=["group", "channel"]
)
@pytest.mark.parametrize("device", DEVICES[:1])
def test_past_two_to_the_31_elements(shape, grouping, device):
    x = torch.empty(shape, dtype=torch.float16)
    last = x.view(-1)[-1024:].normal_().view(1, *shape[1:] if grouping == "channel" else (-1,))
    format = Format(grouping, 256, 2)
    expected = encode_reference(last, None, format)
    with last_program_only():
        code = encode_triton(x, None, format)
        for name, ours, reference in zip(code._fields, code, expected, strict=True):
            assert_same(name, ours[-reference.numel() :], reference)
        decoded = decode_triton(code, x.shape, x.dtype, False, format)
    reference = decode_reference(expected, last.shape, x.dtype, False, format)
    assert_same("x~", decoded.view(-1)[-1024:], reference.view(-1))
