"""Layers of other libraries and of users: their own forward to the bit, our gradients, less kept, and the way back."""

import copy
import importlib
import io
import pickle

import pytest
import torch
import torchvision
from timm import layers as timm_layers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import actpress
from actpress import measure
from actpress.methods import BlockPruning, Division, Pooling, Quantize
from actpress.swap.libraries import NEVER_CALLED

pytestmark = pytest.mark.filterwarnings("ignore:actpress.*saves:UserWarning", "ignore:Using padding='same':UserWarning")

METHODS = {"division": Division(bits=8), "quantize": Quantize(bits=8)}


class Scaled(nn.Linear):
    """A linear layer that does something else before and after."""

    def forward(self, x, shift=1.0):
        return 2 * F.linear(x, self.weight / 2, self.bias) + shift


class Centred(nn.Conv2d):
    """A convolution that computes its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Rectified(nn.Conv2d):
    """A convolution with a function that has a rule, too."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Named(nn.Linear):
    """A subclass without a forward of its own."""


class RMSNorm(nn.Module):
    """The usual formula, written out; options change it."""

    def __init__(self, width, centred=False, largest=None):
        super().__init__()
        self.weight, self.eps, self.centred, self.largest = nn.Parameter(torch.ones(width)), 1e-6, centred, largest

    def forward(self, x):
        normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        normal = normal if self.largest is None else normal.clamp(-self.largest, self.largest)
        return normal * (self.weight + 1 if self.centred else self.weight)


def transformers_class(name):
    module, name = name.rsplit(".", 1)
    pytest.importorskip("transformers", reason="needs the extra `text`")
    return getattr(importlib.import_module(f"transformers.{module}"), name)


MAPS, TOKENS = (4, 6, 17, 13), (4, 9, 64)
CASES = {  # name -> (builds the layer, its input, at least so many times fewer bytes than stock)
    "timm BatchNormAct2d": (lambda: timm_layers.BatchNormAct2d(6), MAPS, 6),
    "timm BatchNormAct2d, eval": (lambda: timm_layers.BatchNormAct2d(6).eval(), MAPS, 6),
    "timm BatchNormAct2d, SiLU": (lambda: timm_layers.BatchNormAct2d(6, act_layer=nn.SiLU), MAPS, 1.5),
    "timm GroupNorm": (lambda: timm_layers.GroupNorm(6, 3), MAPS, 3.5),
    "timm GroupNorm1": (lambda: timm_layers.GroupNorm1(6), MAPS, 3.5),
    "timm GroupNormAct": (lambda: timm_layers.GroupNormAct(6, 3), MAPS, 6),
    "timm LayerNorm": (lambda: timm_layers.LayerNorm(64), TOKENS, 3.5),
    "timm LayerNormAct": (lambda: timm_layers.LayerNormAct(64), TOKENS, 6),
    "timm LayerNorm2d": (lambda: timm_layers.LayerNorm2d(64), (4, 64, 7, 5), 3.5),
    "timm LayerNormAct2d": (lambda: timm_layers.LayerNormAct2d(64), (4, 64, 7, 5), 6),
    "timm RmsNorm": (lambda: timm_layers.RmsNorm(64), TOKENS, 3.5),
    "timm StdConv2d": (lambda: timm_layers.StdConv2d(6, 8, 3, padding=1), MAPS, 3),
    "timm StdConv2dSame": (lambda: timm_layers.StdConv2dSame(6, 8, 3, stride=2), MAPS, 3),
    "timm ScaledStdConv2d": (lambda: timm_layers.ScaledStdConv2d(6, 8, 3, padding=1), MAPS, 3),
    "timm ScaledStdConv2dSame": (lambda: timm_layers.ScaledStdConv2dSame(6, 8, 3, stride=2), MAPS, 3),
    "timm Conv2dSame": (lambda: timm_layers.Conv2dSame(6, 8, 3, stride=2), MAPS, 3),
    "torchvision LayerNorm2d": (lambda: torchvision.models.convnext.LayerNorm2d(64), (4, 64, 7, 5), 3.5),
    "transformers Conv1D": (lambda: transformers_class("pytorch_utils.Conv1D")(48, 64), TOKENS, 3),
    "transformers LlamaRMSNorm": (
        lambda: transformers_class("models.llama.modeling_llama.LlamaRMSNorm")(64),
        TOKENS,
        3.5,
    ),
    "transformers GemmaRMSNorm": (
        lambda: transformers_class("models.gemma.modeling_gemma.GemmaRMSNorm")(64),
        TOKENS,
        3.5,
    ),
    "transformers T5LayerNorm": (lambda: transformers_class("models.t5.modeling_t5.T5LayerNorm")(64), TOKENS, 3.5),
    "user's linear": (lambda: Scaled(64, 48), TOKENS, 1.2),  # it keeps a computed weight, too
    "user's linear without a forward": (lambda: Named(64, 48), TOKENS, 2),
    "user's convolution": (lambda: Centred(6, 8, 3), MAPS, 3),
    "user's convolution and ReLU": (lambda: Rectified(6, 8, 3), MAPS, 6),
    "user's RMS norm": (lambda: RMSNorm(64), TOKENS, 3.5),
    "user's RMS norm, 1 + w": (lambda: RMSNorm(64, centred=True), TOKENS, 3.5),
    "lazy linear, after its first input": (lambda: nn.LazyLinear(48), TOKENS, 2),
}


