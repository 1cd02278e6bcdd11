"""The weight gradient of a convolution against a pooled map (pooling.py), on a GPU: one kernel and one matrix product.

With the taps side by side the sum over blocks is one product, which is for cuBLAS. One of its operands is what the kernel (pooled_taps.py)
writes:

    sums      S [taps O, N h w] times p(x)
    spread    X [taps I, N P Q] times dY

Bytes decide. Spread writes less where there are few input channels, as in a 7x7 stem: 16 taps of 3 channels instead of 16 of 64. Taps that
meet the same blocks everywhere count once, so of the stem's 49 there are 16 for blocks of 2. Where every position stays what it is (1x1,
stride and block 2), nothing is written: the product is that of dY and p(x).

Large kernels of many taps (31x31) would write a hundred times what x and dY hold: more than MOST times, and x~ is decoded instead. What a
CPU does is in pooled_product.py.

What the kernel writes lies as dY does. The other operand is a view of dY or p(x), but for the sums of NCHW maps a copy of p(x).

Shapes: dY [N, O, P, Q], p(x) [N, I, h, w].
"""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.pooling import conv2d_weight_grad_reference, pool_reference
from actpress.kernels.pooling.product import by_decoding, conv2d_weight_grad_composed
from actpress.kernels.pooling.taps import CONFIGS, Axis, axis_of, met_bytes, met_reference, met_triton

MOST = 8  # elements that the kernel may write for each of x and dY


class Plan(NamedTuple):
    """How one weight gradient is computed."""

    rows: Axis
    columns: Axis
    row_taps: tuple[int, ...]  # which of rows.offsets stands for each tap of the convolution
    column_taps: tuple[int, ...]
    spread: bool
    order: str  # of what the kernel writes

    @property
    def taps(self) -> int:
        return len(self.rows.offsets) * len(self.columns.offsets)

    @property
    def kept(self) -> bool:
        """What the kernel would write is what it reads."""
        return self.rows.kept and self.columns.kept

    def elements(self, pooled: Tensor, dy: Tensor) -> int:
        """That the kernel writes."""
        channels = (pooled if self.spread else dy).shape[1]
        return 0 if self.kept else self.taps * dy.shape[0] * channels * self.rows.written * self.columns.written

    @property
    def by_sample(self) -> bool:
        """One product per sample, so that dY [N, O, P Q], the larger operand, is taken as it lies."""
        return self.order == "samples"


def plan_of(pooled_NIhw: Tensor, dy_NOPQ: Tensor, *geometry: Any) -> Plan:
    """Sums or spread, by the elements that pass through memory on the way to the product."""
    size, weight_shape, stride, padding, dilation, groups, block, align = geometry
    (n, i, h, w), (_, o, p, q) = pooled_NIhw.shape, dy_NOPQ.shape
    channels_last, plans = is_channels_last(dy_NOPQ), []
    for spread in (False, True):
        (rows, row_taps), (columns, column_taps) = (
            axis_of(*axis, block, align, spread)
            for axis in zip((p, q), size, weight_shape[2:], stride, padding, dilation, strict=True)
        )
        order = "channels" if channels_last else "samples" if spread else "taps"
        plans.append(Plan(rows, columns, row_taps, column_taps, spread, order))
    taps, kept = plans[0].taps, plans[0].kept
    by_sums, by_spread = (0, 0) if kept else (taps * n * o * h * w, taps * n * i * p * q)
    if not channels_last:  # p(x), or dY, in the order of S; a product per sample, in fp32
        by_sums += pooled_NIhw.numel() + (dy_NOPQ.numel() if kept else 0)
        by_spread += 2 * taps * n * o * i // groups
    return plans[by_spread * p * q < by_sums * h * w]  # a product that is larger must save as many times the bytes


