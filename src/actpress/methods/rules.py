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
CURVED = (nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Mish, nn.Softplus)
EXACT = (
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid),
    *(nn.Dropout, nn.MaxPool2d, nn.AvgPool2d),
)


def with_codec(stock: tuple[type[nn.Module], ...], codec: Codec | None) -> Rules:
    """Each of the stock types becomes its layer, with this codec."""
    return {layer: Replacement(getattr(layers, layer.__name__), codec) for layer in stock}


def exact() -> Rules:
    """Masks and offsets instead of tensors."""
    return with_codec(EXACT, None)


def exact_functions() -> dict[str, Callable]:
    """The functional forms of the same."""
    names = ("relu", "relu_", "leaky_relu", "relu6", "hardtanh", "hardsigmoid", "dropout", "max_pool2d", "avg_pool2d")
    return {name: getattr(layers, name) for name in names}


def curved_functions(codec: Codec) -> dict[str, Callable]:
    """The functional forms of CURVED."""
    return {name: partial(getattr(layers, name), codec=codec) for name in map(_lower, CURVED)}


def _lower(layer: type[nn.Module]) -> str:
    return layer.__name__.lower()
