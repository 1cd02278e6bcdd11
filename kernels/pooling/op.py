"""The public operations of pooled maps: CUDA tensors take the kernels, all others the reference or composed operations."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.common.layout import dense
from actpress.kernels.pooling.composed import by_decoding, conv2d_weight_grad_composed
from actpress.kernels.pooling.plan import has_too_many_taps
from actpress.kernels.pooling.reference import PooledConv, empty_pooled, pool_reference
from actpress.kernels.pooling.triton import conv2d_weight_grad_triton, pool_triton


@torch.library.custom_op("actpress::pool", mutates_args=())
def _pool(x: Tensor, block: int, align: str) -> Tensor:
    return pool_reference(x, block, align)


@_pool.register_fake
def _(x: Tensor, block: int, align: str) -> Tensor:
    return empty_pooled(dense(x), block, align)


launch.on_cuda(_pool, pool_triton)


def pool(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """x [N, C, H, W] of any floating dtype and strides -> block means [N, C, h, w] in its dtype and memory format."""
    run = launch.way(_pool, x_NCHW) if launch.on_gpu(x_NCHW) else pool_reference
    return run(x_NCHW, block, align)


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
    geometry = PooledConv.of_numbers(size, weight_shape, stride, padding, dilation, groups, block, align)
    return conv2d_weight_grad_composed(pooled, dy, geometry)


@_conv2d_weight_grad.register_fake
def _(pooled: Tensor, dy: Tensor, size: Sequence[int], weight_shape: Sequence[int], *rest: Any) -> Tensor:
    return dy.new_empty(weight_shape)


def _on_cuda(pooled: Tensor, dy: Tensor, *numbers: Any) -> Tensor:
    geometry = PooledConv.of_numbers(*numbers)
    if 0 not in (pooled.numel(), dy.numel()) and has_too_many_taps(pooled, dy, geometry):
        return by_decoding(pooled, dy, geometry)
    return conv2d_weight_grad_triton(pooled, dy, geometry)[0]


launch.on_cuda(_conv2d_weight_grad, _on_cuda)


def conv2d_weight_grad(pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv) -> Tensor:
    """dW [O, I / groups, kh, kw] in dy's dtype against x~, from block means and dy of any strides."""
    if launch.on_gpu(dy_NOPQ):
        return launch.way(_conv2d_weight_grad, dy_NOPQ)(pooled_NIhw, dy_NOPQ, *geometry.numbers())
    return conv2d_weight_grad_composed(pooled_NIhw, dy_NOPQ, geometry)
