"""Fixed levels for normal values: the levels against the textbook, the code against its formulas."""

import math
from itertools import pairwise

import pytest
import torch

from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.lloyd_max import BITS, code_bytes, decode_reference, encode_reference, normal_levels

SHAPES = [(1, 1, 1, 7), (2, 3, 7, 7), (3, 5, 14, 9)]


def code_and_decode(x, noise, bits):
    code = encode_reference(x, noise, normal_levels(bits))
    return code, decode_reference(code, x.shape, x.dtype, is_channels_last(x), normal_levels(bits))


def normalised(x, code):
    return (x - code.mean.view(-1, 1, 1)) / code.deviation.view(-1, 1, 1)


def test_levels_are_those_of_the_textbook():
    """Max, 1960, table I: four decimals."""
    assert normal_levels(1)[1] == pytest.approx(math.sqrt(2 / math.pi), abs=1e-12)
    assert normal_levels(2)[2:] == pytest.approx((0.4528, 1.5104), abs=6e-5)
    assert normal_levels(4)[8:] == pytest.approx((0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733), abs=6e-4)
    for bits in BITS:
        levels = torch.tensor(normal_levels(bits), dtype=torch.float64)
        assert len(levels) == 2**bits and (levels.diff() > 0).all()
        torch.testing.assert_close(levels, -levels.flip(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.3634), (2, 0.1175), (4, 0.009497)])
def test_the_error_on_normal_values_is_that_of_the_textbook(bits, expected):
    x = 3 * torch.randn(8, 2, 200, 200) + 5
    _, decoded = code_and_decode(x, None, bits)
    error = ((decoded - x) / 3).square().mean().item()
    assert error == pytest.approx(expected, rel=0.02)  # 640,000 draws: the mean is known to well below 1%


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_each_element_goes_to_the_nearest_level(shape, bits):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    code, decoded = code_and_decode(x, None, bits)
    std, mean = torch.std_mean(x, (0, 2, 3), correction=0)
    torch.testing.assert_close(code.mean, mean.float())
    torch.testing.assert_close(code.deviation, std.float())
    levels = torch.tensor(normal_levels(bits), dtype=torch.float64)
    z, decoded = normalised(x, code), normalised(decoded, code)
    nearest = levels[(z[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(decoded, nearest, rtol=1e-12, atol=1e-12)  # fp64 rounding


@pytest.mark.parametrize("bits", BITS)
def test_rounding_is_unbiased_between_the_outermost_levels_and_clamps_beyond(bits):
    """With n evenly spread noise values, a rounding of v to neighbours has mean v within 1/n of their distance."""
    x, n = torch.randn(2, 3, 9, 9, dtype=torch.float64), 256
    total = torch.zeros_like(x)
    for i in range(n):
        code, decoded = code_and_decode(x, torch.full_like(x, (i + 0.5) / n), bits)
        total += decoded
    levels = normal_levels(bits)
    expected = normalised(x, code).clamp(levels[0], levels[-1])
    widest = max(b - a for a, b in pairwise(levels))
    bias = (normalised(total / n, code) - expected).abs().max()
    assert bias < 1.01 * widest / n, f"x~: the mean is {bias:.5f} deviations off"
    assert (expected != normalised(x, code)).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_bytes_are_as_declared(shape, bits):
    x = torch.randn(shape)
    code, decoded = code_and_decode(x, torch.rand(shape), bits)
    assert sum(t.nbytes for t in code) == code_bytes(x.shape, normal_levels(bits)) and decoded.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_channels_last_gives_the_same_values(dtype, stochastic):
    x = torch.randint(-8, 9, (2, 5, 8, 16)).to(dtype)  # sums are exact in any order
    noise = torch.rand(x.shape) if stochastic else None
    code, expected = code_and_decode(x, noise, 2)
    other, decoded = code_and_decode(x.to(memory_format=torch.channels_last), noise, 2)
    assert decoded.dtype == dtype and is_channels_last(decoded)
    torch.testing.assert_close(other.deviation, code.deviation, rtol=1e-6, atol=0)  # squares in another order
    torch.testing.assert_close(decoded, expected)


def test_constant_channels_are_exact_and_what_is_not_finite_spoils_its_channel_alone():
    x = torch.randn(2, 4, 6, 6)
    x[:, 0], x[1, 1, 2, 2], x[0, 2, 0, 0] = 1.5, torch.nan, torch.inf
    _, decoded = code_and_decode(x, torch.rand(x.shape), 2)
    assert torch.equal(decoded[:, 0], x[:, 0])
    assert decoded[:, 1:3].isnan().all() and decoded[:, 3].isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_the_end_of_fp16_decodes_to_finite_numbers_and_what_is_not_finite_to_nan(bits):
    for top in (65504.0, 65000.0, 60000.0):
        x = torch.where(torch.rand(4, 3, 9, 9) < 0.02, top, 0.0).half()  # few outliers: the outermost level lies beyond
        x[:, 1] = torch.where(torch.rand(4, 9, 9) < 0.5, -top, top)
        _, decoded = code_and_decode(x, torch.rand(x.shape), bits)
        assert decoded.dtype == torch.float16 and decoded.isfinite().all()
    for value in (torch.nan, torch.inf, -torch.inf):
        x[2, 0, 3, 3] = value
        _, decoded = code_and_decode(x, torch.rand(x.shape), bits)
        assert decoded[:, 0].isnan().all() and decoded[:, 1:].isfinite().all()
