"""The public operations of pooled maps: CUDA tensors take the kernels, all others the reference or composed operations."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from actpress.kernels.common import launch
from actpress.kernels.pooling.composed import by_decoding, conv2d_weight_grad_composed
from actpress.kernels.pooling.plan import has_too_many_taps
from actpress.kernels.pooling.reference import PooledConv, empty_pooled, pool_reference
from actpress.kernels.pooling.triton import conv2d_weight_grad_triton, pool_triton


def _weight_grad_body(
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
    """The body of the registered operation, which takes plain numbers."""
    geometry = PooledConv.of_numbers(size, weight_shape, stride, padding, dilation, groups, block, align)
    return conv2d_weight_grad_composed(pooled, dy, geometry)


def _weight_grad_launcher(pooled: Tensor, dy: Tensor, *numbers: Any) -> Tensor:
    geometry = PooledConv.of_numbers(*numbers)
    if 0 not in (pooled.numel(), dy.numel()) and has_too_many_taps(pooled, dy, geometry):
        return by_decoding(pooled, dy, geometry)
    return conv2d_weight_grad_triton(pooled, dy, geometry)[0]


_pool = launch.operation("pool", pool_reference, pool_triton, empty_pooled)
_conv2d_weight_grad = launch.operation(
    "pooled_conv2d_weight_grad",
    _weight_grad_body,
    _weight_grad_launcher,
    lambda pooled, dy, size, weight_shape, *rest: dy.new_empty(weight_shape),
    decides=1,
)


def pool(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """x [N, C, H, W] of any floating dtype and strides -> block means [N, C, h, w] in its dtype and memory format."""
    return _pool(x_NCHW, block, align)


def conv2d_weight_grad(pooled_NIhw: Tensor, dy_NOPQ: Tensor, geometry: PooledConv) -> Tensor:
    """dW [O, I / groups, kh, kw] in dy's dtype against x~, from block means and dy of any strides."""
    return _conv2d_weight_grad(pooled_NIhw, dy_NOPQ, *geometry.numbers())
