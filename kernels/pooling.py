"""Mean-pooled maps, and the weight gradient of a convolution against one.

    p(x)[i, j] = mean of block (i, j) of k x k pixels
    x~         = p(x) upsampled (nearest): what the weight gradient is taken against
    dW[:, :, a, b] = sum over blocks of S_ab p(x)^T,  S_ab = dY summed over the pixels whose tap (a, b) falls into each block

The upsampled map is never built: tap (a, b) of the kernel meets pixel (stride * row + dilation * a - padding) of x~, so dY, summed over
the rows and columns that meet the same block, is all a matrix product with p(x) needs. Exact against x~, with k^2 fewer FLOPs.

align="ceil": block of pixel h is h // k; a last, smaller block holds the mean of what it covers.
align="authors": the official code's floor mode. Only whole blocks are pooled, from the top left; upsampled, they are padded with zeros at
the top and left, so on sizes that k does not divide, x~ is shifted and its first rows and columns are zero.

Source: arXiv 2409.11902 and the authors' experimental code. There a map smaller than k is an error; here k is cut to the map.
"""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGN = ("ceil", "authors")


def pool_reference(x_NCHW: Tensor, block: int, align: str) -> Tensor:
    """x [N, C, H, W] -> block means [N, C, h, w] in x's dtype and memory format."""
    kernel = tuple(min(block, size) for size in x_NCHW.shape[2:])
    return F.avg_pool2d(x_NCHW, kernel, kernel, ceil_mode=align == "ceil", count_include_pad=False)


def upsample_reference(pooled_NCHW: Tensor, size: tuple[int, int], block: int, align: str) -> Tensor:
    """Block means -> x~ [N, C, H, W]."""
    out = pooled_NCHW
    for axis, length in enumerate(size, start=2):
        index = block_of(torch.arange(length, device=out.device), length, block, align)
        out = out.index_select(axis, index.clamp(min=0))
        if align == "authors":
            shape = [1, 1, 1, 1]
            shape[axis] = length
            out = out * (index >= 0).view(shape).to(out.dtype)
    return out


def conv2d_weight_grad_reference(
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
    """dW [O, I / groups, kh, kw] against x~ of `size` (H, W), in dy's dtype. Half types are summed in fp32."""
    compute = dy_NOPQ.dtype if dy_NOPQ.dtype == torch.float64 else torch.float32
    pooled, dy = pooled_NIhw.to(compute), dy_NOPQ.to(compute)
    n, out_channels = dy.shape[:2]
    grouped = pooled.reshape(n, groups, -1, pooled.shape[2] * pooled.shape[3])  # [N, groups, I / groups, blocks]
    kernel = tuple(weight_shape[2:])
    met = [  # for each axis and tap: the block that each output position meets, -1 for none
        [
            _block_met(
                dy.shape[2 + axis],
                size[axis],
                tap,
                stride[axis],
                padding[axis],
                dilation[axis],
                block,
                align,
                dy.device,
            )
            for tap in range(kernel[axis])
        ]
        for axis in (0, 1)
    ]
    dw = dy.new_empty(weight_shape)
    rows = [_sum_into(dy, 2, index, pooled.shape[2]) for index in met[0]]
    for a, b in product(range(kernel[0]), range(kernel[1])):
        summed = _sum_into(rows[a], 3, met[1][b], pooled.shape[3]).reshape(n, groups, out_channels // groups, -1)
        dw[:, :, a, b] = torch.einsum("ngos,ngis->goi", summed, grouped).reshape(weight_shape[:2])
    return dw.to(dy_NOPQ.dtype)


def block_of(pixel: Tensor, length: int, block: int, align: str) -> Tensor:
    """Index of the block that each pixel of an axis belongs to; -1 for pixels outside of it or in no block."""
    block = min(block, length)
    shift = length % block if align == "authors" else 0
    inside = (pixel >= shift) & (pixel < length)
    return torch.where(inside, (pixel - shift) // block, -1)


def _block_met(
    outputs: int,
    length: int,
    tap: int,
    stride: int,
    padding: int,
    dilation: int,
    block: int,
    align: str,
    device: torch.device,
) -> Tensor:
    pixel = torch.arange(outputs, device=device) * stride + tap * dilation - padding
    return block_of(pixel, length, block, align)


def _sum_into(x: Tensor, axis: int, index: Tensor, count: int) -> Tensor:
    """x summed along `axis` into `count` places; index -1 is dropped."""
    shape = list(x.shape)
    shape[axis] = count + 1  # the last place takes what is dropped
    index = torch.where(index < 0, count, index)
    return x.new_zeros(shape).index_add_(axis, index, x).narrow(axis, 0, count)
