"""Benchmark and proof cases of pooled maps."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from actpress.kernels.common import launch
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.pooling import triton_taps
from actpress.kernels.pooling.plan import met_reference, plan_of
from actpress.kernels.pooling.reference import PooledConv, conv2d_weight_grad_reference, pool_reference
from actpress.kernels.pooling.triton import CONFIGS, conv2d_weight_grad_triton, pool_triton
from actpress.kernels.pooling.triton_taps import met_bytes, met_triton

# Channels in and out, kernel, stride, groups and side of the input map: ResNet-50's and, last, ConvNeXt-T's at 224 x 224
CONVOLUTIONS = {
    "3x3_64_at_56": (64, 64, 3, 1, 1, 56),
    "3x3_128_at_28": (128, 128, 3, 1, 1, 28),
    "3x3_256_at_14": (256, 256, 3, 1, 1, 14),
    "3x3_512_at_7": (512, 512, 3, 1, 1, 7),
    "1x1_64_256_at_56": (64, 256, 1, 1, 1, 56),
    "1x1_256_64_at_56": (256, 64, 1, 1, 1, 56),
    "1x1_stride_2_256_512_at_56": (256, 512, 1, 2, 1, 56),
    "3x3_stride_2_128_at_56": (128, 128, 3, 2, 1, 56),
    "7x7_stride_2_3_64_at_224": (3, 64, 7, 2, 1, 224),
    "7x7_depthwise_96_at_56": (96, 96, 7, 1, 96, 56),
}


def cases() -> list[launch.Case]:
    """All cases of the family."""
    return [*pool_cases(), *weight_grad_cases()]


def pool_cases() -> list[launch.Case]:
    """A ResNet-50 activation at batch 64: 64 x 256 x 56 x 56."""
    return [
        _pool_case("pool_2", 2, torch.contiguous_format),
        _pool_case("pool_2_channels_last", 2, torch.channels_last),
        _pool_case("pool_4", 4, torch.contiguous_format),
    ]


def _pool_case(name: str, block: int, memory_format: torch.memory_format) -> launch.Case:
    def make(dtype: torch.dtype, device: str, shape=(64, 256, 56, 56)) -> tuple[Tensor, int, str]:
        return torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format), block, "ceil"

    def bytes_of(x: Tensor, block: int, align: str) -> int:
        return launch.nbytes(x, pool_reference(x.to("meta"), block, align))

    return launch.Case(
        name,
        make,
        pool_triton,
        pool_reference,
        bytes_of,
        bytes_of,
        CONFIGS,
        stock=lambda x, block, align: F.avg_pool2d(x, block),
        tolerance=3e-4,  # half types: a sum now and then rounds to the neighbour; fp32 differs by 1e-7
        tiny=lambda dtype, device: make(dtype, device, (2, 8, 9, 14)),
    )


def weight_grad_cases() -> list[launch.Case]:
    """Convolutions at batch 64 and blocks of 2; two in channels_last, one with blocks of 4. "taps" is the kernel alone.

    A case returns dW and what the kernel wrote. The kernel's bytes count as moved; what cuBLAS reads does not. fp32 is multiplied in tf32,
    as in stock.
    """
    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    shapes = [
        *((name, 2, contiguous) for name in CONVOLUTIONS),
        ("3x3_64_at_56", 2, channels_last),
        ("1x1_64_256_at_56", 2, channels_last),
        ("3x3_64_at_56", 4, contiguous),
    ]
    kernel_alone = {"3x3_64_at_56", "1x1_64_256_at_56", "7x7_stride_2_3_64_at_224"}
    return [
        case
        for name, block, memory_format in shapes
        for case in _weight_grad_cases(name, block, memory_format)
        if case.flops or name in kernel_alone
    ]


def _weight_grad_cases(name: str, block: int, memory_format: torch.memory_format) -> list[launch.Case]:
    """The weight gradient, and the kernel alone. The first input is the dense x, from which stock computes in place of p(x)."""
    i, o, kernel, stride, groups, side = CONVOLUTIONS[name]
    strides, padding = (stride, stride), (kernel // 2, kernel // 2)

    def make(dtype: torch.dtype, device: str, n=64, i=i, o=o, groups=groups, side=side) -> tuple:
        out = (side + 2 * padding[0] - kernel) // stride + 1
        x, dy = (
            torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format)
            for shape in ((n, i, side, side), (n, o, out, out))
        )
        conv = ConvGeometry(torch.Size((o, i // groups, kernel, kernel)), strides, padding, (1, 1), groups)
        return x, pool_reference(x, block, "ceil"), dy, PooledConv(conv, (side, side), block, "ceil")

    def read(pooled: Tensor, dy: Tensor, geometry: PooledConv) -> tuple:
        """What the kernel reads, and how."""
        plan = plan_of(pooled, dy, geometry)
        return pooled if plan.spread else dy, plan.rows, plan.columns, geometry.conv.groups, plan.order

    def taps(x: Tensor, *inputs: Any, config: launch.Config) -> Tensor:
        return met_triton(*read(*inputs), config)

    def taps_reference(x: Tensor, *inputs: Any) -> Tensor:
        return met_reference(*read(*inputs)[:4])

    def moved(x: Tensor, pooled: Tensor, dy: Tensor, geometry: PooledConv) -> int:
        if plan_of(pooled, dy, geometry).kept:
            return launch.nbytes(pooled, dy)  # by cuBLAS; the kernel has nothing to do
        return met_bytes(*read(pooled, dy, geometry))

    def floor(x: Tensor, pooled: Tensor, dy: Tensor, geometry: PooledConv) -> int:
        plan = plan_of(pooled, dy, geometry)
        if plan.kept:
            return launch.nbytes(pooled, dy)
        maps = pooled if plan.spread else dy
        written = plan.taps * maps.shape[0] * maps.shape[1] * plan.rows.written * plan.columns.written
        return launch.nbytes(maps) + written * maps.itemsize

    def flops(x: Tensor, pooled: Tensor, dy: Tensor, geometry: PooledConv) -> int:
        plan = plan_of(pooled, dy, geometry)
        positions = dy[:, 0].numel() if plan.spread else pooled[:, 0].numel()
        return 2 * plan.taps * i // groups * o * positions

    def weight_grad(x: Tensor, *inputs: Any, config: launch.Config) -> tuple[Tensor, Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return conv2d_weight_grad_triton(*inputs, config=config)
        finally:
            torch.set_float32_matmul_precision(before)

    def stock(x: Tensor, pooled: Tensor, dy: Tensor, geometry: PooledConv) -> Tensor:
        weight = dy.new_empty(()).expand(geometry.conv.weight_shape)  # only its shape is read
        conv = strides, padding, (1, 1), False, (0, 0), groups
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *conv, (False, True, False))[1]

    words = (
        name
        + (f"_block_{block}" if block != 2 else "")
        + ("_channels_last" if memory_format == torch.channels_last else "")
    )
    few = (2, 2, 2) if groups > 1 else (min(i, 2), 2, 1)
    common = {
        "make": make,
        "moved": moved,
        "floor": floor,
        "configs": triton_taps.CONFIGS,
        "tiny": lambda dtype, device: make(dtype, device, 1, *few, 7),
    }
    return [
        launch.Case(
            f"pooled_dw_{words}",
            kernel=weight_grad,
            reference=lambda x, *inputs: (conv2d_weight_grad_reference(*inputs), taps_reference(x, *inputs)),
            stock=stock,
            flops=flops,
            tolerance=4e-3,  # bf16: S and dW round once each, 2^-9 at most; fp32: 1e-6, tf32 2^-11 an element
            **common,
        ),
        launch.Case(f"pooled_taps_{words}", kernel=taps, reference=taps_reference, tolerance=3e-4, **common),
    ]
