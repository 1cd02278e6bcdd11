"""Codecs: their bytes are what they say, and what holds for all of them stands in keep."""

import math
from dataclasses import dataclass

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import actpress
from actpress import layers
from actpress.codec import Codec, Context, Dense, Like, encoded, keep
from actpress.kernels.common.geometry import ConvGeometry
from actpress.methods import Division, FewBit, Inverted, Pooling, Quantize
from actpress.swap import Method, Replacement
from paths import CONFIGS

METHODS = {path.stem: hydra.utils.instantiate(OmegaConf.load(path)) for path in (CONFIGS / "method").glob("*.yaml")}
METHODS |= {
    "division, official": Division(align="authors"),
    "pooling 3, official": Pooling(block=3, align="authors"),
    "quantize groups": Quantize(grouping="group", size=32),
    "quantize normal": Quantize(levels="normal", bits=4),
}
CODECS = {
    f"{name}, {stock.__name__}": found.codec
    for name, method in METHODS.items()
    for stock, found in method.rules().items()
    if found.codec is not None
}
SHAPES = {"maps": (2, 5, 9, 14), "a pixel": (3, 4, 1, 1), "tokens": (2, 19, 33), "rows": (7, 48)}


def shapes_for(name: str, codec: Codec) -> list[str]:
    if not codec.derivative:
        return list(SHAPES)
    layer = layers.LAYERS[getattr(nn, name.rpartition(", ")[2])]
    return {"maps": ["maps", "a pixel"], "tokens": ["tokens"], "token norms": ["rows"]}.get(
        layer.kind, ["maps", "rows"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "shape"), [(n, s) for n, codec in CODECS.items() for s in shapes_for(n, codec)])
def test_nbytes_are_the_bytes_of_the_code(name, shape, dtype):
    codec, x = CODECS[name], torch.randn(SHAPES[shape]).to(dtype)
    if codec.derivative and not codec.is_smaller(Like.of(x)):
        return  # it is not encoded
    kept = codec.encode(x, Context(0)) if codec.derivative else codec.encode_activation(x, "gelu")
    assert sum(t.numel() * t.itemsize for t in kept) == codec.nbytes(Like.of(x))


@dataclass(frozen=True)
class Wide(Codec):
    """A code of fp64."""

    weight_grad_dtype: torch.dtype | None = None

    def nbytes(self, like: Like) -> int:
        return 8 * math.prod(like.shape)

    def encode(self, x, context):
        return (x.double(),)

    def decode(self, kept, like):
        return kept[0].to(like.dtype)


@dataclass(frozen=True)
class Halved(Wide):
    """A code of bf16."""

    def nbytes(self, like: Like) -> int:
        return 2 * math.prod(like.shape)

    def encode(self, x, context):
        return (x.bfloat16(),)


@pytest.mark.parametrize("shape", [(3, 5), (0, 5)], ids=["larger code", "empty"])
def test_what_no_code_makes_smaller_is_saved_as_it_is(shape):
    x = torch.randn(shape)
    kept, saved = encoded(Wide() if shape[0] else Halved(), x, None)
    assert saved[0] is x and kept.codec == Dense() and torch.equal(kept.decode(saved), x)


def test_one_tensor_is_encoded_once_for_two_layers_and_anew_for_a_second_pass():
    x, context = torch.randn(4, 6), Context(0)
    first, second, again = (keep(Halved(), x, context, x.dtype, x.shape, origin) for origin in ("a", "b", "a"))
    assert first[1][0] is second[1][0] and again[1][0] is not first[1][0]


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_weight_gradients_product_may_run_in_another_dtype(kind):
    x = torch.randn(3, 4, 8) if kind == "linear" else torch.randn(3, 4, 8, 8)
    dy = torch.randn(3, 4, 5) if kind == "linear" else torch.randn(3, 5, 6, 6)
    found = []
    for dtype in (None, torch.bfloat16):
        codec, like = Halved(dtype), Like.of(x)
        kept = codec.encode(x, None)
        geometry = ConvGeometry(torch.Size((5, 4, 3, 3)), (1, 1), (0, 0), (1, 1), 1)
        grad = (
            codec.linear_weight_grad(kept, like, dy)
            if kind == "linear"
            else codec.conv2d_weight_grad(kept, like, dy, geometry)
        )
        assert grad.dtype == (dtype or x.dtype)
        found.append(grad.float())
    assert (found[1] - found[0]).norm() / found[0].norm() < 2**-7  # dy and dW are rounded to bf16


@dataclass(frozen=True)
class HalfActivations(Method):
    def rules(self):
        return {
            stock: Replacement(layer, Halved())
            for stock, layer in layers.LAYERS.items()
            if layer.kind in ("gelu", "slopes")
        }


@pytest.mark.parametrize(
    "layer", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.SiLU(inplace=True), nn.Tanh(), nn.Mish()], ids=str
)
def test_any_codec_saves_the_derivative_of_an_activation(layer):
    x = torch.randn(64, 32)
    gradients = []
    for method in (None, HalfActivations()):
        net = nn.Sequential(layer, nn.Identity())
        if method:
            actpress.apply(net, method)
        leaf = x.clone().requires_grad_()
        y = net(leaf * 1)
        if method:
            kept = (
                [t for t in y.grad_fn.saved_tensors if t is not None and t.numel()]
                if not getattr(layer, "inplace", False)
                else []
            )
            assert all(t.dtype == torch.bfloat16 for t in kept)
        (y * x).sum().backward()
        gradients.append(leaf.grad)
        actpress.restore(net)
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 2**-8  # f'(x) is rounded to bf16


def test_the_codecs_of_few_bit_and_inverted_take_the_input_itself():
    assert not FewBit().codec.derivative and not Inverted().codec.derivative and Inverted().codec.keeps_output
