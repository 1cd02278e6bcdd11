"""The method of plain group quantisation: its fixed levels, what it keeps, what it refuses."""

import copy

import pytest
import torch
from torch import nn

import actpress
from actpress import measure
from actpress.codec import Dense, encoded
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.lloyd_max import normal_levels
from actpress.methods import Quantize
from actpress.methods.quantize import NormalCodec, QuantizeCodec
from actpress.methods.scaled_tokens import ScaledTokens


def convnet():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def test_normal_levels_are_for_batch_norms_alone():
    net = nn.Sequential(convnet(), nn.Linear(9, 9), nn.LayerNorm(9))
    actpress.apply(net, Quantize(levels="normal"))
    kinds = {type(module).__name__: type(module.codec) for module in net.modules() if hasattr(module, "codec")}
    assert kinds.pop("BatchNorm2d") is NormalCodec
    assert kinds == {"Conv2d": QuantizeCodec, "Linear": ScaledTokens, "LayerNorm": QuantizeCodec}


@pytest.mark.parametrize("levels", ["affine", "normal"])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_saved_bytes_follow_the_formula(bits, levels):
    net, x = convnet(), torch.randn(3, 3, 9, 7)
    actpress.apply(net, Quantize(bits, levels=levels))
    expected = (
        packed_bytes(x.numel(), bits)
        + 4 * 3 * 3  # the first convolution, with two bf16 for each channel of each sample
        + packed_bytes(3 * 8 * 63, bits)
        + (8 * 8 if levels == "normal" else 4 * 3 * 8)  # the batch norm, with two fp32 for each channel,
        + 8 * 8  # its mean and inverse deviation
        + packed_bytes(3 * 8 * 63, 1)  # ReLU
        + packed_bytes(3 * 8 * 63, bits)
        + 4 * 3 * 8  # the last convolution
    )
    assert measure.saved_bytes(lambda: net(x).sum()) == expected


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (0, 5, 7, 7)], ids=["one pixel", "empty"])
def test_what_the_code_would_not_make_smaller_stays_dense(shape):
    codec, x = NormalCodec(normal_levels(4), "nearest"), torch.randn(shape)
    kept, saved = encoded(codec, x, None)
    assert saved[0] is x and kept.codec == Dense()


def test_normal_levels_keep_the_gradients_of_normal_values_better():
    """Round to nearest at 2 bits: an even grid from the least to the greatest value has long steps where most values are."""
    stock, x = nn.BatchNorm2d(6), torch.randn(8, 6, 28, 28)
    dy = torch.randn_like(x) * x  # of which the weight's gradient is far from zero
    errors = {}
    for levels in ("affine", "normal"):
        exact, ours = copy.deepcopy(stock), copy.deepcopy(stock)
        actpress.apply(ours, Quantize(rounding="nearest", levels=levels))
        pair = []
        for net in (exact, ours):
            leaf = x.clone().requires_grad_()
            net(leaf).backward(dy)
            pair.append(leaf.grad)
        errors[levels] = ((pair[1] - pair[0]).norm() / pair[0].norm()).item()
    assert 0 < errors["normal"] < errors["affine"]


def test_normal_levels_compile_in_one_graph():
    """The same gradients as in eager mode, up to rounding."""
    net, x = nn.BatchNorm2d(6), torch.randn(3, 6, 9, 7)
    actpress.apply(net, Quantize(rounding="nearest", levels="normal"))
    results = []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "bits=3, allowed: 1, 2, 4, 8"),
        ({"grouping": "row"}, "grouping='row', allowed: group, channel, sample"),
        ({"rounding": "down"}, "rounding='down', allowed: stochastic, nearest"),
        ({"size": 0}, "size=0, allowed: integers from 1 to 16384"),
        ({"levels": "lloyd"}, "levels='lloyd', allowed: affine, normal"),
        ({"levels": "normal", "bits": 8}, "bits=8, allowed with levels='normal': 1, 2, 4"),
        ({"relu_mask": "yes"}, "relu_mask='yes', allowed: True, False"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_bad_arguments_name_the_value_and_the_allowed_ones(arguments, message):
    with pytest.raises(ValueError) as error:
        Quantize(**arguments)
    assert str(error.value) == f"Quantize: {message}"
