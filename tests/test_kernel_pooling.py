"""Pooled maps: the weight gradient without the upsampled map against the one with it."""

import pytest
import torch
from torch.nn import functional as F

from actpress.codec import Context, Conv, Like
from actpress.kernels.pooling import conv2d_weight_grad_reference, pool_max, pool_reference, upsample_reference
from actpress.methods.pooling import PoolingCodec

# (channels in, out, kernel, stride, padding, dilation, groups)
CONVS = {
    "1x1": (6, 4, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 stride 2": (6, 4, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3x3": (6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 stride 2": (6, 4, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "7x7 stem": (3, 4, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "dilated": (6, 4, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "grouped": (6, 4, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": (6, 6, (3, 3), (2, 1), (1, 1), (1, 1), 6),
    "odd": (2, 3, (2, 4), (3, 1), (0, 2), (1, 3), 1),
}
SIZES = [(1, 14, 14), (2, 7, 7), (3, 13, 10)]


@pytest.mark.parametrize("align", ["ceil", "authors"])
@pytest.mark.parametrize("block", [2, 3, 4, 20])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_weight_gradient_is_that_of_the_upsampled_map(name, size, block, align):
    channels, out, kernel, stride, padding, dilation, groups = CONVS[name]
    n, height, width = size
    x = torch.randn(n, channels, height, width, dtype=torch.float64)
    pooled = pool_reference(x, block, align)
    upsampled = upsample_reference(pooled, (height, width), block, align)
    assert upsampled.shape == x.shape
    weight = torch.randn(out, channels // groups, *kernel, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(upsampled, weight, None, stride, padding, dilation, groups)
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, weight, dy)
    conv = (weight.shape, stride, padding, dilation, groups)
    got = conv2d_weight_grad_reference(pooled, dy, (height, width), *conv, block, align)
    assert (got - expected).norm() <= 1e-12 * expected.norm() + 1e-12, "dW"


@pytest.mark.parametrize("size", [8, 7, 5, 1])
@pytest.mark.parametrize("block", [2, 4])
def test_aligned_means_are_those_of_what_each_block_covers(size, block):
    x = torch.randn(1, 2, size, size)
    pooled = pool_reference(x, block, "ceil")
    rows = [slice(i, min(i + block, size)) for i in range(0, size, block)]
    expected = torch.stack([torch.stack([x[:, :, r, c].mean((2, 3)) for c in rows], -1) for r in rows], -2)
    torch.testing.assert_close(pooled, expected)
    upsampled = upsample_reference(pooled, (size, size), block, "ceil")
    for i, r in enumerate(rows):
        for j, c in enumerate(rows):
            assert torch.equal(
                upsampled[:, :, r, c], pooled[:, :, i : i + 1, j : j + 1].expand_as(upsampled[:, :, r, c])
            )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 5)], ids=str)
@pytest.mark.parametrize("block", [1, 2, 4])
def test_maxima_are_those_of_the_blocks_that_means_are_of(size, block, memory_format):
    x = torch.randn(2, 3, *size).to(memory_format=memory_format)
    kernel = [min(block, length) for length in size]
    for align, end in (("ceil", 0), ("authors", 1)):  # floor mode leaves out an incomplete block
        pooled = pool_max(x, block, align)
        assert pooled.shape == pool_reference(x, block, align).shape and pooled.dtype == x.dtype
        assert pooled.is_contiguous(memory_format=memory_format)
        rows, columns = (
            [slice(i, min(i + k, n)) for i in range(0, n - end * (k - 1), k)] for n, k in zip(size, kernel, strict=True)
        )
        expected = torch.stack([torch.stack([x[:, :, r, c].amax((2, 3)) for c in columns], -1) for r in rows], -2)
        assert torch.equal(pooled, expected), align


def test_official_floor_mode_drops_the_end_and_pads_the_start_with_zeros():
    x = torch.arange(1.0, 8.0).view(1, 1, 1, 7).expand(1, 1, 7, 7)
    pooled = pool_reference(x, 2, "authors")
    assert pooled[0, 0, 0].tolist() == [1.5, 3.5, 5.5]
    assert upsample_reference(pooled, (7, 7), 2, "authors")[0, 0, 1].tolist() == [0, 1.5, 1.5, 3.5, 3.5, 5.5, 5.5]
    assert upsample_reference(pooled, (7, 7), 2, "authors")[0, 0, 0].tolist() == [0] * 7


@pytest.mark.parametrize("size,block", [(7, 2), (7, 4), (14, 4)])
def test_aligned_blocks_keep_the_gradient_of_smooth_maps_better_than_floor_mode(size, block):
    fine = F.interpolate(torch.randn(16, 8, 4, 4), size=(size, size), mode="bicubic", align_corners=True)
    weight = torch.randn(8, 8, 3, 3, requires_grad=True)
    y = F.conv2d(fine, weight, padding=1)
    dy = F.interpolate(torch.randn(16, 8, 4, 4), size=y.shape[2:], mode="bicubic", align_corners=True)
    (exact,) = torch.autograd.grad(y, weight, dy)
    conv = (weight.shape, (1, 1), (1, 1), (1, 1), 1)
    cosine = {
        align: F.cosine_similarity(
            conv2d_weight_grad_reference(
                pool_reference(fine, block, align), dy, (size, size), *conv, block, align
            ).flatten(),
            exact.flatten(),
            dim=0,
        )
        for align in ("ceil", "authors")
    }
    assert cosine["ceil"] > cosine["authors"]


def test_half_types_are_summed_in_fp32():
    x, dy = torch.randn(4, 8, 16, 16), torch.randn(4, 8, 16, 16)
    codec, conv = PoolingCodec(4, "ceil"), Conv(torch.Size((8, 8, 3, 3)), (1, 1), (1, 1), (1, 1), 1)
    exact = codec.conv2d_weight_grad(codec.encode(x, Context(0)), Like(x.shape, x.dtype, False), dy, conv)
    half = codec.conv2d_weight_grad(
        codec.encode(x.bfloat16(), Context(0)), Like(x.shape, torch.bfloat16, False), dy.bfloat16(), conv
    )
    assert half.dtype == torch.bfloat16
    # three bf16 roundings of independent terms (x, dY, dW), 2^-9 relative each
    assert (half.float() - exact).norm() < 2**-8 * exact.norm()