def build(case):
    """(stock, an input)"""
    layer, shape, _ = CASES[case]
    stock = nn.Sequential(layer())
    stock.train(stock[0].training)
    x = torch.randn(shape)
    stock(x)  # lazy parameters
    for p in stock.parameters():
        nn.init.normal_(p, mean=0.5, std=0.5)
    return stock, x


def applied(stock, method):
    ours = copy.deepcopy(stock)
    return ours, actpress.apply(ours, method)


def run(net, x):
    """(output, gradients of input and parameters)"""
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    y = net(leaf * 1)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(noise + 0.3 * y.detach())
    return y.detach(), {"x": leaf.grad, **{name: p.grad for name, p in net.named_parameters()}}


def assert_near(got, expected):
    for name, gradient in expected.items():
        # 8 bits of a range of 6 to 8 deviations, stochastic: an error of .01 of the input's deviation in weight gradients
        assert (got[name] - gradient).norm() < 0.02 * gradient.norm(), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_forward_is_bit_identical_and_gradients_are_near(case, method):
    stock, x = build(case)
    ours, report = applied(stock, METHODS[method])
    assert report.replaced["0"][1] == f"actpress.{type(stock[0]).__name__}"
    (y_stock, expected), (y, got) = run(stock, x), run(ours, x)
    assert torch.equal(y, y_stock)
    assert_near(got, expected)
    for (name, buffer), stock_buffer in zip(ours.named_buffers(), stock.buffers(), strict=True):
        assert torch.equal(buffer, stock_buffer), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_fewer_bytes_are_kept(case, method):
    stock, x = build(case)
    ours, _ = applied(stock, METHODS[method])
    x.requires_grad_()
    before, after = (measure.saved_bytes(lambda net=net: net(x * 1).sum()) for net in (stock, ours))
    assert after * CASES[case][2] < before


@pytest.mark.parametrize("case", CASES)
def test_copies_pickles_and_state_dicts_survive(case):
    stock, x = build(case)
    ours, _ = applied(stock, Division(bits=8))
    assert list(ours.state_dict()) == list(stock.state_dict())
    stock.load_state_dict(ours.state_dict())
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    twins = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)]
    y, expected = run(ours, x)
    for twin in twins:
        assert isinstance(twin[0], type(stock[0]))
        y_twin, got = run(twin, x)
        assert torch.equal(y_twin, y)
        assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())  # the same noise
        actpress.restore(twin)
        assert type(twin[0]) is type(stock[0])


@pytest.mark.parametrize("case", CASES)
def test_restore_gives_the_stock_class_back(case):
    stock, x = build(case)
    ours, _ = applied(stock, Division())
    run(copy.deepcopy(ours), x)
    assert "0" in actpress.restore(ours)
    assert type(ours[0]) is type(stock[0])
    assert vars(ours[0]).keys() == vars(stock[0]).keys()
    (y_stock, expected), (y, got) = run(stock, x), run(ours, x)
    assert torch.equal(y, y_stock)
    assert all(torch.equal(got[name], gradient) for name, gradient in expected.items())


COMPILED = [
    "timm BatchNormAct2d",
    "timm ScaledStdConv2dSame",
    "transformers Conv1D",
    "transformers GemmaRMSNorm",
]


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", COMPILED)
def test_compiled(case):
    stock, x = build(case)
    ours, _ = applied(stock, Division(bits=8))
    torch._dynamo.reset()
    (y_stock, expected), (y, got) = run(stock, x), run(torch.compile(ours, backend="aot_eager"), x)
    torch.testing.assert_close(y, y_stock)  # decompositions round otherwise
    assert_near({name.removeprefix("_orig_mod."): gradient for name, gradient in got.items()}, expected)


class Absolute(RMSNorm):
    """Another norm."""

    def forward(self, x):
        return self.weight * x / x.abs().mean(-1, keepdim=True)


class Summed(RMSNorm):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().sum(-1, keepdim=True) + self.eps)


class HalvedInTraining(RMSNorm):
    def forward(self, x):
        return super().forward(x) * (0.5 if self.training else 1.0)


class OverChannels(RMSNorm):
    """Equal to the usual one for rows alone."""

    def forward(self, x):
        shape = (-1, *(1 for _ in x.shape[2:]))
        return self.weight.view(shape) * x * torch.rsqrt(x.square().mean(1, keepdim=True) + self.eps)


