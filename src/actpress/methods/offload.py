"""Offloading: what the graph saves lies in the host's memory until the backward pass reads it.

The idea: torch.autograd.graph.save_on_cpu copies every saved tensor to the host and back. We save

    every saved tensor, copies of parameters included     0 bytes on the device, all of its bytes on the host

Gradients are exact. A step costs the time of two copies of all that is saved, which pinned memory lets overlap with nothing but each other:
save_on_cpu waits for each. On a CPU the tensors are there already, and nothing is copied.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from actpress.kernels.common import check
from actpress.swap import Around, Method


@dataclass(frozen=True)
class OnHost:
    """Runs a forward pass whose saved tensors go to the host, to pinned memory if there is a CUDA device and `pin`."""

    pin: bool

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with save_on_cpu(pin_memory=self.pin and torch.cuda.is_available()):
            return forward(*args, **kwargs)


@dataclass(frozen=True)
class Offload(Method):
    """Offloading of all that the model saves.

    pin: copy to pinned memory, which is several times as fast and cannot be swapped out; without a CUDA device there is none.
    Raises ValueError on other values.
    """

    pin: bool = True

    def __post_init__(self):
        check.one_of(self, pin=(True, False))

    def plan(self, model: nn.Module) -> Sequence[Around]:
        return [Around("", OnHost(self.pin))]
