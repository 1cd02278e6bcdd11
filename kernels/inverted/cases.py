"""Benchmark and proof cases of inverted activations."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.bits import packed_bytes
from actpress.kernels.inverted.reference import (
    forward_reference,
    input_grad_from_bits_reference,
    left_bits_reference,
)
from actpress.kernels.inverted.triton import CONFIGS, forward_triton, input_grad_triton, left_bits_triton


def cases() -> list[launch.Case]:
    """The hidden layer of ViT-B's MLP at batch 64: 64 x 197 x 3072."""
    vit, tiny = (64, 197, 3072), (3, 7, 197)

    def make(
        function: str, shape: tuple[int, ...], backward: bool, dtype: torch.dtype, device: str
    ) -> tuple[Tensor | str | bool, ...]:
        x = torch.randn(shape, dtype=dtype, device=device)
        if not backward:
            return x, function
        return torch.randn_like(x), *forward_reference(x, function.partition(":")[0]), function, False

    def bits_bytes(x: Tensor, *rest: object) -> int:
        return launch.nbytes(x) + packed_bytes(x.numel(), 1)

    def forward_bytes(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + packed_bytes(x.numel(), 1)

    def backward_bytes(dy: Tensor, y: Tensor, packed: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(dy) + launch.nbytes(y, packed)

    def case(name, function, kernel, reference, moved, stock=None, tolerance=0.0) -> launch.Case:
        backward = moved is backward_bytes
        return launch.Case(
            f"inverted_{name}_{function.replace(':', '_')}",
            partial(make, function, vit, backward),
            kernel,
            reference,
            moved,
            moved,
            CONFIGS,
            stock,
            tolerance=tolerance,
            tiny=partial(make, function, tiny, backward),
        )

    backward = input_grad_triton, input_grad_from_bits_reference, backward_bytes
    # Tolerance: one output in fifty may differ in the last bit of bf16, sqrt(1 / 50) 2^-8 = 6e-4. Stock's backward pass gets y in place of
    # x, which takes the same time.
    return [
        case("left_bits", "gelu", left_bits_triton, left_bits_reference, bits_bytes),
        case("forward", "gelu", forward_triton, forward_reference, forward_bytes, lambda x, _: F.gelu(x), 1e-3),
        case("input_grad", "gelu", *backward, lambda dy, y, *_: torch.ops.aten.gelu_backward(dy, y), 1e-3),
        case("input_grad", "gelu:coarse", *backward, lambda dy, y, *_: torch.ops.aten.gelu_backward(dy, y), 1e-3),
        case("input_grad", "silu", *backward, lambda dy, y, *_: torch.ops.aten.silu_backward(dy, y), 1e-3),
    ]
