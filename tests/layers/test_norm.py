"""Norms under the default settings: their gradients keep size and direction whatever the scale of a token or the mean of a channel."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import layers, measure
from actpress.codec import Context
from actpress.methods import Division, Quantize
from actpress.methods.quantize import token_norm_codec

pytestmark = pytest.mark.filterwarnings("ignore:actpress.*saves:UserWarning")  # tiny inputs

METHODS = {"division": Division(), "quantize": Quantize()}
DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
SCALES = (1, 0.3, 0.1, 0.03, 0.01, 0.001)

TOKEN_NORMS = {
    "layer norm": nn.LayerNorm,
    "layer norm, not affine": lambda width: nn.LayerNorm(width, elementwise_affine=False),
    "layer norm, no bias": lambda width: nn.LayerNorm(width, bias=False),
    "RMS norm": nn.RMSNorm,  # eps=None: that of the dtype it computes in
    "RMS norm, eps": lambda width: nn.RMSNorm(width, eps=1e-6),
}
MAP_NORMS = {  # name -> (norm of 6 channels, input)
    "batch norm of rows": (lambda: nn.BatchNorm1d(6), (64, 6)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (16, 6, 19)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(6), (8, 6, 11, 13)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(6), (4, 6, 5, 6, 7)),
    "batch norm 2d, not affine": (lambda: nn.BatchNorm2d(6, affine=False), (8, 6, 11, 13)),
    "batch norm 2d, cumulative": (lambda: nn.BatchNorm2d(6, momentum=None), (8, 6, 11, 13)),
    "batch norm 2d, no statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (8, 6, 11, 13)),
    "batch norm 2d, small maps": (lambda: nn.BatchNorm2d(6), (32, 6, 3, 2)),
    "group norm": (lambda: nn.GroupNorm(3, 6), (8, 6, 11, 13)),
    "group norm, one group": (lambda: nn.GroupNorm(1, 6), (8, 6, 11, 13)),
    "group norm, not affine": (lambda: nn.GroupNorm(2, 6, affine=False), (8, 6, 17)),
}


def with_random_weights(norm, dtype):
    net = nn.Sequential(norm).to(dtype)
    for p in net.parameters():
        nn.init.normal_(p)
    return net


def run(net, x):
    """(output, {name: gradient}) under an upstream gradient that depends on the output, so that weight gradients are no mere noise."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = net(leaf)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(7))
    y.backward((noise + 0.25 * y.detach().float() / y.detach().float().std()).to(y.dtype))
    return y.detach(), {"dx": leaf.grad.float(), **{name: p.grad.float() for name, p in net.named_parameters()}}


def assert_size_and_direction(expected, got, cosine=0.9):
    for name, exact in expected.items():
        ratio = (got[name].norm() / exact.norm()).item()
        direction = F.cosine_similarity(got[name].flatten(), exact.flatten(), dim=0).item()
        assert 1 / 1.5 < ratio < 1.5, f"{name}: {ratio:.3g} times the exact size"
        assert direction > cosine, f"{name}: cosine {direction:.3f}"


def applied(stock, method):
    ours = copy.deepcopy(stock)
    actpress.apply(ours, METHODS[method])
    return ours


@pytest.mark.quick(20)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("width", [5, 64, 768])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", TOKEN_NORMS)
def test_a_small_token_beside_large_ones_keeps_its_gradient(norm, dtype, width, method):
    stock = with_random_weights(TOKEN_NORMS[norm](width), dtype)
    ours = applied(stock, method)
    x = torch.randn(2, 33, width)
    for scale in SCALES:
        tokens = torch.cat([scale * x[:, :1], x[:, 1:]], 1).to(dtype)
        stock.zero_grad()
        ours.zero_grad()
        (y_stock, exact), (y, got) = run(stock, tokens), run(ours, tokens)
        assert torch.equal(y, y_stock)
        exact["dx of the token"], got["dx of the token"] = exact["dx"][:, 0], got["dx"][:, 0]
        assert_size_and_direction(exact, got, cosine=0.98)  # 4 bits at least


@pytest.mark.quick(30)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("evaluation", [False, True], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", MAP_NORMS)
def test_a_channel_far_from_zero_keeps_its_gradient(norm, dtype, evaluation, method):
    build, shape = MAP_NORMS[norm]
    direction = torch.randn(1, 6, *(1 for _ in shape[2:]))
    for deviations in (0, 1, 30, 1000):
        x = (torch.randn(shape) + deviations * direction).to(dtype)
        stock = with_random_weights(build(), torch.float32)
        if evaluation:
            stock(x.float())  # running statistics near the batch's
            stock(x.float())
            stock.eval()
        stock.to(dtype)
        ours = applied(stock, method)
        (y_stock, exact), (y, got) = run(stock, x), run(ours, x)
        assert torch.equal(y, y_stock)
        assert_size_and_direction(exact, got)
        for (name, buffer), expected in zip(ours.named_buffers(), stock.buffers(), strict=True):
            assert torch.equal(buffer, expected), name


@pytest.mark.parametrize("method", METHODS)
def test_running_statistics_are_those_of_stock_over_several_passes(method):
    stock = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.BatchNorm1d(3), nn.BatchNorm1d(3, momentum=1.0))
    ours = applied(stock, method)
    for _ in range(4):
        x = 10 * torch.randn(4, 3, 9) - 5
        ours(x.clone().requires_grad_())
        stock(x)
    assert ours[0].num_batches_tracked == 4
    for (name, buffer), expected in zip(ours.named_buffers(), stock.buffers(), strict=True):
        assert torch.equal(buffer, expected), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", TOKEN_NORMS)
