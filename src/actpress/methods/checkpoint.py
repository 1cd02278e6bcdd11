"""Activation checkpointing (Chen et al., 2016, arXiv 1604.06174): each block of the network saves its input alone and is computed again.

The idea: a block's forward pass runs once more in the backward pass, which makes its activations anew. We save

    input of each block        as stock PyTorch would
    all inside of a block      nothing; one block's activations exist at a time in the backward pass

Gradients are exact. A step costs one more forward pass. It is PyTorch's own torch.utils.checkpoint (non-reentrant), block by block, for
models of timm, torchvision, transformers and one's own.

What is a block: a module of at least two convolutions or linear layers that is a member of nn.Sequential, nn.ModuleList or nn.ModuleDict,
or one of three and more children of one class. Of nested ones it is the innermost that is still one of several of its kind: a residual
block, not its stage, and not the convolutions in it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from actpress.layers import applied
from actpress.swap import Around, Method, module_of

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Checkpoint(Method):
    """Activation checkpointing, block by block.

    `apply` raises ValueError for a model without blocks. The training step raises RuntimeError for a block that changes buffers of its own
    (spectral norm, a counter), since the second forward pass would change them again. Running statistics of batch norms are put back.
    """

    def plan(self, model: nn.Module) -> Sequence[Around]:
        names = {module: name for name, module in model.named_modules()}
        return [Around(names[block], computed_again) for block in blocks(model)]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a network, see above, in the order of model.named_modules(); none lies in another."""
    candidates = {id(member) for module in model.modules() for member in _members(module)}
    found: list[nn.Module] = []
    _collect(model, candidates, found)
    return found


def _collect(module: nn.Module, candidates: set[int], found: list[nn.Module]) -> None:
    if id(module) in candidates and not any(_is_stack(inner) for inner in module.modules()):
        found.append(module)
        return
    for child in module.children():
        _collect(child, candidates, found)


def _members(parent: nn.Module) -> list[nn.Module]:
    """The children that may be blocks: they multiply at least twice, and are more than a list of other modules."""
    children = [child for child in parent.children() if not isinstance(child, CONTAINERS) and _products(child) > 1]
    if isinstance(parent, CONTAINERS):
        return children
    counts = Counter(
        map(type, children)
    )  # stages that are named one by one; two attentions of a decoder's layer are none
    return [child for child in children if counts[type(child)] > 2]


def _products(module: nn.Module) -> int:
    """How many modules in it have a matrix or a convolution's filters."""
    return sum(any(p.dim() > 1 for p in inner.parameters(recurse=False)) for inner in module.modules())


def _is_stack(module: nn.Module) -> bool:
    """Whether a module holds several blocks of one kind."""
    return max(Counter(map(type, _members(module))).values(), default=0) > 1


def computed_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """forward(*args, **kwargs), saving its arguments alone. Batch norms count a batch once, not once more where it is computed again."""
    if torch.compiler.is_compiling():  # the compiler computes again what it likes, without side effects
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    contexts = partial(_contexts, module_of(forward))
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    return _buffers_checked(block), _statistics_kept(block)


def _statistics(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """(batch norm, name) of each running statistic that a training forward pass updates."""
    norms = [module for module in block.modules() if isinstance(module, _NormBase) and module.training]
    return [(norm, name) for norm in norms for name in STATISTICS if norm._buffers.get(name) is not None]


@contextmanager
def _buffers_checked(block: nn.Module) -> Iterator[None]:
    """Raises RuntimeError where the block changes a buffer that is no running statistic: it would change again, and the result with it."""
    known = {id(norm._buffers[name]) for norm, name in _statistics(block)}
    before = {name: (b, b._version) for name, b in block.named_buffers() if id(b) not in known and not b.is_inference()}
    yield
    after = dict(block.named_buffers())
    for name, (buffer, version) in before.items():
        if after.get(name) is not buffer or buffer._version != version:
            note = applied.of(block)
            raise RuntimeError(
                f"actpress: {note.name if note else ''!r} changes its buffer {name!r} in its forward pass, which checkpointing runs twice; "
                "leave it out with apply(..., where=...)"
            )


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The running statistics of batch norms are afterwards what they were before."""
    before = [(norm, name, norm._buffers[name]) for norm, name in _statistics(block)]
    for norm, name, value in before:
        norm._buffers[name] = value.clone()
    try:
        yield
    finally:
        for norm, name, value in before:
            norm._buffers[name] = value
