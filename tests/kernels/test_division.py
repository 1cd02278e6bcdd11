"""DIVISION's code of a map: the reference against the formulas, on ugly sizes."""

import pytest
import torch

from actpress.codec import Context, Like
from actpress.kernels.division import Format, code_bytes, decode_reference, encode_reference
from actpress.methods.division import DivisionCodec

SHAPES = [(1, 1, 1, 2), (2, 3, 7, 7), (1, 5, 28, 28), (3, 2, 14, 9), (2, 4, 8, 8), (1, 2, 33, 65)]


def kernel_of(shape, block, align):
    height, width = min(block, shape[2]), min(block, shape[3])
    return (height, width) if align == "ceil" else (min(height, width),) * 2


def code_and_decode(x, noise, bits, align="ceil", block=8, lfc="always"):
    format = Format(kernel_of(x.shape, block, align), bits, align, lfc)
    code = encode_reference(x, noise, format)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return code, decode_reference(code, x.shape, x.dtype, channels_last, format)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_error_is_below_one_step(shape, bits):
    x = torch.randn(shape) * 3 + 1
    code, decoded = code_and_decode(x, torch.rand(shape), bits)
    error = (decoded - x).abs()
    # one step of stochastic rounding, plus fp32 rounding of the sums
    assert (error <= code.step.float() + 1e-5).all(), f"x~: largest error {error.max()}, largest step {code.step.max()}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("align", ["ceil", "authors"])
def test_bytes_are_as_declared(shape, align):
    code, _ = code_and_decode(torch.randn(shape), torch.rand(shape), 2, align)
    assert sum(t.nbytes for t in code) == code_bytes(torch.Size(shape), Format(kernel_of(shape, 8, align), 2, align))


