"""Warns where an activation saves its output and no other layer keeps that tensor too: there the method costs memory instead of saving it.

On the first training forward pass of the model every leaf module is watched for reading the storage of such an output. Those known to
save nothing of it for backward are named: dropout, frozen linear layers, layers with a compressing codec, layers that autocast hands a
copy. Then all hooks are gone. Of readers that are no modules (a gate that multiplies, a function) nothing is known and nothing is said.
Compiled code cannot be watched: under torch.compile the watch waits for a forward pass in eager mode.
"""

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from actpress.codec import Codec, Dense
from actpress.swap.first_pass import FirstPass

PASSING = (nn.Identity, nn.Flatten, nn.Unflatten)  # hand on the same memory and save nothing


class _Output(NamedTuple):
    name: str
    storage: StorageWeakRef


def watch(model: nn.Module) -> None:
    """Check, once, on the first training forward pass, that what the model's activations keep is saved by others too.

    Issues one UserWarning that names them.
    """
    _Sharing().attach(model)


class _Sharing(FirstPass):
    def __init__(self):
        super().__init__()
        self.outputs: dict[int, _Output] = {}
        self.readers: dict[str, list[str]] = {}  # activation -> why each of its readers saves nothing, "" if it does

    def start(self, model: nn.Module) -> None:
        for module in self.names:
            if next(module.children(), None) is None:
                self.during.append(module.register_forward_pre_hook(self.see_input, with_kwargs=True))
            if keeps_output(module):
                self.during.append(module.register_forward_hook(self.see_output))

    def see_output(self, module: nn.Module, args: Any, y: Tensor) -> None:
        if module in self.names and y.requires_grad:  # a model that is one activation has ended its pass by now
            self.outputs[_key(y)] = _Output(self.names[module], StorageWeakRef(y.untyped_storage()))

    def see_input(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        for x in (*args, *kwargs.values()):
            output = self.outputs.get(_key(x)) if isinstance(x, Tensor) else None
            if output is None or output.storage.expired() or isinstance(module, PASSING):
                continue
            why = why_not_kept(module, x)
            if why is not None:
                self.readers.setdefault(output.name, []).append(why and f"{self.names[module]!r} {why}")

    def finish(self, model: nn.Module, completed: bool) -> None:
        self.outputs = {}
        alone = [f"{name!r}: {'; '.join(whys)}" for name, whys in self.readers.items() if all(whys)]
        if alone:
            warnings.warn(
                "these activations keep an output that no other layer keeps, which saves no memory: "
                + ", ".join(alone),
                stacklevel=3,
            )


def keeps_output(module: nn.Module) -> bool:
    """Whether this is an activation that saves its output for the backward pass."""
    codec = getattr(module, "codec", None)
    return isinstance(codec, Codec) and codec.keeps_output


def why_not_kept(module: nn.Module, x: Tensor) -> str | None:
    """Why `module`, a leaf that reads x, keeps no tensor that shares x's memory; "" if it (presumably) does, None if it hands x on."""
    codec = getattr(module, "codec", None)
    if isinstance(module, _DropoutNd):
        return f"is dropout (p={module.p:g}), which makes a new tensor" if module.training and module.p > 0 else None
    if codec is not None and not isinstance(codec, Dense):
        return "keeps a code of its input"
    if isinstance(module, nn.Linear) and not module.weight.requires_grad:  # a frozen convolution saves its input
        return "is frozen and keeps no input"
    if isinstance(module, nn.Linear | _ConvNd):
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype not in (torch.get_autocast_dtype(device), torch.float64):
            return f"keeps a copy in {str(torch.get_autocast_dtype(device)).removeprefix('torch.')}"
    return ""


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata
