"""The layers a method puts in place of stock ones: same forward output, same parameters, less kept for backward.

Each is a subclass of its stock layer with one autograd.Function. What a layer keeps of its input is decided by a Codec;
masks and window offsets are exact and need none. Everything kept goes through save_for_backward, so in-place changes are caught and
saved-tensor hooks see it. Where nothing has to be kept (no_grad, frozen weights) the stock layer runs.

Under autocast inputs are cast before they are kept (bf16 stays bf16) and parameters are cast again in the backward pass
instead of keeping the cast copy.

FUNCTIONS maps a stock layer to the function that its subclasses call (F.conv2d in timm's weight-standardised convolutions), and to our
form of it: such a subclass keeps its own forward, and the call in it is ours.
"""

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

# Layers that need no codec, with the names of their functional forms: masks of one bit, window offsets of one byte, or nothing.
EXACT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("relu", "relu_"),
    nn.LeakyReLU: ("leaky_relu", "leaky_relu_"),
    nn.ReLU6: ("relu6",),
    nn.Hardtanh: ("hardtanh", "hardtanh_"),
    nn.Hardsigmoid: ("hardsigmoid",),
    nn.Dropout: ("dropout",),
    nn.MaxPool2d: ("max_pool2d",),
    nn.AvgPool2d: ("avg_pool2d",),
}
FUNCTIONS: dict[type[nn.Module], tuple[str, Callable]] = {
    nn.Linear: ("linear", linear),
    nn.Conv1d: ("conv1d", conv1d),
    nn.Conv2d: ("conv2d", conv2d),
    nn.Conv3d: ("conv3d", conv3d),
    nn.BatchNorm1d: ("batch_norm", batch_norm),
    nn.BatchNorm2d: ("batch_norm", batch_norm),
    nn.BatchNorm3d: ("batch_norm", batch_norm),
    nn.LayerNorm: ("layer_norm", layer_norm),
    nn.GroupNorm: ("group_norm", group_norm),
    nn.RMSNorm: ("rms_norm", rms_norm),
}

__all__ = [
    "ELU",
    "EXACT",
    "FUNCTIONS",
    "GELU",
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
    "tanh",
    "tanh_",
]
