"""Tokens scaled to one size: a small one beside large ones keeps its share of a linear layer's weight gradient."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress.codec import Context, Kept, Like, encoded
from actpress.methods import Division, Quantize
from actpress.methods.quantize import QuantizeCodec
from actpress.methods.scaled_tokens import ScaledTokens

pytestmark = pytest.mark.filterwarnings("ignore:actpress.*saves:UserWarning")

METHODS = {
    "division": Division(),
    "quantize": Quantize(),
    "quantize, groups": Quantize(grouping="group"),
    "quantize, samples": Quantize(grouping="sample"),
}
NORMS = {"layer norm": nn.LayerNorm, "RMS norm": nn.RMSNorm}
CODEC = ScaledTokens(QuantizeCodec(2, "channel", 256, "stochastic"))


def like(x: torch.Tensor) -> Like:
    return Like(x.shape, x.dtype, False)


def round_trip(x: torch.Tensor, codec: ScaledTokens = CODEC) -> torch.Tensor:
    return codec.decode(codec.encode(x, Context(0)), like(x))


@pytest.mark.parametrize("least", [1.0, 0.1, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_the_weight_gradient_before_a_norm_holds_for_tokens_of_any_scale(method, norm, dtype, least):
    stock = nn.Sequential(nn.Linear(96, 48, bias=False), NORMS[norm](48)).to(dtype)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, METHODS[method])
    scales = torch.logspace(0, torch.tensor(least).log10().item(), 64).unsqueeze(1)
    x, dy = (torch.randn(8, 64, 96) * scales).to(dtype), torch.randn(8, 64, 48, dtype=dtype)
    for net in (stock, ours):
        net(x).backward(dy)
    exact, got = stock[0].weight.grad.float(), ours[0].weight.grad.float()
    assert 1 / 1.5 < got.norm() / exact.norm() < 1.5
    assert F.cosine_similarity(got.flatten(), exact.flatten(), dim=0) > 0.65  # of 2 bits at equal scales


def test_a_tokens_relative_error_is_that_of_the_others():
    x = torch.randn(4, 64, 96)
    small = x.clone()
    small[:, 0] *= 1e-3
    error = (round_trip(small) - small)[:, 0].norm() / small[:, 0].norm()
    assert error < 1.2 * (round_trip(x) - x)[:, 0].norm() / x[:, 0].norm()


def test_it_takes_two_bytes_a_token_more():
    x = torch.randn(4, 64, 96)
    kept, inner = (codec.encode(x, Context(0)) for codec in (CODEC, CODEC.codec))
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in inner) + 2 * 4 * 64


@pytest.mark.parametrize("shape", [(4, 1, 96), (4, 64, 1), (3, 2, 8)])
def test_it_is_dense_where_the_code_would_be_no_smaller(shape):
    x = torch.randn(shape, dtype=torch.bfloat16)
    kept, saved = encoded(CODEC, x, Context(0))
    assert saved[0] is x and torch.equal(kept.decode(saved), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_is_unbiased_and_of_the_inputs_dtype(dtype):
    x, context = (torch.randn(2, 32, 16) * torch.logspace(0, -3, 32).unsqueeze(1)).to(dtype), Context(0)
    found = [CODEC.decode(CODEC.encode(x, context), like(x)) for _ in range(400)]
    assert all(decoded.dtype == dtype for decoded in found)
    found = torch.stack(found).double()
    deviation = (found.mean(0) - x.double()).abs() / (found.std(0) / 20 + 4e-3 * x.double().abs() + 1e-7)
    assert deviation.max() < 6


def test_tokens_of_no_or_no_finite_size_stay_as_they_are():
    x = torch.randn(2, 32, 16)
    x[0, 3] = 0
    x[0, 4] = 1e-42
    assert (round_trip(x)[0, 3:5].abs() < 4).all() and round_trip(torch.zeros(2, 32, 16)).eq(0).all()
    x[1, 5, 7] = float("inf")
    x[1, 6, 8] = float("nan")
    decoded = round_trip(x)
    assert decoded[0].isfinite().all()
    assert decoded[1, :, [7, 8]].isnan().all()
    assert decoded[1, :, :7].isfinite().all()


def test_fp16_stays_finite():
    x = torch.full((2, 64, 32), 60000.0, dtype=torch.float16)
    x[:, ::2] = 65504
    x[:, :, ::3] *= -1
    decoded = round_trip(x)
    assert decoded.isfinite().all() and (decoded.float() - x.float()).abs().max() < 6000


def test_a_relu_mask_makes_exact_zeros():
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x, decoded = torch.randn(2, 200, 8), {}  # several blocks of means
    for masked in (False, True):
        actpress.apply(net, Division(lfc="always", relu_mask=masked))
        net(x)  # the first pass is watched
        hidden = net[1](net[0](x))
        y = net[2](hidden)  # held: up to PyTorch 2.11 what a node saved goes with the output
        codes = [t for t in y.grad_fn.saved_tensors if t.numel() and not isinstance(t, nn.Parameter)]
        decoded[masked] = Kept(net[2].codec, like(hidden), masked).decode(tuple(codes))
        actpress.restore(net)
    zero = hidden == 0
    assert decoded[True][zero].eq(0).all() and not decoded[False][zero].eq(0).all()
    assert torch.equal(decoded[True][~zero] != 0, decoded[False][~zero] != 0)
