"""Benchmark and proof cases of Few-Bit activations."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.few_bit.reference import code_bytes, encode_reference, forward_reference, input_grad_reference
from actpress.kernels.few_bit.triton import CONFIGS, encode_triton, forward_triton, input_grad_triton


def cases() -> list[launch.Case]:
    """The hidden layer of ViT-B's MLP at batch 64, 64 x 197 x 3072, with the paper's 3 bits."""
    vit, tiny, code = (64, 197, 3072), (3, 7, 197), ("gelu", 3)

    def make(
        shape: tuple[int, ...], backward: bool, dtype: torch.dtype, device: str
    ) -> tuple[Tensor | str | int | bool, ...]:
        x = torch.randn(shape, dtype=dtype, device=device)
        return (torch.randn_like(x), encode_reference(x, *code), *code, False) if backward else (x, *code)

    def encode_bytes(x: Tensor, *rest: object) -> int:
        return launch.nbytes(x) + code_bytes(x.numel(), code[1])

    def forward_bytes(x: Tensor, *rest: object) -> int:
        return 2 * launch.nbytes(x) + code_bytes(x.numel(), code[1])

    def case(name, kernel, reference, moved, stock=None, tolerance=0.0) -> launch.Case:
        backward = name == "input_grad"
        return launch.Case(
            f"few_bit_{name}",
            partial(make, vit, backward),
            kernel,
            reference,
            moved,
            moved,
            CONFIGS,
            stock,
            tolerance=tolerance,
            tiny=partial(make, tiny, backward),
        )

    # forward: tolerance as in inverted.cases. input_grad: stock gets dy in place of x, which takes the same time.
    return [
        case("encode", encode_triton, encode_reference, encode_bytes),
        case("forward", forward_triton, forward_reference, forward_bytes, lambda x, *_: F.gelu(x), 1e-3),
        case(
            "input_grad",
            input_grad_triton,
            input_grad_reference,
            forward_bytes,
            lambda dy, *_: torch.ops.aten.gelu_backward(dy, dy),
        ),
    ]
