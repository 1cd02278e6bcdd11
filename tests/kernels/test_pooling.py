"""Pooled maps: the weight gradient without the upsampled map against the one with it."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from actpress.codec import Context, Like, convolution_backward
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.pooling.composed import by_decoding, by_smaller, conv2d_weight_grad_composed, smaller_axes
from actpress.kernels.pooling.reference import (
    PooledConv,
    conv2d_weight_grad_reference,
    pool_max,
    pool_reference,
    upsample_reference,
)
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
WAYS = {  # beside CONVS: where one of the ways is exact only if it looks after an edge, or costs much
    "4x4 patches": (3, 5, (4, 4), (4, 4), (0, 0), (1, 1), 1),
    "12x12 patches": (3, 2, (12, 12), (12, 12), (0, 0), (1, 1), 1),
    "6x4 patches, padded": (3, 5, (6, 4), (6, 4), (2, 1), (1, 1), 1),
    "stride 4": (3, 4, (7, 7), (4, 4), (3, 3), (1, 1), 1),
    "stride 6, dilated": (4, 2, (3, 3), (6, 6), (3, 1), (4, 2), 2),
    "stride 12 of padding": (2, 3, (1, 1), (12, 12), (6, 9), (1, 1), 1),
    "depthwise patches": (6, 6, (4, 4), (4, 4), (1, 1), (1, 1), 6),
    "depthwise 7x7": (6, 6, (7, 7), (1, 1), (3, 3), (1, 1), 6),
    "depthwise 31x31": (2, 2, (31, 31), (1, 1), (15, 15), (1, 1), 2),
    "wide 3x3": (96, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "grouped 1x1": (6, 12, (1, 1), (1, 1), (0, 0), (1, 1), 3),
}
SIZES = [(1, 14, 14), (2, 7, 7), (3, 13, 10)]


def inputs(conv, size, block, align, dtype=torch.float64):
    """p(x), dY, and the geometry of a convolution of CONVS or WAYS over maps of size (N, H, W); and dW against x~, of autograd."""
    channels, out, kernel, stride, padding, dilation, groups = conv
    x = torch.randn(size[0], channels, *size[1:], dtype=dtype)
    pooled = pool_reference(x, block, align)
    upsampled = upsample_reference(pooled, size[1:], block, align)
    assert upsampled.shape == x.shape
    weight = torch.randn(out, channels // groups, *kernel, dtype=dtype, requires_grad=True)
    y = F.conv2d(upsampled, weight, None, stride, padding, dilation, groups)
    dy = torch.randn_like(y)
    geometry = PooledConv(ConvGeometry(weight.shape, stride, padding, dilation, groups), size[1:], block, align)
    return pooled, dy, geometry, torch.autograd.grad(y, weight, dy)[0]


def assert_exact(name, got, expected):
    assert (got - expected).norm() <= 1e-12 * expected.norm() + 1e-12, name


@pytest.mark.quick(40)
@pytest.mark.parametrize("align", ["ceil", "authors"])
@pytest.mark.parametrize("block", [2, 3, 4, 20])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_weight_gradient_is_that_of_the_upsampled_map(name, size, block, align):
    pooled, dy, geometry, expected = inputs(CONVS[name], size, block, align)
    assert_exact("dW", conv2d_weight_grad_reference(pooled, dy, geometry), expected)


@pytest.mark.quick(60)
@pytest.mark.parametrize("align", ["ceil", "authors"])
@pytest.mark.parametrize("block", [2, 3, 4, 20])
@pytest.mark.parametrize("size", [(1, 14, 14), (2, 16, 24), (3, 13, 18), (1, 12, 1)], ids=str)
@pytest.mark.parametrize("name", [*CONVS, *WAYS])
def test_every_way_to_the_weight_gradient_is_exact(name, size, block, align):
    conv = CONVS.get(name) or WAYS[name]
    reach = [d * (k - 1) + 1 - 2 * p for k, p, d in zip(conv[2], conv[4], conv[5], strict=True)]
    size = (size[0], *(max(length, least) for length, least in zip(size[1:], reach, strict=True)))
    pooled, dy, geometry, expected = inputs(conv, size, block, align)
    assert_exact("decoded", by_decoding(pooled, dy, geometry), expected)
    assert_exact("chosen", conv2d_weight_grad_composed(pooled, dy, geometry), expected)
    axes = smaller_axes(dy, geometry)
    if axes is not None:
        assert_exact("smaller", by_smaller(pooled, dy, axes, geometry), expected)


@pytest.mark.parametrize("name", ["1x1 stride 2", "4x4 patches", "12x12 patches", "stride 4", "depthwise patches"])
def test_blocks_that_divide_the_stride_make_a_smaller_convolution(name):
    conv = CONVS.get(name) or WAYS[name]
    _, dy, geometry, _ = inputs(conv, (1, 24, 24), 2, "ceil")
    rows, columns = smaller_axes(dy, geometry)
    least = -(-conv[2][0] // 2) + (name == "depthwise patches")  # padded by 1, a tap more
    assert rows.taps == columns.taps == least


class Written(TorchDispatchMode):
    """Counts the elements that operations put out, views left out."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor) and not func.is_view and t._base is None:
                self.elements += t.numel()
        return out


