"""The three kinds of edit that a method's plan is made of; `apply` executes them.

    Swap      a module changes class: its layer saves its input by a codec, or exactly from less
    Around    something runs around a module's forward: checkpointing, hooks on saved tensors, a mode that replaces functions
    Graph     a module is compiled in place; the backend sees, and may rewrite, the graph of its forward and backward pass

name: of the module, as in model.named_modules(); "" is the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from actpress.codec import Codec


@dataclass(frozen=True)
class Swap:
    """The module becomes a `layer`; parameters, buffers, hooks and the object itself stay."""

    name: str
    layer: type[nn.Module]
    codec: Codec | None = None  # None: the layer needs none, see layers.EXACT
    start_epoch: int = 0  # the codec's first epoch, see set_epoch; until then the layer saves its input dense
    library: Any = None  # what a layer of a library needs to know beside the codec, see swap/libraries.py


@dataclass(frozen=True)
class Around:
    """The module's forward runs as call(forward, *args, **kwargs), in training and wherever else gradients are recorded.

    call: a function, or a frozen dataclass so that the model can be copied and pickled. torch.utils.checkpoint.checkpoint is one. Of
    several around one module, the later ones run outside; functions are replaced inside of all.
    """

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class Graph:
    """The module is compiled in place, by nn.Module.compile, with this backend: a function of (torch.fx.GraphModule, inputs) that returns
    what computes the same, as torch.compile takes it. Copies of the model are not compiled."""

    name: str
    backend: Callable[..., Any]


Edit = Swap | Around | Graph
