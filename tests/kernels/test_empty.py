"""Tensors without elements: every public operation takes them, and puts out what their shapes say, on a CPU as through kernels."""

import pytest
import torch
from torch.nn import functional as F

from actpress.codec import Context
from actpress.kernels import (
    division,
    dropout,
    few_bit,
    frequency,
    inverted,
    lloyd_max,
    masks,
    max_pool,
    pooling,
    pruning,
    quantize,
)
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.common.groups import GROUPINGS
from actpress.kernels.division import triton as division_triton
from actpress.kernels.pooling.reference import conv2d_weight_grad_reference
from actpress.kernels.pooling.triton import conv2d_weight_grad_triton, pool_triton
from actpress.kernels.pruning.triton import decode_triton, encode_by_kernels
from actpress.kernels.pruning.triton_product import weight_grad_triton
from actpress.kernels.quantize import triton as quantize_triton
from devices import INTERPRETED

MAPS = [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8), (2, 3, 8, 0), (0, 0, 0, 0)]
TOKENS = [(0, 5), (5, 0), (2, 0, 5), (2, 3, 0), (0, 0)]
NOISE = Context(0)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is off")


def seed():
    return torch.tensor([1])


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("align", division.ALIGN)
@pytest.mark.parametrize("lfc", division.LFC)
@pytest.mark.parametrize("by_kernel", [False, pytest.param(True, marks=interpreted)])
def test_division(by_kernel, lfc, align, shape):
    x, format = torch.randn(shape), division.Format((4, 4), 2, align, lfc)
    if by_kernel:
        code = division_triton.encode_triton(x, seed(), format)
    else:
        code = division.encode(x, NOISE, format)
    assert sum(t.nbytes for t in code) == division.code_bytes(x.shape, format)
    decode = division_triton.decode_triton if by_kernel else division.decode
    assert decode(code, x.shape, x.dtype, False, format).shape == shape


@pytest.mark.parametrize("shape", MAPS + TOKENS, ids=str)
@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize("by_kernel", [False, pytest.param(True, marks=interpreted)])
def test_quantize(by_kernel, grouping, shape):
    x, format = torch.randn(shape), quantize.Format(grouping)
    code = quantize_triton.encode_triton(x, seed(), format) if by_kernel else quantize.encode(x, NOISE, format)
    assert sum(t.nbytes for t in code) == quantize.code_bytes(x.shape, format) == 0
    decode = quantize_triton.decode_triton if by_kernel else quantize.decode
    assert decode(code, x.shape, x.dtype, False, format).shape == shape


@pytest.mark.parametrize("shape", MAPS + TOKENS, ids=str)
def test_masks_and_activations(shape):
    x = torch.randn(shape)
    y, packed = masks.relu(x)
    assert (
        y.shape == masks.relu_backward(y, packed, False).shape == dropout.dropout_backward(y, packed, 0.5, False).shape
    )
    assert masks.relu_(x.clone()).numel() == masks.pack_mask(x > 0).numel() == 0
    y, code = few_bit.forward(x, "gelu", 3)
    assert code.numel() == 0 and few_bit.input_grad(y, code, "gelu", 3, False).shape == shape
    y, left = inverted.forward(x, "silu")
    assert inverted.input_grad(x, y, left, "silu", False).shape == shape


def test_max_pool_takes_an_empty_batch_as_stock_does():
    x, window = torch.randn(0, 3, 8, 8), max_pool.Window((2, 2), (2, 2), (0, 0), (1, 1))
    y, offset = max_pool.max_pool2d(x, window, False)
    assert y.shape == F.max_pool2d(x, 2).shape
    assert max_pool.max_pool2d_backward(y, offset, x.shape, window, False).shape == x.shape


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.parametrize("align", pooling.ALIGN)
def test_pooling(align, shape):
    x = torch.randn(shape)
    for pool in (pooling.pool, pooling.pool_max, *([pool_triton] if INTERPRETED else [])):
        pooled = pool(x, 2, align)
        assert pooled.shape == (*shape[:2], shape[2] // 2, shape[3] // 2)
        assert pooling.upsample_reference(pooled, shape[2:], 2, align).shape == shape


@pytest.mark.parametrize("align", pooling.ALIGN)
@pytest.mark.parametrize("kernel,stride", [(3, 1), (3, 2), (2, 2)])
def test_the_weight_gradient_of_an_empty_batch_is_zero(kernel, stride, align):
    x, weight = torch.randn(0, 3, 8, 8), torch.randn(4, 3, kernel, kernel)
    dy, pooled = F.conv2d(x, weight, None, stride, 1), pooling.pool(x, 2, align)
    conv = ConvGeometry(weight.shape, (stride, stride), (1, 1), (1, 1), 1)
    geometry = pooling.PooledConv(conv, (8, 8), 2, align)
    for name, dw in {
        "public": pooling.conv2d_weight_grad(pooled, dy, geometry),
        "reference": conv2d_weight_grad_reference(pooled, dy, geometry),
        "kernel": conv2d_weight_grad_triton(pooled, dy, geometry)[0],
    }.items():
        assert torch.equal(dw, torch.zeros(weight.shape)), name


@pytest.mark.parametrize("shape", TOKENS, ids=str)
@pytest.mark.parametrize("noise", [None, torch.tensor([0.3])], ids=["topk", "sample"])
def test_pruning(noise, shape):
    x, grid = torch.randn(shape), pruning.block_grid(torch.Size(shape), (8, 8))
    kept = pruning.kept_blocks(grid, 0.8)
    assert kept == pruning.code_bytes(grid, 0.8, 4) == 0
    dy, rows = torch.ones(*shape[:-1], 6), torch.Size(shape[:-1]).numel()
    blocks = pruning.encode(x, grid, kept, noise)
    assert pruning.decode(blocks, grid).shape == (rows, shape[-1])
    assert torch.equal(pruning.weight_grad(blocks, dy, grid), torch.zeros(6, shape[-1]))
    if INTERPRETED:
        values, index = encode_by_kernels(x, grid.height, grid.width, kept, noise)
        assert decode_triton(values, index, rows, shape[-1]).shape == (rows, shape[-1])
        dw = weight_grad_triton(values, index, dy, shape[-1])
        assert torch.equal(dw, torch.zeros(6, shape[-1]))


@pytest.mark.parametrize("shape", MAPS, ids=str)
@pytest.mark.filterwarnings("ignore:std_mean:UserWarning")
def test_codes_without_kernels(shape):
    x, levels = torch.randn(shape), lloyd_max.normal_levels(2)
    code = lloyd_max.encode_reference(x, torch.rand(shape), levels)
    assert lloyd_max.decode_reference(code, x.shape, x.dtype, False, levels).shape == shape
    for transform in frequency.TRANSFORMS:
        low = frequency.low_reference(x, 4, transform)
        assert frequency.back_reference(low, shape[2:], 4, transform, x.dtype).shape == shape
