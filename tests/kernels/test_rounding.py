"""Rounding to bf16 by the bits, against PyTorch's casts and neighbours; in kernels, against the functions on tensors."""

import pytest
import torch

from actpress.kernels.common import launch
from actpress.kernels.common.launch import tl, triton
from actpress.kernels.common.rounding import (
    bf16_ceil,
    bf16_ceil_bits,
    bf16_floor,
    bf16_floor_bits,
    bf16_nearest_bits,
    bf16_value,
    finite,
    finite_bits,
    poison,
    saturate,
    saturated,
)
from devices import BACKENDS, DEVICES, assert_same

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_saturated_is_the_cast_within_the_finite_range_of_a_dtype(dtype):
    x, largest = numbers().double(), torch.finfo(dtype).max
    ours = saturated(x.clone(), dtype)
    inside = x.abs() <= largest
    assert ours.dtype == dtype and torch.equal(ours[inside], x[inside].to(dtype))
    assert torch.equal(ours.isnan(), x.isnan())
    beyond = x.abs() > largest
    assert torch.equal(ours[beyond].double(), x[beyond].sign() * largest)


def test_poison_is_nan_where_fp32_holds_no_finite_number():
    x = torch.cat([numbers().double(), torch.tensor([1e39, -1e300], dtype=torch.float64)])
    expected = torch.zeros(x.shape).masked_fill(~x.float().isfinite(), torch.nan)
    assert_same("poison", poison(x), expected)


@triton.jit
def _saturate_kernel(x_ptr, y_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(y_ptr + at, saturate(tl.load(x_ptr + at), y_ptr.dtype.element_ty))


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_kernels_saturate_alike(device, dtype):
    x = torch.cat([numbers(), torch.randn(79)]).to(device)
    y = torch.empty(x.shape, dtype=dtype, device=device)
    launch.run(_saturate_kernel, (1,), x, y, COUNT=x.numel())
    assert_same("saturated", y, saturated(x.clone(), dtype))


@triton.jit
def _finite_kernel(bits_ptr, finite_ptr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    tl.store(finite_ptr + at, finite_bits(tl.load(bits_ptr + at)))


@pytest.mark.parametrize("device", DEVICES)
def test_finite_bits_change_infinities_alone(device):
    bits = torch.arange(-(2**15), 2**15, device=device).to(torch.int16)
    out = torch.empty_like(bits)
    launch.run(_finite_kernel, (1,), bits, out, COUNT=bits.numel())
    x = bits.view(torch.bfloat16)
    expected = torch.where(x == torch.inf, LARGEST, torch.where(x == -torch.inf, -LARGEST, x.float()))
    assert_same("finite", finite(x), expected.to(torch.bfloat16))
    assert torch.equal(out, finite(x).view(torch.int16))  # NaN too


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