def test_the_gradient_of_a_residual_is_left_as_it_is(norm, method):
    """y = x + norm(x) hands one gradient to both branches: the norm's backward may not write into it, nor be hurt by one of no memory."""
    ours = applied(with_random_weights(TOKEN_NORMS[norm](64), torch.float32), method)
    x = torch.randn(3, 17, 64)

    def gradient(dy):
        leaf = x.clone().requires_grad_()
        (leaf + copy.deepcopy(ours)(leaf)).backward(dy)
        return leaf.grad

    dy = torch.randn_like(x)
    before, got = dy.clone(), gradient(dy)
    assert torch.equal(dy, before)
    assert torch.equal(got, gradient(before))
    ones = torch.ones(())
    torch.testing.assert_close(gradient(ones.expand_as(x)), gradient(torch.ones_like(x)))
    assert ones == 1


KEPT = {  # norm -> (layer, input, most bytes for an element under the default methods: 4 bits for tokens, 2 for maps, and their bounds)
    "layer norm": (nn.LayerNorm(768), (2, 33, 768), 0.52),
    "layer norm of two axes": (nn.LayerNorm((33, 96)), (4, 33, 96), 0.52),
    "RMS norm": (nn.RMSNorm(768), (2, 33, 768), 0.52),
    "batch norm 1d": (nn.BatchNorm1d(6), (16, 6, 190), 0.32),
    "batch norm 2d": (nn.BatchNorm2d(6), (8, 6, 21, 33), 0.32),
    "batch norm 2d, channels_last": (nn.BatchNorm2d(6), (8, 6, 21, 33), 0.32),
    "batch norm 3d": (nn.BatchNorm3d(6), (4, 6, 5, 12, 17), 0.32),
    "group norm": (nn.GroupNorm(3, 6), (8, 6, 21, 33), 0.32),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", KEPT)
def test_what_is_kept_are_codes(norm, dtype, method):
    layer, shape, most = KEPT[norm]
    ours = applied(nn.Sequential(copy.deepcopy(layer)).to(dtype), method)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    if "channels_last" in norm:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    assert 0 < measure.saved_bytes(lambda: ours(x).sum()) <= most * x.numel()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["batch norm 2d", "batch norm 2d, not affine"])
def test_batch_norm_in_eval_with_frozen_weights_keeps_no_map(norm, method):
    build, shape = MAP_NORMS[norm]
    ours = applied(nn.Sequential(build()), method).eval().requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    assert measure.saved_bytes(lambda: ours(x).sum()) < x.numel() // 10


