"""Noise for stochastic rounding: its values, the bias that it leaves, and that kernels draw what the reference says."""

import pytest
import torch

from actpress.kernels import division, quantize
from actpress.kernels.common import noise
from actpress.kernels.common.launch import tl, triton
from devices import DEVICES

SEED = 2**40 + 17


@triton.jit
def _draw(out_ptr, seed_ptr, first_group, BITS: tl.constexpr, EIGHTS: tl.constexpr, SLOTS: tl.constexpr):
    first = tl.arange(0, SLOTS) * (8 * EIGHTS)
    drawn = noise.draws(tl.load(seed_ptr), first_group.to(tl.int64) * 16, first, BITS, EIGHTS)
    for e in tl.static_range(EIGHTS):
        tl.store(out_ptr + first[:, None] + 8 * e + tl.arange(0, 8)[None, :], drawn[e])


@pytest.mark.parametrize(("bits", "eights"), [(1, 1), (2, 1), (2, 2), (4, 1), (8, 1)])
@pytest.mark.parametrize("first_group", [0, 3, 2**33 + 5], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_draw_what_the_reference_says(bits, eights, first_group, device):
    """Far into a tensor the counter exceeds 32 bits; the upper ones count as well."""
    seed = torch.tensor([SEED], device=device)
    ours = torch.full((16 * 32,), torch.nan, device=device)
    _draw[(1,)](ours, seed, first_group, BITS=bits, EIGHTS=eights, SLOTS=64 // eights)
    if first_group < 2**20:
        expected = noise.uniform_reference(SEED, 16 * (first_group + 32), noise.noise_bits(bits))[16 * first_group :]
        assert torch.equal(ours.cpu(), expected)
    else:
        low = noise.uniform_reference(SEED, 16 * (first_group % 2**32 + 32), noise.noise_bits(bits))[-512:]
        assert ((ours.cpu() > 0) & (ours.cpu() < 1)).all() and not torch.equal(ours.cpu(), low)


@pytest.mark.parametrize("bits", [8, 16])
def test_every_value_is_as_likely(bits):
    """By the upper eight bits: counts of 2^20 draws, of mean 4096 and deviation 64; six deviations have a chance of 5e-7 in 256 values."""
    drawn = noise.uniform_reference(SEED, 2**20, bits)
    counts = (drawn * 256).long().bincount(minlength=256)
    assert counts.numel() == 256 and (counts - 4096).abs().max() <= 6 * 64
    assert ((drawn * 2**bits) % 1 == 0.5).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_the_bias_is_half_of_the_finest_step(bits):
    """Over all values of the noise, of fractions in steps of 2^-11: fp64, exact."""
    values = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    for fraction in torch.arange(0, 2**11, 37, dtype=torch.float64) / 2**11:
        up = (fraction + values).floor().mean()
        assert abs(up - fraction) <= 2.0 ** -(bits + 1)
        assert up == fraction or fraction * 2**bits % 1


@pytest.mark.parametrize("bits", [1, 2])
def test_codes_are_biased_by_at_most_2_to_minus_9_of_a_step(bits):
    """x~ averaged over each of the 256 values; fp32 rounding of sums and differences adds less than 1e-5 of a step."""
    x, values = torch.randn(2, 3, 9, 9), (torch.arange(256) + 0.5) / 256
    format, channels = division.Format((8, 8), bits), quantize.Format("channel", bits=bits)
    total = {"division": torch.zeros_like(x), "quantize": torch.zeros_like(x)}
    for value in values:
        drawn = torch.full_like(x, value)
        code = division.encode_reference(x, drawn, format)
        total["division"] += division.decode_reference(code, x.shape, x.dtype, False, format)
        step = {"division": code.step.float()}
        code = quantize.encode_reference(x, drawn, channels)
        total["quantize"] += quantize.decode_reference(code, x.shape, x.dtype, False, channels)
        step["quantize"] = code.step.float().view(2, 3, 1, 1)
    for name, sum_of_decoded in total.items():
        bias = ((sum_of_decoded / 256 - x).abs() / step[name]).max()
        assert bias <= 2**-9 + 1e-5, f"{name}: {bias:.6f} of a step"
