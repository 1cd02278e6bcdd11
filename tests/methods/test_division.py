"""The DIVISION method: what it keeps, where it is exact, and that its noise averages out."""

import copy

import pytest
import torch
from torch import nn

import actpress
from actpress import measure
from actpress.kernels.common.bits import packed_bytes
from actpress.methods import Division


def code_bytes(n, c, h, w, bits, block=8):
    """LFC bf16, codes, and two bf16 per map: the closed formula."""
    return 2 * n * c * -(-h // block) * -(-w // block) + packed_bytes(n * c * h * w, bits) + 4 * n * c


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n,size", [(1, 14), (3, 9)])
def test_saved_bytes_follow_the_formula(bits, n, size):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
    )
    actpress.apply(net, Division(bits=bits))
    x, half = torch.randn(n, 3, size, size), size // 2
    expected = (
        code_bytes(n, 3, size, size, bits)  # first convolution
        + code_bytes(n, 8, size, size, bits)  # batch norm,
        + 2 * 8 * 4  # its mean and inverse deviation
        + packed_bytes(n * 8 * size * size, 1)  # ReLU
        + n * 8 * half * half  # max-pool
        + code_bytes(n, 8, half, half, bits, min(8, half))  # last convolution
    )
    assert measure.saved_bytes(lambda: net(x).sum()) == expected


@pytest.mark.parametrize("shape", [(2, 21, 6), (1, 8, 5), (2, 70, 3)], ids=str)
def test_tokens_are_averaged_along_the_sequence(shape):
    net, x = nn.Linear(shape[-1], 3), torch.randn(shape)
    actpress.apply(net, Division(bits=2))
    n, length, features = shape
    means = n * -(-length // 64) * features  # of blocks of 64 tokens, as many as an 8x8 block has
    codes = 2 * means + packed_bytes(x.numel(), 2) + 4 * n * features  # bounds of each feature
    assert measure.saved_bytes(lambda: net(x).sum()) == codes + 2 * n * length  # a scale for each token


def test_a_map_of_one_pixel_stays_dense():
    net, x = nn.Conv2d(5, 3, 1), torch.randn(4, 5, 1, 1)
    exact = copy.deepcopy(net)
    actpress.apply(net, Division())
    net(x).square().sum().backward()
    exact(x).square().sum().backward()
    assert torch.equal(net.weight.grad, exact.weight.grad)


@pytest.mark.parametrize(
    "layer,shape",
    [(nn.Conv2d(4, 6, 3, padding=1), (2, 4, 12, 10)), (nn.Linear(12, 6), (2, 20, 12))],
    ids=["conv", "linear"],
)
def test_weight_gradients_are_unbiased_and_input_gradients_exact(layer, shape):
    exact, draws = copy.deepcopy(layer), 300
    ours = copy.deepcopy(layer)
    actpress.apply(ours, Division(bits=1))  # the noisiest
    x = torch.randn(shape, requires_grad=True)
    y = exact(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    dx, along = x.grad.clone(), []
    direction = exact.weight.grad / exact.weight.grad.norm()
    across = torch.randn_like(direction)  # a second direction, picked before any draw
    for _ in range(draws):
        x.grad, ours.weight.grad = None, None
        ours(x).backward(dy)
        torch.testing.assert_close(x.grad, dx, rtol=1e-5, atol=1e-5)
        error = ours.weight.grad - exact.weight.grad
        along.append(torch.stack([(error * direction).sum(), (error * across).sum()]))
    along = torch.stack(along)
    assert (along.std(0) > 0).all()
    z = along.mean(0) / (along.std(0) / draws**0.5)
    assert z.abs().max() < 4, f"dW: mean over {draws} draws is {z.abs().max():.1f} standard errors off"
