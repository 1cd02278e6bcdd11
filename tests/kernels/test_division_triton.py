"""Triton kernels of DIVISION against their references."""

import json
import subprocess
import sys

import pytest
import torch

from actpress.kernels import division
from actpress.kernels.common import noise
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.division import Format
from actpress.kernels.division import cases as division_cases
from actpress.kernels.division.plan import DECODE_CONFIGS, ENCODE_CONFIGS, strategy_of
from actpress.kernels.division.triton import decode_triton, encode_triton
from actpress.kernels.masks import pack_mask_reference
from devices import BACKENDS, DEVICES, INTERPRETED, assert_same, last_program_only, traffic
from paths import ROOT

pytestmark = pytest.mark.usefixtures("poisoned")

SEED = 2**40 + 17
SHAPES = {  # shape, block
    "7x7": ((3, 5, 7, 7), 8),
    "one map": ((1, 1, 5, 3), 8),
    "14x14": ((2, 3, 14, 14), 8),
    "28x28": ((1, 3, 28, 28), 8),
    "9x13": ((2, 3, 9, 13), 4),
    "blocks of 3": ((1, 2, 11, 10), 3),
    "56x56": ((1, 2, 56, 56), 8),
    "1x1 blocks": ((1, 2, 4, 6), 1),
    "channels 16": ((2, 16, 6, 5), 4),
    "channels 24": ((1, 24, 14, 14), 8),
}


every_shape_and_bits = pytest.mark.parametrize(
    ("name", "bits"), [*((name, 2) for name in SHAPES), *((n, b) for n in ("9x13", "channels 24") for b in (1, 4, 8))]
)


def exact_sums(shape, dtype, device):
    """Multiples of 2^-8, small enough that any order of summing gives the same."""
    return (torch.randint(-512, 512, shape, device=device) / 256).to(dtype)


def kernel_of(shape, block):
    return min(block, shape[2]), min(block, shape[3])


def noise_for(x, bits):
    """What the kernel draws, as the reference takes it: fp32 of x's shape."""
    flat = noise.uniform_reference(SEED, x.numel(), noise.noise_bits(bits)).to(x.device)
    if is_channels_last(x):
        n, c, h, w = x.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(x.shape)


def both(x, kernel, bits, align, lfc, config=ENCODE_CONFIGS[0]):
    seed, format = torch.tensor([SEED], device=x.device), Format(kernel, bits, align, lfc)
    return encode_triton(x, seed, format, config), division.encode_reference(x, noise_for(x, bits), format)


def assert_same_code(ours, reference):
    for name in division.Code._fields:
        assert_same(name, getattr(ours, name), getattr(reference, name))


