"""The layers a method puts in place of stock ones: same forward output, same parameters, fewer bytes saved for backward.

Each is a subclass of its stock layer with one autograd.Function, written once for all codecs. A Codec decides how a layer saves its input;
masks and window offsets are exact and need none. Everything saved goes through save_for_backward, so in-place changes are caught and
saved-tensor hooks see it. Where nothing has to be saved (no_grad, frozen weights) the stock layer runs.

Under autocast inputs are cast before they are saved (bf16 stays bf16), and parameters are cast again in the backward pass instead of saving
the cast copy.

LAYERS holds all layers by their stock type. It is made of the files of this folder: a new file joins by itself, and so do the methods that
go by the kind of a layer (Layer.kind).
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable

from torch import nn

from actpress.layers.activation import (
    ELU,
    GELU,
    Hardswish,
    Mish,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
    elu,
    elu_,
    gelu,
    hardswish,
    mish,
    sigmoid,
    sigmoid_,
    silu,
    softplus,
    tanh,
    tanh_,
)
from actpress.layers.base import Extended, Layer, Mixed, extend, needs_grad, records
from actpress.layers.conv import Conv1d, Conv2d, Conv3d, conv1d, conv2d, conv3d
from actpress.layers.exact import (
    AvgPool2d,
    Dropout,
    Hardsigmoid,
    Hardtanh,
    LeakyReLU,
    MaxPool2d,
    ReLU,
    ReLU6,
    avg_pool2d,
    dropout,
    hardsigmoid,
    hardtanh,
    hardtanh_,
    leaky_relu,
    leaky_relu_,
    max_pool2d,
    relu,
    relu6,
    relu_,
)
from actpress.layers.matmul import Linear, addmm, linear
from actpress.layers.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    LayerNorm,
    batch_norm,
    group_norm,
    layer_norm,
)
from actpress.layers.rms_norm import LibraryRMSNorm, RMSNorm, rms_norm


def _layers() -> dict[type[nn.Module], type[Layer]]:
    """Stock type -> its layer, of every file in this folder."""
    files = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    own = [(file, cls) for file in files for cls in vars(file).values() if isinstance(cls, type)]
    made = [cls for file, cls in own if cls.__module__ == file.__name__ and issubclass(cls, Layer) and cls.kind]
    return {stock_type(cls): cls for cls in made if issubclass(cls, nn.Module)}


def stock_type(layer: type[Layer]) -> type[nn.Module]:
    """The stock type that a layer takes the place of."""
    return next(base for base in layer.__mro__ if base.__module__.startswith("torch."))


def functions_of(layer: type[Layer]) -> dict[str, Callable]:
    """The functional forms of a layer, by name."""
    return {name: getattr(sys.modules[layer.__module__], name) for name in layer.functional}


LAYERS = _layers()
EXACT = tuple(stock for stock, layer in LAYERS.items() if layer.kind == "exact")  # they need no codec

__all__ = [
    "ELU",
    "EXACT",
    "GELU",
    "LAYERS",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Dropout",
    "Extended",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "LibraryRMSNorm",
    "Linear",
    "MaxPool2d",
    "Mish",
    "Mixed",
    "RMSNorm",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
    "addmm",
    "avg_pool2d",
    "batch_norm",
    "conv1d",
    "conv2d",
    "conv3d",
    "dropout",
    "elu",
    "elu_",
    "extend",
    "functions_of",
    "gelu",
    "group_norm",
    "hardsigmoid",
    "hardswish",
    "hardtanh",
    "hardtanh_",
    "layer_norm",
    "leaky_relu",
    "leaky_relu_",
    "linear",
    "max_pool2d",
    "mish",
    "needs_grad",
    "records",
    "relu",
    "relu6",
    "relu_",
    "rms_norm",
    "sigmoid",
    "sigmoid_",
    "silu",
    "softplus",
    "stock_type",
    "tanh",
    "tanh_",
]
