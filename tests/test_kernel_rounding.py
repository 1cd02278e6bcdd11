"""Rounding to bf16 by the bits, against PyTorch's casts and neighbours; in kernels, against the functions on tensors."""

import pytest
import torch

from actpress.kernels import launch
from actpress.kernels.launch import tl, triton
from actpress.kernels.rounding import (
    bf16_ceil,
    bf16_ceil_bits,
    bf16_floor,
    bf16_floor_bits,
    bf16_nearest_bits,
    bf16_value,
)
from devices import DEVICES

SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    torch.inf,
    -torch.inf,
    torch.nan,
    1e-45,
    -1e-45,
    3.4e38,
    -3.4e38,
    1 + 2**-8,
    1 + 3 * 2**-8,
]
LARGEST = torch.finfo(torch.bfloat16).max


def numbers() -> torch.Tensor:
    """fp32 of every size and sign, and those that are special; NaNs with the most and the least of a payload among them."""
    spread = torch.randn(4000) * torch.logspace(-38, 38, 4000)
    payloads = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    return torch.cat([spread, torch.tensor(SPECIAL), payloads])


def test_floor_and_ceil_are_the_nearest_on_their_side():
    x = numbers()
    x = x[x.isfinite() & (x.abs() <= LARGEST)]
    infinity = torch.tensor(torch.inf, dtype=torch.bfloat16)
    floor, ceil = bf16_floor(x), bf16_ceil(x)
    assert (floor.float() <= x).all() and (torch.nextafter(floor, infinity).float() > x).all()
    assert (ceil.float() >= x).all() and (torch.nextafter(ceil, -infinity).float() < x).all()


@pytest.mark.parametrize("function", [bf16_floor, bf16_ceil])
def test_what_bf16_holds_stays(function):
    x = torch.tensor([0.0, -0.0, 1.5, -3.0, torch.inf, -torch.inf])
    assert torch.equal(function(x).view(torch.int16), x.to(torch.bfloat16).view(torch.int16))
    assert function(numbers()[-4:]).isnan().all()


def test_beyond_the_largest():
    x = torch.tensor([3.4e38, -3.4e38])
    assert bf16_floor(x).tolist() == [LARGEST, -torch.inf] and bf16_ceil(x).tolist() == [torch.inf, -LARGEST]


@triton.jit
def _kernel(x_ptr, floor_ptr, ceil_ptr, nearest_ptr, value_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    x = tl.load(x_ptr + at)
    tl.store(floor_ptr + at, bf16_floor_bits(x))
    tl.store(ceil_ptr + at, bf16_ceil_bits(x))
    tl.store(nearest_ptr + at, bf16_nearest_bits(x))
    tl.store(value_ptr + at, bf16_value(bf16_nearest_bits(x)))


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_round_alike(device):
    x = torch.cat([numbers(), torch.randn(79)]).to(device)
    bits = torch.empty(3, x.numel(), dtype=torch.int16, device=device)
    value = torch.empty_like(x)
    launch.run(_kernel, (1,), x, *bits, value, COUNT=x.numel())
    nearest = x.to(torch.bfloat16).view(torch.int16).masked_fill(x.isnan(), 0x7FC0)
    expected = (bf16_floor(x).view(torch.int16), bf16_ceil(x).view(torch.int16), nearest)
    for name, ours, reference in zip(("floor", "ceil", "nearest"), bits, expected, strict=True):
        assert torch.equal(ours, reference), f"{name}: {x[ours != reference]}"
    assert torch.equal(value.nan_to_num(7), bits[2].view(torch.bfloat16).float().nan_to_num(7))
