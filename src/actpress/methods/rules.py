"""Rules that several methods share: layers whose gradient is exact from less, and the groups of layers that a codec goes with."""

from collections.abc import Callable
from functools import partial

from torch import nn

from actpress import layers
from actpress.codec import Codec
from actpress.swap import Replacement

Rules = dict[type[nn.Module], Replacement]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
TOKEN_NORMS = (nn.LayerNorm, nn.RMSNorm)  # a token each
SMOOTH = (nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Mish, nn.Softplus)


def with_codec(stock: tuple[type[nn.Module], ...], codec: Codec | None) -> Rules:
    """Each of the stock types becomes its layer, with this codec."""
    return {layer: Replacement(getattr(layers, layer.__name__), codec) for layer in stock}


def exact(but: tuple[type[nn.Module], ...] = ()) -> Rules:
    """Masks and offsets instead of tensors, but for some layers."""
    return with_codec(tuple(layer for layer in layers.EXACT if layer not in but), None)


def exact_functions(but: tuple[type[nn.Module], ...] = ()) -> dict[str, Callable]:
    """The functional forms of the same."""
    return {name: getattr(layers, name) for layer in layers.EXACT if layer not in but for name in layers.EXACT[layer]}


def all_layers(maps: Codec, linear: Codec, token_norms: Codec, smooth: Codec) -> Rules:
    """Every layer that keeps something: inputs of convolutions and norms of maps, of linear layers and of norms of tokens, and the
    derivatives of smooth activations, each by its codec; the others exact from masks."""
    return {
        **with_codec((*CONVOLUTIONS, *BATCH_NORMS, nn.GroupNorm), maps),
        **with_codec((nn.Linear,), linear),
        **with_codec(TOKEN_NORMS, token_norms),
        **with_codec(SMOOTH, smooth),
        **exact(),
    }


def all_functions(smooth: Codec) -> dict[str, Callable]:
    """The functional forms of exact and smooth activations, of dropout and of pooling."""
    names = (*(layer.__name__.lower() for layer in SMOOTH), "sigmoid_", "tanh_", "elu_")
    return exact_functions() | {name: partial(getattr(layers, name), codec=smooth) for name in names}