@pytest.mark.quick(7)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@every_shape_and_bits
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_encode_byte_for_byte(name, bits, channels_last, device, dtype):
    shape, block = SHAPES[name]
    x = exact_sums(shape, dtype, device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert_same_code(*both(x, kernel_of(shape, block), bits, "ceil", "always"))


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", ["7x7", "28x28", "9x13", "channels 16"])
@pytest.mark.parametrize("lfc", division.LFC)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_encode_in_the_official_layout(name, lfc, channels_last, device, dtype):
    shape, block = SHAPES[name]
    x = both_kinds(shape, block, dtype, device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert_same_code(*both(x, kernel_of(shape, block), 2, "authors", lfc))


def both_kinds(shape, block, dtype, device):
    """Maps after a ReLU beside smooth ones: the errors with and without means differ clearly, so that their order of summing does not
    matter. A single map is smooth above and like after a ReLU, by far the larger part, below."""
    x = exact_sums(shape, dtype, device)
    x[:, ::2] = x[:, ::2].relu()
    ramp = torch.arange(shape[2], device=device)[:, None] // block * 4.0
    x[:, 1::2] = (x[:, 1::2] / 16 + ramp).to(dtype)
    return x


@pytest.mark.quick(3)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["14x14", "28x28", "56x56", "channels 24"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_auto_leaves_means_out_of_the_same_maps(name, channels_last, device, dtype):
    shape, block = SHAPES[name]
    x = both_kinds(shape, block, dtype, device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    ours, reference = both(x, kernel_of(shape, block), 2, "ceil", "auto")
    left_out = (reference.lfc == 0).all((2, 3))
    assert left_out.any() and not left_out.all()
    assert_same_code(ours, reference)


STRATEGIES = {  # shape, channels_last, block: several tiles a map; parts; means taken first, one part and several
    "tiles": ((1, 1, 128, 130), False, (8, 8)),
    "tiles of channels": ((1, 16, 40, 40), True, (8, 8)),
    "parts": ((1, 1, 184, 192), False, (8, 8)),
    "parts that end within an eight": ((1, 1, 145, 233), False, (8, 8)),
    "parts of channels": ((1, 3, 96, 88), True, (8, 8)),
    "parts of tokens": ((2, 1, 80, 512), False, (8, 1)),
    "parts of tokens, odd": ((1, 1, 67, 523), False, (8, 1)),
    "tall blocks": ((1, 3, 40, 24), False, (20, 8)),
    "tall blocks of channels in parts": ((1, 8, 40, 24), True, (20, 8)),
    "tall blocks in parts": ((1, 2, 90, 96), False, (32, 32)),
}


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("name", "lfc"),
    [*((name, "auto") for name in STRATEGIES), *((name, "always") for name in ("tiles", "parts", "tall blocks"))],
)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_maps_that_take_several_steps(name, lfc, device, dtype):
    shape, channels_last, kernel = STRATEGIES[name]
    x = both_kinds(shape, 8, dtype, device)
    x[-1, 0, : shape[2] // 4] = 3
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    plan, _, _, _, parts = strategy_of(shape, channels_last, x.itemsize, Format(kernel, 2, "ceil", lfc), 4096, 2)
    assert plan.tiles > 1 or "tall" in name
    assert (parts > 1) == ("parts" in name) and plan.known == ("tall" in name)
    assert_same_code(*both(x, kernel, 2, "ceil", lfc))


@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_any_strides(strides, device, dtype):
    x = exact_sums((2, 6, 9, 10), dtype, device)
    x = {"transposed": x.transpose(2, 3), "every other": x[:, ::2], "expanded": x[:, :1].expand(2, 6, 9, 10)}[strides]
    assert_same_code(*both(x, (8, 8), 2, "ceil", "always"))


@pytest.mark.quick(4)
@pytest.mark.parametrize("align", division.ALIGN)
@pytest.mark.parametrize("lfc", division.LFC)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_map(align, lfc, channels_last, device, dtype):
    x = both_kinds((1, 16, 12, 20), 8, dtype, device)
    whole, last = (0, slice(8), slice(8)), (0, 11, 19)
    for c, (value, where) in enumerate([(torch.nan, whole), (torch.inf, whole), (-torch.inf, last), (torch.nan, last)]):
        x[where[0], 3 * c, *where[1:]] = value
    x[0, 12, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    ours, reference = both(x, (8, 8), 2, align, lfc)
    assert_same("codes", ours.codes, reference.codes)
    how = (x.shape, dtype, channels_last, Format((8, 8), 2, align))
    decoded = decode_triton(ours, *how)
    assert_same("x~", decoded, division.decode_reference(reference, *how))
    assert decoded.isnan().flatten(2).all(2).sum() == decoded.isnan().flatten(2).any(2).sum() == 5


@pytest.mark.quick(4)
@pytest.mark.parametrize("lfc", division.LFC)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_the_end_of_a_dtype(bits, channels_last, lfc, device, dtype):
    """Maps up to its largest number, of either sign and of both, of which fp32 cannot sum some blocks: what is decoded, and what is NaN."""
    top = torch.finfo(dtype).max
    x = (torch.rand(1, 16, 12, 20, device=device) * top / (64 if dtype == torch.float32 else 1)).to(dtype)
    x[:, 3::4] *= -1
    x[:, 2, :6] *= -0.4
    x[:, 0, 0, 0], x[:, 3, 0, 0], x[:, 4] = top, -top, top
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    ours, reference = both(x, (8, 8), bits, "ceil", lfc)
    how = (x.shape, dtype, channels_last, Format((8, 8), bits))
    for code in (ours, reference):  # means of any values may round differently, so each code is decoded both ways
        assert_same("x~", decode_triton(code, *how), division.decode_reference(code, *how))
    decoded = decode_triton(ours, *how)
    finite = dtype == torch.float16 or lfc == "auto"
    assert decoded.isfinite().all() or not finite
    assert_same("what is NaN", decoded.isnan(), division.decode_reference(reference, *how).isnan())


@pytest.mark.parametrize("device", DEVICES)
def test_noise_comes_from_the_seed(device):
    x = torch.rand(1, 2, 16, 16, device=device)
    codes = [
        encode_triton(x, torch.tensor([seed], device=device), Format((8, 8), 2)).codes
        for seed in (SEED, SEED, SEED + 1, SEED + 2**40)
    ]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2]) and not torch.equal(codes[0], codes[3])


@pytest.mark.quick(3)
@pytest.mark.parametrize("config", ENCODE_CONFIGS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_every_configuration(config, device, dtype):
    for name in ("28x28", "9x13"):
        shape, block = SHAPES[name]
        assert_same_code(*both(exact_sums(shape, dtype, device), kernel_of(shape, block), 2, "ceil", "always", config))


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_tokens(device, dtype):
    x = exact_sums((2, 1, 37, 48), dtype, device)
    assert_same_code(*both(x, (8, 1), 2, "ceil", "always"))


@pytest.mark.quick(1)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_means_of_any_values_differ_by_one_step_at_most(device, dtype):
    x = torch.randn(2, 8, 28, 28, device=device).to(dtype)
    ours, reference = both(x, (8, 8), 2, "ceil", "always")
    steps = (ours.lfc.view(torch.int16).int() - reference.lfc.view(torch.int16).int()).abs()
    assert steps.max() <= 1, "lfc: more than one bf16 from the reference"
    same = (steps == 0).all(3).all(2).flatten()
    assert same.float().mean() > 0.5
    decoded = [division.decode_reference(c, x.shape, dtype, False, Format((8, 8), 2)) for c in (ours, reference)]
    a, b = (d.view(16, -1)[same] for d in decoded)
    assert_same("codes of maps with equal means", a, b)


@pytest.mark.quick(7)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@every_shape_and_bits
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_decode(name, bits, channels_last, device, dtype):
    shape, block = SHAPES[name]
    x = torch.randn(shape, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    how = (x.shape, dtype, is_channels_last(x), Format(kernel_of(shape, block), bits))
    code = division.encode_reference(x, torch.rand_like(x, dtype=torch.float32), how[3])
    for mask in (None, pack_mask_reference(x > 0)):
        reference = division.decode_reference(code, *how, mask)
        for config in DECODE_CONFIGS if bits == 2 else DECODE_CONFIGS[:1]:
            ours = decode_triton(code, *how, mask, config)
            assert_same("x~", ours, reference)
            assert is_channels_last(ours) == is_channels_last(reference)


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device):
    x = torch.empty(0, 3, 8, 8, device=device)
    format = Format((8, 8), 2, "ceil", "auto")
    code = encode_triton(x, torch.tensor([1], device=device), format)
    assert code.codes.numel() == 0
    assert decode_triton(code, x.shape, x.dtype, False, format).shape == x.shape


@pytest.mark.quick(6)
@pytest.mark.skipif(not INTERPRETED, reason="counted in the interpreter")
@pytest.mark.parametrize("case", division_cases.cases(), ids=lambda case: case.name)
def test_declared_bytes_are_those_counted(case, monkeypatch):
    """With nothing left in a cache from one kernel to the next. Not declared, and little beside maps of any size: zeros over means, which
    depend on x, and the second time that means and steps are read, by another program."""
    monkeypatch.setattr(division_cases, "L2", 0)
    inputs = case.tiny(torch.float32, "cpu")
    with traffic() as counted:
        case.kernel(*inputs)
    exact = any(word in case.name for word in ("56_always", "encode_28", "encode_14", "encode_7"))
    assert case.moved(*inputs) <= counted.total <= (1 if exact else 1.06) * case.moved(*inputs)


@pytest.mark.slow
def test_past_two_to_the_31_elements():
    """The last map, in fp16, by itself; of its codes, whose noise is not that of the first elements, the error of decoding."""
    n = -(-(2**31) // 3136) + 3
    x = torch.empty(1, n, 56, 56, dtype=torch.float16)
    x[:, -1] = exact_sums((56, 56), torch.float16, "cpu")
    format = Format((8, 8), 2)
    with last_program_only():
        code = encode_triton(x, torch.tensor([SEED]), format)
        decoded = decode_triton(code, x.shape, torch.float16, False, format)
    last = x[:, -1:]
    reference = division.encode_reference(last, torch.rand_like(last, dtype=torch.float32), format)
    for name in ("lfc", "low", "step"):
        assert_same(name, getattr(code, name)[:, -1:], getattr(reference, name))
    codes = code.codes[-3136 * 2 // 8 :]
    own = division.decode_reference(reference._replace(codes=codes), last.shape, torch.float16, False, format)
    assert ((own - last).abs() <= reference.step.half() + 2**-8).all(), "x~: more than a step from x"
    assert_same("x~", decoded[:, -1].flatten()[-8:], own.flatten()[-8:])


def test_operations_pass_opcheck():
    x = torch.randn(2, 4, 14, 14)
    arguments = (x, torch.tensor([3]), [8, 8], 2, "ceil", "auto", False)
    torch.library.opcheck(torch.ops.actpress.division_encode, arguments)
    nhwc = x.to(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.actpress.division_encode, (nhwc, *arguments[1:-1], True))
    code = division.encode_reference(x, torch.rand_like(x), Format((8, 8), 2))
    for mask in (None, pack_mask_reference(x > 0)):
        arguments = (*code, x.shape, torch.float32, False, [8, 8], 2, "ceil", mask)
        torch.library.opcheck(torch.ops.actpress.division_decode, arguments)


def test_compiled_operation_is_the_eager_one():
    x = torch.randn(2, 4, 14, 14)
    seed = torch.tensor([3])

    def encode(x, seed):
        return torch.ops.actpress.division_encode(x, seed, [8, 8], 2, "ceil", "auto", False)

    compiled = torch.compile(encode, fullgraph=True)(x, seed)
    for name, ours, reference in zip(division.Code._fields, compiled, encode(x, seed), strict=True):
        assert_same(name, ours, reference)


ACCESSES = r"""
import json, re, sys
sys.path.insert(0, sys.argv[1])
import compile_kernels as aot  # turns the interpreter off, so that this takes a process of its own
found = {}
for operation in ("encode", "decode"):
    for dtype in (aot.torch.bfloat16, aot.torch.float32):
        wanted = aot.Job(f"division_{operation}_channels_last", dtype, 0, 0, 90).wanted()
        target = aot.GPUTarget("cuda", 90, 32)
        ptx = aot.triton.compile(aot.source(wanted), target=target, options=dict(wanted.options)).asm["ptx"]
        for access in ("ld", "st"):
            widths = re.findall(access + r"\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
            found[f"{operation} {dtype} {access}"] = [int(vector or 1) * int(bits) // 8 for vector, bits in widths]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_channels_last_kernels_access_memory_in_16_bytes():
    """What compilers make of them for sm_90, in bytes of each load and store of a thread."""
    scripts = ROOT / "scripts" / "dev"
    done = subprocess.run([sys.executable, "-c", ACCESSES, scripts], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    for dtype, parameters, codes in (("torch.bfloat16", 16, 2), ("torch.float32", 8, 1)):
        loads = found[f"encode {dtype} ld"]
        assert loads.count(8) == 1 and set(loads) == {8, 16}  # the seed, and x, means and scales
        assert set(found[f"decode {dtype} ld"]) == {parameters, codes}  # of what 16 bytes of x are made
        assert set(found[f"decode {dtype} st"]) == {16}