class WithGain(RMSNorm):
    """A second parameter, 1 at first."""

    def __init__(self, width):
        super().__init__(width)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gain * super().forward(x)


class WithoutEpsilon(RMSNorm):
    """It has the attribute, and leaves it unused."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True))


class Failing(RMSNorm):
    """It takes nothing but maps."""

    def forward(self, x):
        assert x.dim() == 4
        return super().forward(x)


OTHERS = {
    "absolute values": Absolute(16),
    "sum of squares": Summed(16),
    "halved in training": HalvedInTraining(16),
    "over channels": OverChannels(16),
    "second parameter": WithGain(16),
    "no epsilon": WithoutEpsilon(16),
    "clamped": RMSNorm(16, largest=3.5),
    "maps alone": Failing(16),
}
for norm in OTHERS.values():  # names alone must not decide
    type(norm).__name__ = "RMSNorm"


@pytest.mark.parametrize("case", OTHERS)
def test_an_rms_norm_of_another_formula_stays_dense(case):
    net = nn.Sequential(OTHERS[case], nn.Linear(16, 4))
    report = actpress.apply(net, Division())
    assert list(report.replaced) == ["1"]
    assert report.untouched["0"].endswith("RMSNorm untouched: no rule")


def test_the_trial_of_an_rms_norm_leaves_module_and_generator_alone():
    norm = RMSNorm(16).eval()
    norm.weight.data.fill_(3)
    norm.register_forward_hook(lambda *_: pytest.fail("the trial called a hook"))
    state = torch.get_rng_state()
    actpress.apply(nn.Sequential(norm), Division())
    assert torch.equal(torch.get_rng_state(), state)
    assert (norm.weight == 3).all() and not norm.training


def test_an_rms_norm_of_another_width_than_its_weight_stays_stock():
    norm, x = nn.Sequential(RMSNorm(1)), torch.randn(3, 8, requires_grad=True)
    actpress.apply(norm, Division())
    norm(x).sum().backward()
    assert norm[0].weight.grad.shape == (1,)


def test_multihead_attention_reads_the_weights_of_its_projection():
    stock = nn.Sequential(nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 2))
    ours, report = applied(stock, Division())
    assert type(ours[0].out_proj) in NEVER_CALLED
    assert "0.out_proj" not in report.replaced
    x = torch.randn(2, 5, 16)
    grads = []
    for net in (stock, ours):
        net[0](x, x, x)[0].square().sum().backward()
        grads.append([p.grad for p in net[0].parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_lazy_layers_are_left_alone_until_they_have_weights():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    report = actpress.apply(lazy, Division())
    assert list(report.replaced) == ["1"]
    for _ in range(2):  # the weights' first pass is not the one that is watched
        lazy(torch.randn(3, 8)).sum().backward()
    assert type(lazy[0]) is nn.Linear
    assert lazy[0].weight.grad.shape == (4, 8)


LOSSLESS = {  # methods for one type of layer, at a setting that loses nothing -> a subclass of that type
    "pooling": (Pooling(block=1), "timm StdConv2d"),
    "pooling, padded": (Pooling(block=1), "timm ScaledStdConv2dSame"),
    "pruning": (BlockPruning(sparsity=0.0, skip=()), "user's linear"),
    "pruning, Conv1D": (BlockPruning(sparsity=0.0, skip=()), "transformers Conv1D"),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_methods_for_one_type_of_layer_take_its_subclasses(name):
    method, case = LOSSLESS[name]
    stock, x = build(case)
    ours, report = applied(stock, method)
    assert "0" in report.replaced
    (y_stock, expected), (y, got) = run(stock, x), run(ours, x)
    assert torch.equal(y, y_stock)
    for parameter, gradient in expected.items():  # the same sums in another order
        torch.testing.assert_close(
            got[parameter], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, n=parameter: f"{n}: {m}"
        )


PARAMETRIZED = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(64, 48)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Conv2d(64, 8, 3)),  # its estimate moves with each look
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(64, 64)),
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_layers(name):
    stock = nn.Sequential(PARAMETRIZED[name]())
    ours, report = applied(stock, Division(bits=8))
    assert "0" in report.replaced
    x = torch.randn(2, 64, 9, 11) if name == "spectral norm" else torch.randn(4, 9, 64)
    for _ in range(2):  # the first pass is watched
        (y_stock, expected), (y, got) = run(stock, x), run(ours, x)
        assert torch.equal(y, y_stock)
        assert_near(got, expected)
    actpress.restore(ours)
    assert type(ours[0]).__mro__[1:] == type(stock[0]).__mro__[1:]


def test_keyword_arguments_of_a_users_forward():
    stock = Scaled(8, 4)
    ours, x = copy.deepcopy(stock), torch.randn(3, 8)
    actpress.apply(ours, Division())
    assert torch.equal(ours(x, shift=3.0), stock(x, shift=3.0))
    assert torch.equal(ours(x=x), stock(x=x))
