"""Predicted memory: what a training step saves for backward, computed with fake tensors, which have shapes and dtypes but no data.

Sizes are exact and do not depend on the device; a model of any size takes seconds and next to no memory.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from actpress import swap
from actpress.measure.saved import SavedBytes


@contextmanager
def fake_model(build: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """Build a model of any size without allocating its memory.

    with fake_model(build) as model: ...    Tensors created inside the block are fake and on the CPU.
    """
    with torch.device("meta"):
        model = build()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.to_empty(device="cpu")


def check_predictable(model: nn.Module, method: swap.Method) -> None:
    """Raise ValueError where a compiler decides what is saved: fake tensors do not tell."""
    if swap.is_compiled(model):
        raise ValueError(f"{swap.label(method)} compiles the model; what it saves can be measured, not predicted")


def predicted_memory(
    build: Callable[[], nn.Module], method: swap.Method, batch: int, image_size: int, precision: str
) -> dict[str, int]:
    """Predicted memory of one training step, in bytes, with fake tensors: nothing is allocated.

    The input is image_size x image_size images, or what the model's `example_input(batch)` says. precision: fp32, bf16 or fp16 (autocast),
    bf16-true (weights and images in bf16, no autocast). Cross-entropy; SGD with momentum.
    saved_bytes: the ruler's. index_bytes: the part of it in int32, positions of blocks. model_input_saved: parameters and buffers, input,
    saved for backward, each storage once. training_bytes: four times the parameters (weights, gradients, two moments), input, saved.
    authors_activation, authors_total: as DIVISION and ActNN report them. The first is what is allocated after the forward pass less
    before the image copy, less loss and logits: the image counts. The second is allocated before the backward pass plus after it less at
    the start: activation, parameters, buffers, gradients, momentum, and the image once more.
    """
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16-true": None}[precision]
    weights = torch.bfloat16 if precision == "bf16-true" else torch.float32
    with (
        fake_model(lambda: build().to(weights)) as model,
        torch.autocast("cpu", dtype=dtype, enabled=dtype is not None),
    ):
        swap.apply(model, method)
        check_predictable(model, method)
        if hasattr(model, "example_input"):
            x = model.example_input(batch)
        else:
            x = torch.empty(batch, 3, image_size, image_size, dtype=weights)
        y = torch.empty(batch, dtype=torch.long)
        with SavedBytes() as saved:
            logits = model(x)
            loss = nn.functional.cross_entropy(logits, y)
        parameters = sum(p.nbytes for p in model.parameters())
        state = parameters + sum(b.nbytes for b in model.buffers())
        activation = saved.count(also=[x], less=[logits, loss, y])
        return {
            "saved_bytes": saved.bytes,
            "index_bytes": sum(
                t.untyped_storage().nbytes() for t in saved.storages().values() if t.dtype == torch.int32
            ),
            "parameter_bytes": parameters,
            "training_bytes": 4 * parameters + saved.count(also=[x]),
            "model_input_saved": state + saved.count(also=[x]),
            "authors_activation": activation,
            "authors_total": activation + state + 2 * parameters + x.nbytes,
        }
