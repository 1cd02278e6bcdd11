"""Low and high frequencies of a map: what is kept of each, and the ends of dtypes."""

import pytest
import torch

from actpress.codec import Context, Like
from actpress.kernels.frequency import TRANSFORMS, back_reference, low_reference
from actpress.methods.frequency import FrequencyCodec

PARTS = ("both", "low", "high")


def decoded(x, parts, transform, bits=8, block=4):
    codec = FrequencyCodec(block, bits, parts, transform)
    return codec.decode(codec.encode(x, Context(0)), Like(x.shape, x.dtype, False))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("size", [(7, 9), (16, 16), (1, 13)], ids=str)
def test_what_the_low_part_can_represent_is_kept_by_it(transform, size):
    low = low_reference(torch.randn(2, 3, *size), 4, transform)
    x = back_reference(low, size, 4, transform, torch.float32)
    torch.testing.assert_close(low_reference(x, 4, transform).float(), low.float(), rtol=2**-7, atol=1e-5)  # bf16
    torch.testing.assert_close(decoded(x, "low", transform), x, rtol=0, atol=2**-7 * x.abs().max().item())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("top", [65504.0, 65440.0, 65000.0, 60000.0])
def test_the_end_of_fp16_decodes_to_finite_numbers(top, parts, transform):
    x = (torch.rand(2, 3, 24, 24) * top).half()
    x[:, 0], x[:, 1, :12], x[..., -1, -1] = top, -top, 0
    out = decoded(x, parts, transform)
    assert out.dtype == torch.float16 and out.isfinite().all()
    if parts == "both":
        assert (out.float() - x.float()).abs().max() <= 2 * top / 64  # 8 bits of at most twice the range, and fp16


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_not_finite_stays_in_its_map(dtype, value, parts, transform):
    x = torch.randn(1, 2, 16, 16).to(dtype)
    x[0, 1, 3, 3] = value
    out = decoded(x, parts, transform)
    assert out[0, 0].isfinite().all() and out[0, 1, :4, :4].isnan().all()
    assert out[0, 1].isnan().all() or (parts == "low" and transform == "mean")
