"""Every layer against the stock layer it replaces: same forward bits, exact gradients where it promises them."""

import copy

import pytest
import torch
from torch import nn

from actpress import layers
from actpress.codec import Context, Dense
from actpress.layers import base

CASES = {
    "linear": (nn.Linear(5, 3), (4, 5)),
    "linear tokens": (nn.Linear(5, 3), (2, 7, 5)),
    "linear vector": (nn.Linear(5, 3), (5,)),
    "linear no bias": (nn.Linear(5, 3, bias=False), (1, 5)),
    "conv 3x3": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 9)),
    "conv stride dilation groups": (
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        (1, 4, 9, 8),
    ),
    "conv depthwise": (nn.Conv2d(4, 4, 3, groups=4), (3, 4, 5, 5)),
    "conv same": (nn.Conv2d(2, 3, 4, padding="same"), (1, 2, 6, 7)),
    "conv valid": (nn.Conv2d(2, 3, 3, padding="valid"), (1, 2, 6, 7)),
    "conv reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 6, 7)),
    "conv unbatched": (nn.Conv2d(2, 3, 3), (2, 6, 7)),
    "batch norm": (nn.BatchNorm2d(4), (2, 4, 5, 3)),
    "batch norm not affine": (nn.BatchNorm2d(4, affine=False), (2, 4, 5, 3)),
    "batch norm without statistics": (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 5, 3)),
    "batch norm cumulative": (nn.BatchNorm2d(4, momentum=None), (2, 4, 5, 3)),
    "batch norm eval": (nn.BatchNorm2d(4).eval(), (2, 4, 5, 3)),
    "layer norm": (nn.LayerNorm(6), (3, 5, 6)),
    "layer norm two axes": (nn.LayerNorm((5, 6), bias=False), (3, 5, 6)),
    "layer norm not affine": (nn.LayerNorm(6, elementwise_affine=False), (4, 6)),
    "relu": (nn.ReLU(), (3, 5, 7)),
    "relu in place": (nn.ReLU(inplace=True), (3, 5, 7)),
    "dropout": (nn.Dropout(0.3), (3, 5, 7)),
    "dropout off": (nn.Dropout(0.0), (3, 5, 7)),
    "dropout all": (nn.Dropout(1.0), (3, 5, 7)),
    "max pool": (nn.MaxPool2d(3, 2, 1), (2, 3, 9, 8)),
    "max pool ceil dilated": (nn.MaxPool2d((2, 3), (2, 1), (1, 0), dilation=(1, 2), ceil_mode=True), (1, 2, 8, 9)),
    "max pool large window": (nn.MaxPool2d(17), (1, 1, 35, 40)),
    "max pool with indices": (nn.MaxPool2d(2, return_indices=True), (1, 2, 6, 6)),
    "average pool": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), (2, 3, 8, 7)),
    "average pool divisor": (nn.AvgPool2d(2, divisor_override=3), (1, 2, 6, 6)),
}


def replaced(stock):
    """A copy of a stock layer as our layer, with the lossless codec."""
    ours = copy.deepcopy(stock)
    ours.__class__ = getattr(layers, type(stock).__name__)
    ours.codec, ours.context = Dense(), Context(0)
    return ours


def run(layer, x, upstream=None):
    """(outputs, input gradient, parameter gradients) of one forward and backward pass."""
    torch.manual_seed(1)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = layer(leaf * 1)  # * 1: in-place layers may not touch a leaf
    y = out[0] if isinstance(out, tuple) else out
    (y * (torch.linspace(-1, 2, y.numel()).view(y.shape) if upstream is None else upstream)).sum().backward()
    return y, leaf.grad, {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("case", CASES)
def test_lossless_layer_equals_stock(case, memory_format, dtype):
    layer, shape = CASES[case]
    if memory_format == torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is for maps")
    stock = copy.deepcopy(layer).to(dtype)
    ours = replaced(stock)
    x = torch.randn(shape, dtype=dtype)
    x = x.to(memory_format=memory_format)
    y_stock, dx_stock, dp_stock = run(stock, x)
    y, dx, dp = run(ours, x)
    assert torch.equal(y, y_stock)
    # the same sums, possibly by another routine (dx and dw separately): rounding only
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(dx, dx_stock, rtol=tolerance, atol=tolerance, msg=lambda m: f"dx: {m}")
    for name, gradient in dp_stock.items():
        torch.testing.assert_close(
            dp[name], gradient, rtol=tolerance, atol=10 * tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    for (name, buffer), expected in zip(ours.named_buffers(), stock.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith(("conv ", "average pool"))])
def test_arguments_without_memory_give_the_same_gradients(case, monkeypatch):
    """As on CUDA: an argument of which only the shape is read has the strides of a channels_last tensor."""
    layer, shape = CASES[case]
    if len(shape) != 4:
        pytest.skip("channels_last is for maps")
    ours, x = replaced(layer), torch.randn(shape).to(memory_format=torch.channels_last)
    _, dx_expanded, dp_expanded = run(ours, x)
    stood_in = []

    def directly(like):
        stood_in.append(like)
        return True

    monkeypatch.setattr(base, "directly", directly)
    ours.zero_grad()
    _, dx, dp = run(ours, x)
    assert stood_in
    torch.testing.assert_close(dx, dx_expanded)
    assert all(torch.equal(dp[name], gradient) for name, gradient in dp_expanded.items())
    without = base.shape_only(x, x.shape, channels_last=True)
    assert (without.stride(), without.untyped_storage().nbytes()) == (x.stride(), 0)


@pytest.mark.parametrize("case", ["linear tokens", "conv 3x3", "batch norm", "layer norm", "relu", "max pool"])
def test_autocast_output_is_that_of_stock_and_gradients_are_close(case):
    layer, shape = CASES[case]
    stock, ours = copy.deepcopy(layer), replaced(layer)
    x = torch.randn(shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_stock, dx_stock, dp_stock = run(stock, x)
        y, dx, dp = run(ours, x)
    assert y.dtype == y_stock.dtype and torch.equal(y, y_stock)
    for name, expected, got in [("dx", dx_stock, dx), *((n, g, dp[n]) for n, g in dp_stock.items())]:
        assert got.dtype == expected.dtype, name
        assert (got - expected).norm() <= 2**-7 * expected.norm(), name  # one bf16 rounding


def test_dropout_draws_the_mask_and_leaves_the_generator_where_stock_does():
    stock = nn.Dropout(0.5)
    ours, x = replaced(stock), torch.ones(1000, requires_grad=True)
    torch.manual_seed(0)
    y_stock = stock(x)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(ours(x), y_stock)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_weights_keep_no_input():
    layer = replaced(nn.Linear(4, 4))
    layer.requires_grad_(False)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t.detach(), lambda t: t):
        layer(torch.randn(3, 4, requires_grad=True)).sum()
    assert torch.Size((3, 4)) not in packed


def test_in_place_change_of_a_kept_tensor_is_caught():
    layer, x = replaced(nn.Linear(4, 4)), torch.randn(3, 4)
    loss = layer(x).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    "case", ["linear tokens", "conv 3x3", "conv stride dilation groups", "batch norm", "layer norm"]
)
def test_gradcheck(case):
    layer, shape = CASES[case]
    ours = replaced(copy.deepcopy(layer).double())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = tuple(ours.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: ours(x), (x, *parameters))