def functions():
    keeping = {"codec": Division(bits=8).rules()[nn.BatchNorm2d].codec, "context": Context(0)}
    rows = {"codec": token_norm_codec(8), "context": Context(0)}
    w, b = torch.rand(6) + 0.5, torch.randn(6)
    return {
        "layer_norm": (F.layer_norm, layers.layer_norm, rows, (5, 33, 6), ((6,), w, b, 1e-3)),
        "layer_norm of two axes": (F.layer_norm, layers.layer_norm, rows, (5, 33, 6), ((33, 6),)),
        "rms_norm": (F.rms_norm, layers.rms_norm, rows, (5, 33, 6), ((6,), w)),
        "rms_norm of a list": (F.rms_norm, layers.rms_norm, rows, (5, 33, 6), ([33, 6],)),
        "group_norm": (F.group_norm, layers.group_norm, keeping, (5, 6, 17, 9), (2, w, b, 1e-3)),
        "group_norm without weights": (F.group_norm, layers.group_norm, keeping, (5, 6, 17), (3,)),
        "batch_norm": (F.batch_norm, layers.batch_norm, keeping, (5, 6, 17, 9), (None, None, w, b, True)),
        "batch_norm with statistics": (F.batch_norm, layers.batch_norm, keeping, (5, 6, 70), (b, w, w, b, False)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", functions())
def test_functional_forms_equal_stock(name, dtype):
    stock, ours, keeping, shape, arguments = functions()[name]
    arguments = [a.to(dtype) if isinstance(a, torch.Tensor) else a for a in arguments]
    x = 3 * torch.randn(shape, dtype=dtype) + 2
    (y_stock, exact), (y, got) = run_function(stock, x, arguments), run_function(ours, x, arguments, **keeping)
    assert torch.equal(y, y_stock)
    for i, (gradient, expected) in enumerate(zip(got, exact, strict=True)):
        # 8 bits of a range of about 7 deviations: a step of .027, an error of .01
        assert (gradient - expected).norm() < 0.02 * expected.norm(), f"gradient {i}"


def run_function(function, x, arguments, **keeping):
    leaf = x.clone().requires_grad_()
    arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    # in these signatures weight and bias are the last two tensors
    trained = [a.requires_grad_() for a in arguments if isinstance(a, torch.Tensor)][-2:]
    for a in arguments:
        if isinstance(a, torch.Tensor) and not any(a is t for t in trained):
            a.requires_grad_(False)
    y = function(leaf, *arguments, **keeping)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y)
    y.backward(noise + y.detach() / y.detach().std())
    return y.detach(), [leaf.grad, *(t.grad for t in trained)]


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width, norm):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Six blocks that read a class token 50 times smaller than the patches beside it, as vision transformers begin."""

    def __init__(self, norm, width=48):
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, norm) for _ in range(6)))
        self.norm, self.head = norm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1)
        return self.head(self.norm(self.blocks(x))[:, 0])


def total_gradient(net, x, labels):
    net.zero_grad()
    y = net(x)
    F.cross_entropy(getattr(y, "logits", y), labels).backward()
    return {"the total gradient": torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm], ids=["layer norms", "RMS norms"])
def test_errors_do_not_grow_over_the_depth_of_a_transformer(norm, method):
    stock, x, labels = Transformer(norm), torch.randn(4, 49, 48), torch.randint(10, (4,))
    ours = applied(stock, method)
    assert_size_and_direction(total_gradient(stock, x, labels), total_gradient(ours, x, labels), cosine=0.85)


@pytest.mark.parametrize("method", METHODS)
def test_a_vision_transformer_at_its_initial_weights_keeps_its_gradient(method):
    transformers = pytest.importorskip("transformers", reason="needs the extra `text`")
    config = transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    stock, x, labels = transformers.ViTForImageClassification(config), torch.randn(4, 3, 32, 32), torch.arange(4)
    ours = applied(stock, method)
    assert_size_and_direction(total_gradient(stock, x, labels), total_gradient(ours, x, labels), cosine=0.8)


HALF_NORMS = {
    "layer norm": (lambda: nn.LayerNorm(8), (64, 8)),
    "RMS norm": (lambda: nn.RMSNorm(8), (64, 8)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (4, 6, 11, 13)),
    "batch norm, eval": (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 11, 13)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (4, 6, 11, 13)),
}


@pytest.mark.parametrize("norm", HALF_NORMS)
@pytest.mark.parametrize("method", METHODS)
def test_fp16_inputs_whose_differences_fp16_cannot_hold(method, norm):
    make, shape = HALF_NORMS[norm]
    stock = nn.Sequential(make())
    for name, buffer in stock.named_buffers():
        buffer.fill_({"0.running_mean": -15000, "0.running_var": 60000}.get(name, 0))
    stock.train(stock[0].training).half()
    ours, x = copy.deepcopy(stock), torch.where(torch.rand(shape) < 0.1, 60000.0, -15000.0).half()
    actpress.apply(ours, METHODS[method])
    for net in (stock, ours):
        leaf = x.clone().requires_grad_()
        net(leaf).float().div(100).pow(3).sum().backward()
        gradients = [leaf.grad, *(p.grad for p in net.parameters())]
        if net is stock:
            expected = gradients
    for i, (got, gradient) in enumerate(zip(gradients, expected, strict=True)):
        assert got.isfinite().equal(gradient.isfinite()), f"gradient {i}"
    assert F.cosine_similarity(got.float().flatten(), gradient.float().flatten(), dim=0) > 0.99


@pytest.mark.parametrize("size", [1, 16])
@pytest.mark.parametrize(
    "method",
    [Division(), Quantize(), Division(align="authors"), Quantize(levels="normal")],
    ids=lambda method: actpress.swap.label(method),
)
def test_fp16_evaluation_with_a_small_variance(method, size):
    """1 / variance is more than fp16 can hold. dx is exact."""
    stock = nn.Sequential(nn.BatchNorm2d(4))
    stock[0].running_var.fill_(1e-6)
    stock.eval().half()
    ours, x = copy.deepcopy(stock), (torch.randn(2, 4, size, size) * 1e-3).half()
    actpress.apply(ours, method)
    found = []
    for net in (stock, ours):
        leaf = x.clone().requires_grad_()
        net(leaf).float().sum().backward()
        found.append((leaf.grad, net[0].weight.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-3, atol=0)  # fp16 has 11 bits
    assert found[1][1].isfinite().all()


def test_batch_norm_refuses_what_stock_refuses():
    stock, x = nn.Sequential(nn.BatchNorm2d(4, eps=0.0)), torch.randn(2, 4, 5, 5)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, Division())
    try:
        stock(x)
    except (RuntimeError, ValueError) as error:  # so torch 2.14
        with pytest.raises(type(error)) as found:
            ours(x)
        assert str(found.value) == str(error)
    else:
        assert torch.equal(ours(x), stock(x))