def conv2d_weight_grad_triton(
    pooled_NIhw: Tensor, dy_NOPQ: Tensor, *geometry: Any, config: launch.Config = CONFIGS[0]
) -> tuple[Tensor, Tensor]:
    """`conv2d_weight_grad_reference`, and S or X [groups, taps, C / groups, N, rows, columns].

    Differs in that S is rounded to dY's dtype: by 2^-9 of an element at most in bf16, 2^-12 in fp16, where sums above 65504 overflow. X is
    exact. Half types are multiplied with fp32 sums and rounded once. In fp32 only the order of sums differs, unless
    torch.backends.cuda.matmul.allow_tf32 is set (cudnn.allow_tf32, which holds for convolutions, has no say).
    """
    weight_shape, groups = geometry[1], geometry[5]
    if 0 in (pooled_NIhw.numel(), dy_NOPQ.numel()):
        return dy_NOPQ.new_zeros(weight_shape), dy_NOPQ.new_empty(0)
    pooled_NIhw = pooled_NIhw.to(dy_NOPQ.dtype)
    plan = plan_of(pooled_NIhw, dy_NOPQ, *geometry)
    read, other = (pooled_NIhw, dy_NOPQ) if plan.spread else (dy_NOPQ, pooled_NIhw)
    if plan.kept:
        met = read.unflatten(1, (groups, 1, -1)).permute(1, 2, 3, 0, 4, 5)
    else:
        met = met_triton(read, plan.rows, plan.columns, groups, plan.order, config)
    other = other.unflatten(1, (groups, -1))
    n, positions = met.shape[3], met.shape[4] * met.shape[5]
    if plan.by_sample:
        left = met.permute(3, 0, 1, 2, 4, 5).reshape(n * groups, -1, positions)
        right = other.reshape(n * groups, -1, positions)
        dw = _product(left, right).unflatten(0, (n, groups)).sum(0)
    else:
        left = met.reshape(groups, -1, n * positions)
        right = other.permute(1, 2, 0, 3, 4).reshape(groups, -1, n * positions)
        dw = _product(left, right)
    dw = dw.unflatten(1, (len(plan.rows.offsets), len(plan.columns.offsets), -1))  # [groups, taps, taps, C, other C]
    for dim, taps in ((1, plan.row_taps), (2, plan.column_taps)):
        if len(taps) > dw.shape[dim]:
            dw = torch.stack([dw.select(dim, tap) for tap in taps], dim)
    dw = dw.permute(0, 4, 3, 1, 2) if plan.spread else dw.permute(0, 3, 4, 1, 2)
    return dw.reshape(weight_shape).to(dy_NOPQ.dtype).contiguous(), met


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [batch, M, K], b [batch, K of N, K] -> a b^T in fp32."""
    b = b.transpose(1, 2)
    if a.dtype == torch.float32 or not a.is_cuda:
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, out_dtype=torch.float32)


@torch.library.custom_op("actpress::pooled_conv2d_weight_grad", mutates_args=())
def _conv2d_weight_grad(
    pooled: Tensor,
    dy: Tensor,
    size: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    block: int,
    align: str,
) -> Tensor:
    geometry = size, weight_shape, stride, padding, dilation, groups, block, align
    return conv2d_weight_grad_composed(pooled, dy, *geometry)


@_conv2d_weight_grad.register_fake
def _(pooled: Tensor, dy: Tensor, size: Sequence[int], weight_shape: Sequence[int], *rest: Any) -> Tensor:
    return dy.new_empty(weight_shape)


def has_too_many_taps(pooled_NIhw: Tensor, dy_NOPQ: Tensor, *geometry: Any) -> bool:
    """Whether the kernel would write more than MOST times the elements of x and dY."""
    dense = pooled_NIhw.shape[0] * pooled_NIhw.shape[1] * prod(geometry[0]) + dy_NOPQ.numel()
    return plan_of(pooled_NIhw, dy_NOPQ, *geometry).elements(pooled_NIhw, dy_NOPQ) > MOST * dense


def _on_cuda(pooled: Tensor, dy: Tensor, *geometry: Any) -> Tensor:
    if 0 not in (pooled.numel(), dy.numel()) and has_too_many_taps(pooled, dy, *geometry):
        return by_decoding(pooled, dy, *geometry)
    return conv2d_weight_grad_triton(pooled, dy, *geometry)[0]


launch.on_cuda(_conv2d_weight_grad, _on_cuda)


def conv2d_weight_grad(
    pooled_NIhw: Tensor,
    dy_NOPQ: Tensor,
    size: tuple[int, int],
    weight_shape: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    block: int,
    align: str,
) -> Tensor:
    """dW [O, I / groups, kh, kw] in dy's dtype against x~ of `size` (H, W), from block means and dy of any strides."""
    run = launch.way(_conv2d_weight_grad, dy_NOPQ) if launch.on_gpu(dy_NOPQ) else conv2d_weight_grad_composed
    return run(pooled_NIhw, dy_NOPQ, size, weight_shape, stride, padding, dilation, groups, block, align)