@pytest.mark.parametrize("name", [*CONVS, *WAYS])
@pytest.mark.parametrize("block", [2, 4])
def test_no_convolution_costs_much_more_than_stock(name, block):
    """No more multiplications than stock's weight gradient; and with what is written on the way, an element of which takes a core about as
    long as 50 multiply-adds, within three times what stock does and reads."""
    conv = CONVS.get(name) or WAYS[name]
    pooled, dy, geometry, _ = inputs(conv, (2, 48, 48), block, "ceil", torch.float32)
    weight_shape = geometry.conv.weight_shape
    x = torch.randn(2, conv[0], 48, 48)
    with FlopCounterMode(display=False) as stock:
        convolution_backward(dy, x, torch.empty(weight_shape), geometry.conv, (False, True, False))
    with FlopCounterMode(display=False) as ours, Written() as written:
        conv2d_weight_grad_composed(pooled, dy, geometry)
    assert ours.get_total_flops() <= stock.get_total_flops()
    moved = x.numel() + dy.numel() + weight_shape.numel()
    assert ours.get_total_flops() / 2 + 50 * written.elements <= 3 * (stock.get_total_flops() / 2 + 50 * moved)


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
    conv, cosine = ConvGeometry(weight.shape, (1, 1), (1, 1), (1, 1), 1), {}
    for align in ("ceil", "authors"):
        geometry = PooledConv(conv, (size, size), block, align)
        dw = conv2d_weight_grad_reference(pool_reference(fine, block, align), dy, geometry)
        cosine[align] = F.cosine_similarity(dw.flatten(), exact.flatten(), dim=0)
    assert cosine["ceil"] > cosine["authors"]


def test_half_types_are_summed_in_fp32():
    x, dy = torch.randn(4, 8, 16, 16), torch.randn(4, 8, 16, 16)
    codec, conv = PoolingCodec(4, "ceil"), ConvGeometry(torch.Size((8, 8, 3, 3)), (1, 1), (1, 1), (1, 1), 1)
    exact = codec.conv2d_weight_grad(codec.encode(x, Context(0)), Like(x.shape, x.dtype, False), dy, conv)
    half = codec.conv2d_weight_grad(
        codec.encode(x.bfloat16(), Context(0)), Like(x.shape, torch.bfloat16, False), dy.bfloat16(), conv
    )
    assert half.dtype == torch.bfloat16
    # three bf16 roundings of independent terms (x, dY, dW), 2^-9 relative each
    assert (half.float() - exact).norm() < 2**-8 * exact.norm()
