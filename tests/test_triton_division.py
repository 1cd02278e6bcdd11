"""Triton kernels of DIVISION against their references."""

import pytest
import torch

from actpress.kernels import division, noise
from actpress.kernels.layout import is_channels_last
from actpress.kernels.masks import pack_mask_reference
from devices import BACKENDS, DEVICES, INTERPRETED, assert_same, traffic

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


def exact_sums(shape, dtype, device):
    """Multiples of 2^-8, small enough that any order of summing gives the same."""
    return (torch.randint(-512, 512, shape, device=device) / 256).to(dtype)


def kernel_of(shape, block):
    return min(block, shape[2]), min(block, shape[3])


def noise_for(x):
    """What the kernel draws, as the reference takes it: fp32 of x's shape."""
    flat = noise.uniform_reference(SEED, x.numel()).to(x.device)
    if is_channels_last(x):
        n, c, h, w = x.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(x.shape)


def both(x, kernel, bits, align, lfc, config=division.ENCODE_CONFIGS[0]):
    seed = torch.tensor([SEED], device=x.device)
    ours = division.encode_triton(x, seed, kernel, bits, align, lfc, config)
    return ours, division.encode_reference(x, noise_for(x), kernel, bits, align, lfc)


def assert_same_code(ours, reference):
    for name in division.Code._fields:
        assert_same(name, getattr(ours, name), getattr(reference, name))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_encode_byte_for_byte(name, bits, channels_last, device, dtype):
    shape, block = SHAPES[name]
    x = exact_sums(shape, dtype, device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert_same_code(*both(x, kernel_of(shape, block), bits, "ceil", "always"))


@pytest.mark.parametrize("name", ["7x7", "28x28", "9x13", "channels 16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_encode_in_the_official_layout(name, channels_last, device, dtype):
    shape, block = SHAPES[name]
    x = exact_sums(shape, dtype, device)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    assert_same_code(*both(x, kernel_of(shape, block), 2, "authors", "always"))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["14x14", "28x28", "56x56", "channels 24"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_auto_leaves_means_out_of_the_same_maps(name, channels_last, device, dtype):
    """Maps after a ReLU beside smooth ones: the two errors differ clearly, so that their order of summing does not matter."""
    shape, block = SHAPES[name]
    x = exact_sums(shape, dtype, device)
    x[:, ::2] = x[:, ::2].relu()
    ramp = torch.arange(shape[2], device=device)[:, None] // block * 4.0
    x[:, 1::2] = (x[:, 1::2] / 16 + ramp).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    ours, reference = both(x, kernel_of(shape, block), 2, "ceil", "auto")
    left_out = (reference.lfc == 0).all((2, 3))
    assert left_out.any() and not left_out.all()
    assert_same_code(ours, reference)


@pytest.mark.parametrize("config", division.ENCODE_CONFIGS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_every_configuration(config, device, dtype):
    for name in ("28x28", "9x13"):
        shape, block = SHAPES[name]
        assert_same_code(*both(exact_sums(shape, dtype, device), kernel_of(shape, block), 2, "ceil", "always", config))


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_tokens(device, dtype):
    x = exact_sums((2, 1, 37, 48), dtype, device)
    assert_same_code(*both(x, (8, 1), 2, "ceil", "always"))


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_tall_blocks_and_maps_cut_into_parts(device, dtype):
    assert_same_code(*both(exact_sums((1, 2, 40, 24), dtype, device), (20, 8), 2, "ceil", "always"))
    assert_same_code(*both(exact_sums((1, 1, 224, 224), dtype, device), (8, 8), 2, "ceil", "always"))


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_means_of_any_values_differ_by_one_step_at_most(device, dtype):
    x = torch.randn(2, 8, 28, 28, device=device).to(dtype)
    ours, reference = both(x, (8, 8), 2, "ceil", "always")
    steps = (ours.lfc.view(torch.int16).int() - reference.lfc.view(torch.int16).int()).abs()
    assert steps.max() <= 1, "lfc: more than one bf16 from the reference"
    same = (steps == 0).all(3).all(2).flatten()
    assert same.float().mean() > 0.5
    decoded = [division.decode_reference(c, x.shape, dtype, False, (8, 8), 2, "ceil") for c in (ours, reference)]
    a, b = (d.view(16, -1)[same] for d in decoded)
    assert_same("codes of maps with equal means", a, b)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_decode(name, bits, channels_last, device, dtype):
    shape, block = SHAPES[name]
    x = torch.randn(shape, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    how = (x.shape, dtype, is_channels_last(x), kernel_of(shape, block), bits, "ceil")
    code = division.encode_reference(x, torch.rand_like(x, dtype=torch.float32), *how[3:])
    for mask in (None, pack_mask_reference(x > 0)):
        reference = division.decode_reference(code, *how, mask)
        for config in division.DECODE_CONFIGS if bits == 2 else division.DECODE_CONFIGS[:1]:
            ours = division.decode_triton(code, *how, mask, config)
            assert_same("x~", ours, reference)
            assert is_channels_last(ours) == is_channels_last(reference)


@pytest.mark.parametrize("device", DEVICES)
def test_empty(device):
    x = torch.empty(0, 3, 8, 8, device=device)
    code = division.encode_triton(x, torch.tensor([1], device=device), (8, 8), 2, "ceil", "auto")
    assert code.codes.numel() == 0
    assert division.decode_triton(code, x.shape, x.dtype, False, (8, 8), 2, "ceil").shape == x.shape


@pytest.mark.skipif(not INTERPRETED, reason="counted in the interpreter")
@pytest.mark.parametrize("case", division.cases(), ids=lambda case: case.name)
def test_declared_bytes_are_those_counted(case):
    """Means and steps that several programs read come from a cache: counted again here, and few beside maps of any size."""
    inputs = case.tiny(torch.float32, "cpu")
    with traffic() as counted:
        case.kernel(*inputs)
    assert case.moved(*inputs) <= counted.total <= 1.06 * case.moved(*inputs)


def test_operations_pass_opcheck():
    x = torch.randn(2, 4, 14, 14)
    arguments = (x, torch.tensor([3]), [8, 8], 2, "ceil", "auto")
    torch.library.opcheck(torch.ops.actpress.division_encode, arguments)


def test_compiled_operation_is_the_eager_one():
    x = torch.randn(2, 4, 14, 14)
    seed = torch.tensor([3])

    def encode(x, seed):
        return torch.ops.actpress.division_encode(x, seed, [8, 8], 2, "ceil", "auto")

    compiled = torch.compile(encode, fullgraph=True)(x, seed)
    for name, ours, reference in zip(division.Code._fields, compiled, encode(x, seed), strict=True):
        assert_same(name, ours, reference)