# Of ResNet-50 and, last, ConvNeXt-T at 224 x 224: channels in and out, kernel, stride, groups, side of the input map
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
    """Convolutions at batch 64 and blocks of 2; two as channels_last, one with blocks of 4. "taps" is the kernel alone.

    dW comes with what the kernel wrote, and that is what counts as moved: not what cuBLAS reads. fp32 is multiplied in tf32, as stock is.
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
        for case in _cases(name, block, memory_format)
        if case.flops or name in kernel_alone
    ]


def _cases(name: str, block: int, memory_format: torch.memory_format) -> list[launch.Case]:
    """The weight gradient, and the kernel alone. Inputs start with the dense x, which stock computes from in place of p(x)."""
    i, o, kernel, stride, groups, side = CONVOLUTIONS[name]
    strides, padding = (stride, stride), (kernel // 2, kernel // 2)

    def make(dtype: torch.dtype, device: str, n=64, i=i, o=o, groups=groups, side=side) -> tuple:
        out = (side + 2 * padding[0] - kernel) // stride + 1
        x, dy = (
            torch.randn(shape, dtype=dtype, device=device).contiguous(memory_format=memory_format)
            for shape in ((n, i, side, side), (n, o, out, out))
        )
        geometry = (side, side), (o, i // groups, kernel, kernel), strides, padding, (1, 1), groups, block, "ceil"
        return x, pool_reference(x, block, "ceil"), dy, *geometry

    def read(pooled: Tensor, dy: Tensor, *geometry: Any) -> tuple:
        """What the kernel reads, and how."""
        plan = plan_of(pooled, dy, *geometry)
        return pooled if plan.spread else dy, plan.rows, plan.columns, geometry[5], plan.order

    def taps(x: Tensor, *inputs: Any, config: launch.Config) -> Tensor:
        return met_triton(*read(*inputs), config)

    def taps_reference(x: Tensor, *inputs: Any) -> Tensor:
        return met_reference(*read(*inputs)[:4])

    def moved(x: Tensor, pooled: Tensor, dy: Tensor, *geometry: Any) -> int:
        if plan_of(pooled, dy, *geometry).kept:
            return launch.nbytes(pooled, dy)  # by cuBLAS; the kernel has nothing to do
        return met_bytes(*read(pooled, dy, *geometry))

    def floor(x: Tensor, pooled: Tensor, dy: Tensor, *geometry: Any) -> int:
        plan = plan_of(pooled, dy, *geometry)
        if plan.kept:
            return launch.nbytes(pooled, dy)
        maps = pooled if plan.spread else dy
        written = plan.taps * maps.shape[0] * maps.shape[1] * plan.rows.written * plan.columns.written
        return launch.nbytes(maps) + written * maps.itemsize

    def flops(x: Tensor, pooled: Tensor, dy: Tensor, *geometry: Any) -> int:
        plan = plan_of(pooled, dy, *geometry)
        positions = dy[:, 0].numel() if plan.spread else pooled[:, 0].numel()
        return 2 * plan.taps * i // groups * o * positions

    def weight_grad(x: Tensor, *inputs: Any, config: launch.Config) -> tuple[Tensor, Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return conv2d_weight_grad_triton(*inputs, config=config)
        finally:
            torch.set_float32_matmul_precision(before)

    def stock(x: Tensor, pooled: Tensor, dy: Tensor, size: Any, weight_shape: Sequence[int], *rest: Any) -> Tensor:
        weight = dy.new_empty(()).expand(weight_shape)  # only its shape is read
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
        "configs": CONFIGS,
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
