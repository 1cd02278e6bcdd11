"""Triton kernels of masks against their references."""

import pytest
import torch

from actpress.kernels import masks
from actpress.kernels.layout import is_channels_last
from devices import BACKENDS, assert_same, last_program_only, traffic

SIZES = [(0,), (1,), (7,), (8,), (63,), (4097,), (3, 5, 7), (2, 5, 7, 9)]
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("config", masks.CONFIGS, ids=str)
def test_relu(shape, device, dtype, config):
    x = torch.randn(shape, device=device).to(dtype)
    x.view(-1)[::5] = torch.nan
    for name, ours, reference in zip(("y", "mask"), masks.relu_triton(x, config), masks.relu_reference(x), strict=True):
        assert_same(name, ours, reference)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_relu_backward(shape, device, dtype):
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    dy.view(-1)[::3] = torch.inf
    _, packed = masks.relu_reference(x)
    ours = masks.relu_backward_triton(dy, packed, False)
    assert_same("dx", ours, masks.relu_backward_reference(dy, packed, False))


@pytest.mark.parametrize("strides", ["channels_last", "transposed", "every other", "expanded"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_relu_of_any_strides(strides, device, dtype):
    x = torch.randn(2, 6, 5, 7, device=device).to(dtype)
    x = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 2),
        "every other": x[:, ::2],
        "expanded": x[:, :1].expand(2, 6, 5, 7),
    }[strides]
    y, packed = masks.relu_triton(x)
    for name, ours, reference in zip(("y", "mask"), (y, packed), masks.relu_reference(x), strict=True):
        assert_same(name, ours, reference)
    dy = torch.randn_like(x)
    ours = masks.relu_backward_triton(dy.contiguous(), packed, is_channels_last(x))
    assert_same("dx", ours, masks.relu_backward_reference(dy, packed, is_channels_last(x)))


def test_relu_moves_what_it_declares():
    x = torch.randn(1000)
    with traffic() as moved:
        masks.relu_triton(x)
    assert moved.total == 2 * 4000 + 125


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu"])
def test_relu_past_two_to_the_31_elements(device):
    n = 2**31 + 4096
    x = torch.empty(n, dtype=torch.float16)
    x[-4096:] = torch.randn(4096)
    with last_program_only():
        y, packed = masks.relu_triton(x)
    for name, ours, reference in zip(("y", "mask"), (y[-8:], packed[-1:]), masks.relu_reference(x[-8:]), strict=True):
        assert_same(name, ours, reference)
