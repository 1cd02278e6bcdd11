"""Rules that several methods share: layers whose gradient is exact from less, and the groups of layers that a codec goes with."""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from actpress.codec import Codec
from actpress.layers import EXACT, LAYERS, activation, functions_of
from actpress.swap import Method, Replacement

Rules = dict[type[nn.Module], Replacement]


def with_codec(stock: tuple[type[nn.Module], ...], codec: Codec | None) -> Rules:
    """Each of the stock types becomes its layer, with this codec."""
    return {layer: Replacement(LAYERS[layer], codec) for layer in stock}


def of_kind(kind: str, codec: Codec | None) -> Rules:
    """Every layer of a kind (Layer.kind), with this codec."""
    return {stock: Replacement(layer, codec) for stock, layer in LAYERS.items() if layer.kind == kind}


def exact(but: tuple[type[nn.Module], ...] = ()) -> Rules:
    """Masks and offsets instead of tensors, but for some layers."""
    return with_codec(tuple(layer for layer in EXACT if layer not in but), None)


def exact_functions(but: tuple[type[nn.Module], ...] = ()) -> dict[str, Callable]:
    """The functional forms of the same."""
    return {name: ours for stock in EXACT if stock not in but for name, ours in functions_of(LAYERS[stock]).items()}


def functions_with(kind: str, codec: Codec) -> dict[str, Callable]:
    """The functional forms of every layer of a kind, with this codec."""
    layers = [layer for layer in LAYERS.values() if layer.kind == kind]
    return {name: partial(ours, codec=codec) for layer in layers for name, ours in functions_of(layer).items()}


def all_layers(maps: Codec, tokens: Codec, token_norms: Codec, slopes: Codec) -> Rules:
    """Every layer but GELU and its kin, each kind by its codec; the others exact from masks."""
    kinds = {"maps": maps, "tokens": tokens, "token norms": token_norms, "slopes": slopes, "exact": None}
    return {stock: found for kind, codec in kinds.items() for stock, found in of_kind(kind, codec).items()}


def all_functions(slopes: Codec) -> dict[str, Callable]:
    """The functional forms of exact and smooth activations, of dropout and of pooling."""
    return exact_functions() | functions_with("slopes", slopes)


class ActivationMethod(Method):
    """Base of methods for GELU, SiLU and their kin, in PyTorch, timm and transformers: each is saved by `codec`."""

    codec: Codec

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        return of_kind("gelu", self.codec)

    def functions(self) -> Mapping[str, Callable]:
        return functions_with("gelu", self.codec)

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        layer = activation.layer_for(module)
        return None if layer is None else Replacement(layer, self.codec)