@pytest.mark.parametrize("shape", [(2, 3, 16, 4), (2, 3, 20, 1), (2, 3, 1, 20), (2, 3, 9, 7), (1, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("align", ["ceil", "authors"])
def test_maps_narrower_than_a_block_are_coded_within_a_step(shape, align):
    codec, x = DivisionCodec(8, 2, align, "always"), torch.randn(shape)
    kept = codec.encode(x, Context(0))
    decoded = codec.decode(kept, Like(x.shape, x.dtype, False))
    step = kept[3].float() if len(kept) > 1 else 0  # a map whose code would be no smaller is kept as it is
    assert ((decoded - x).abs() <= step + 1e-5).all()  # fp32 rounding of the sums


@pytest.mark.parametrize(
    "size,bits_per_element", [(224, 2.25), (56, 2.26), (32, 2.28), (16, 2.38), (8, 2.75), (4, 5.0)]
)
def test_bits_per_element_of_the_formula(size, bits_per_element):
    shape = torch.Size((2, 3, size, size))
    measured = 8 * code_bytes(shape, Format((min(8, size),) * 2, 2)) / shape.numel()
    assert measured == pytest.approx(bits_per_element, abs=0.006)


@pytest.mark.parametrize("lfc", ["auto", "always"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_rounding_is_unbiased(bits, lfc):
    """The mean over all noise is x. With n evenly spread noise values a rounding of v to neighbours has mean v within 1/n."""
    x, n = torch.randn(2, 3, 9, 9), 256
    total = torch.zeros_like(x)
    for i in range(n):
        code, decoded = code_and_decode(x, torch.full_like(x, (i + 0.5) / n), bits, lfc=lfc)
        total += decoded
    bias = (total / n - x).abs() / code.step.float()
    assert bias.max() < 1.01 / n, (
        f"x~: the mean is {bias.max():.4f} steps from x, at most {1 / n:.4f} is due to n = {n}"
    )


def test_every_code_is_in_range_with_the_largest_noise():
    x = torch.randn(4, 3, 12, 12)
    _, low = code_and_decode(x, torch.zeros_like(x), 2)
    code, high = code_and_decode(x, torch.full_like(x, 1 - 2**-24), 2)
    assert ((high - low) <= code.step.float() + 1e-5).all()  # a code spilled into its neighbour would jump by more


@pytest.mark.parametrize("value", [0.0, 3.1415926, -1e-20, 1e30])
def test_constant_map_is_kept_to_bf16(value):
    x = torch.full((1, 2, 5, 5), value)
    _, decoded = code_and_decode(x, torch.rand(x.shape), 2)
    assert torch.allclose(decoded, x, rtol=1e-5, atol=0)  # the rest corrects the rounding of the mean


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("align", ["ceil", "authors"])
def test_channels_last_gives_the_same_values(dtype, align):
    x, noise = torch.randn(2, 5, 11, 13).to(dtype), torch.rand(2, 5, 11, 13)
    _, expected = code_and_decode(x, noise, 2, align)
    nhwc = x.to(memory_format=torch.channels_last)
    _, decoded = code_and_decode(nhwc, noise.to(memory_format=torch.channels_last), 2, align)
    assert decoded.dtype == dtype and decoded.is_contiguous(memory_format=torch.channels_last)
    # the mean of a block is summed in another order: its bf16 rounding may differ, one step in the code
    assert (decoded - expected).abs().double().mean() < 1e-2 * expected.abs().double().mean()


def test_aligned_blocks_follow_smooth_maps_better_than_the_official_floor_mode():
    ramp = torch.linspace(-1, 1, 28)
    x = (ramp[:, None] * ramp[None, :]).expand(1, 1, 28, 28).contiguous()
    error = {
        align: (code_and_decode(x, torch.full_like(x, 0.5), 2, align)[1] - x).square().mean()
        for align in ("ceil", "authors")
    }
    assert error["ceil"] < error["authors"]


TOPS = [torch.finfo(dtype).max * part for dtype in (torch.float16, torch.bfloat16) for part in (1, 0.999, 0.95, 0.5)]


@pytest.mark.parametrize("lfc", ["auto", "always"])
@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("top", [t for t in TOPS if t < 1e6])
def test_halves_near_the_end_of_their_range_decode_to_finite_numbers(top, bits, lfc):
    x = (torch.rand(2, 3, 24, 24) * 2 - 1).mul(top).half()
    x[:, 0], x[:, 1, 0], x[..., -1, -1] = top, -top, 0
    for align in ("ceil", "authors"):
        code, decoded = code_and_decode(x, torch.rand(x.shape), bits, align, lfc=lfc)
        assert decoded.isfinite().all() and decoded.dtype == torch.float16
        # a step, and rounding to fp16
        assert ((decoded.float() - x.float()).abs() <= code.step.float() * 1.001 + 32).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_maps_whose_block_sums_overflow_are_coded_without_means(dtype, bits):
    """With lfc="auto"; with "always" they are NaN, and so is what fp32 cannot hold the range of."""
    x = (torch.rand(2, 3, 24, 24) * torch.finfo(torch.bfloat16).max).to(dtype)
    x[0, 1] *= -1
    code, decoded = code_and_decode(x, torch.rand(x.shape), bits, lfc="auto")
    assert decoded.isfinite().all() and (code.lfc == 0).all()
    # of a number of bf16, up to 2^-8 of rounding
    assert ((decoded.double() - x.double()).abs() <= code.step.double() * 1.001 + 2**-8 * x.double().abs()).all()
    assert code_and_decode(x, torch.rand(x.shape), bits, lfc="always")[1].isnan().all()
    x[..., :2, :2], x[..., 5, 5] = x.abs().amax(), -x.abs().amax()
    assert code_and_decode(x, torch.rand(x.shape), bits, lfc="auto")[1].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("align", ["ceil", "authors"])
@pytest.mark.parametrize("lfc", ["auto", "always"])
def test_a_map_that_holds_what_is_not_finite_decodes_to_nan(lfc, align, dtype, value):
    x = torch.randn(1, 4, 12, 20).to(dtype)
    x[0, 1, 0, 0] = x[0, 3, 11, 19] = value  # authors: the last pixel is in no block
    _, decoded = code_and_decode(x, torch.rand(x.shape), 2, align, lfc=lfc)
    assert decoded[:, [1, 3]].isnan().all() and decoded[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(4, 8, 14, 14), (2, 8, 28, 28), (2, 8, 9, 13)], ids=str)
def test_auto_codes_each_map_as_the_better_of_with_and_without_means(shape):
    """Against the measured error of both, over evenly spread noise, in the rows that are compared, every fourth; over whole maps the choice
    costs little. And zeros after a ReLU stay zeros where means are left out."""
    smooth = torch.nn.functional.interpolate(torch.randn(*shape[:2], 3, 3), size=shape[2:], mode="bicubic")
    x = torch.cat([torch.randn(shape).relu(), smooth + 0.1 * torch.randn(shape)])

    def error(**how):
        draws = [code_and_decode(x, torch.full_like(x, (i + 0.5) / 64), 2, **how)[1] for i in range(64)]
        squares = torch.stack([(decoded - x).square() for decoded in draws]).mean(0)
        return squares[:, :, ::4].mean((2, 3)), squares.mean((2, 3))

    # one block: a constant per map
    rows, maps = zip(error(lfc="auto"), error(lfc="always"), error(block=max(shape)), strict=True)
    auto, best = rows[0], torch.minimum(*rows[1:])
    assert (auto <= 1.02 * best + 1e-7).all(), (
        f"largest excess {(auto / best).max()}"
    )  # the mean's bf16 rounding moves the grid
    # the rows that are left out cost less than 1% of squared error, twice what was measured on activations of that size
    assert maps[0].sum() <= 1.01 * torch.minimum(*maps[1:]).sum()
    code, decoded = code_and_decode(x, torch.rand(x.shape), 2, lfc="auto")
    left_out = (code.lfc == 0).all((2, 3))
    assert left_out[: shape[0]].float().mean() > 0.9 and left_out[shape[0] :].float().mean() < 0.5
    zeros = (x == 0) & left_out[:, :, None, None]
    assert zeros.any() and (decoded[zeros] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_channels_last_are_decoded_in_their_own_order(dtype):
    """They are neither contiguous nor channels_last; a cast would make them so."""
    whole = torch.randn(4, 16, 12, 12).to(dtype).to(memory_format=torch.channels_last)
    for x in (whole[:, :8], whole[::2]):
        code, decoded = code_and_decode(x, torch.rand(x.shape), bits=8)
        # a step of the code, and two roundings to bf16, of x~ and of its mean
        assert ((decoded - x).abs() <= code.step.float() + 2**-7 * x.abs().max()).all()
