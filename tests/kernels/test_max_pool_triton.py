"""Triton kernels of max-pooling against their references and against PyTorch itself."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from actpress.kernels import max_pool
from actpress.kernels.common import launch
from actpress.kernels.common.launch import tl
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.max_pool import Window, op
from actpress.kernels.max_pool.cases import cases, max_pool2d_backward_bytes, max_pool2d_bytes
from actpress.kernels.max_pool.triton import CONFIGS, max_pool2d_backward_triton, max_pool2d_triton
from devices import BACKENDS, DEVICES, assert_same, last_program_only, traffic

pytestmark = pytest.mark.usefixtures("poisoned")
RESNET = Window((3, 3), (2, 2), (1, 1), (1, 1))
GEOMETRIES = {  # name: (shape of x, window, ceil_mode)
    "resnet": ((2, 3, 9, 8), RESNET, False),
    "resnet even": ((1, 5, 14, 14), RESNET, False),
    "vgg": ((3, 2, 7, 63), Window((2, 2), (2, 2), (0, 0), (1, 1)), False),
    "stride 1": ((1, 2, 7, 13), Window((3, 3), (1, 1), (1, 1), (1, 1)), False),
    "one element": ((2, 1, 5, 7), Window((1, 1), (1, 1), (0, 0), (1, 1)), False),
    "ceil": ((1, 3, 8, 10), Window((3, 3), (2, 2), (0, 0), (1, 1)), True),
    "ceil padded": ((2, 2, 7, 12), Window((3, 2), (2, 3), (1, 1), (1, 1)), True),
    "dilated": ((1, 2, 11, 9), Window((2, 3), (2, 1), (1, 1), (3, 2)), True),
    "gaps between windows": ((2, 2, 11, 13), Window((2, 2), (3, 5), (1, 0), (1, 1)), False),
    "stride above 8": ((1, 2, 13, 31), Window((5, 11), (7, 9), (2, 5), (1, 1)), False),
    "256 elements": ((1, 2, 33, 35), Window((16, 16), (16, 8), (0, 0), (1, 1)), False),
    "more than 256": ((1, 2, 35, 40), Window((17, 17), (17, 17), (3, 0), (1, 1)), True),
    "global": ((3, 2, 7, 7), Window((7, 7), (7, 7), (0, 0), (1, 1)), False),
    "one row": ((1, 1, 1, 197), Window((1, 3), (1, 2), (0, 1), (1, 1)), False),
    "rows longer than a tile": ((1, 1, 3, 2100), Window((3, 3), (2, 1), (1, 1), (1, 1)), False),
    "many channels": ((2, 67, 5, 6), RESNET, False),
    "unbatched": ((3, 9, 8), RESNET, False),
    "no images": ((0, 3, 9, 8), RESNET, False),
}
FORMATS = [
    pytest.param(torch.contiguous_format, id="nchw"),
    pytest.param(torch.channels_last, id="nhwc"),
]


def values(shape, dtype, device, memory_format=torch.contiguous_format):
    """Ties, infinities and NaN in all places, and windows of nothing but -inf."""
    x = torch.randint(-3, 4, shape).to(dtype)
    kind = torch.rand(shape)
    x[kind < 0.2] = -torch.inf
    x[kind > 0.95] = torch.nan
    x[kind > 0.98] = torch.inf
    x[..., : shape[-2] // 2, : shape[-1] // 2] = -torch.inf
    if memory_format == torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is for batches of maps")
    return x.to(device).to(memory_format=memory_format)


def compare_forward(x, window, ceil_mode, config=CONFIGS[0]):
    y, offset = max_pool2d_triton(x, window, ceil_mode, config)
    expected, index = F.max_pool2d(x, *window, ceil_mode, return_indices=True)
    assert_same("y", y, expected)
    assert_same("offset", offset, max_pool.max_pool2d_reference(x, window, ceil_mode)[1])
    assert_same("index", max_pool.window_index_reference(offset, x.shape[-1], window), index)
    for tensor in (y, offset):
        assert tensor.is_contiguous(
            memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format
        )
    return offset


def compare_backward(dy, offset, shape, window, channels_last, config=CONFIGS[0]):
    ours = max_pool2d_backward_triton(dy, offset, shape, window, channels_last, config)
    # on the CPU, where fp32 is summed in the same order, and the operation is deterministic
    expected = max_pool.max_pool2d_backward_reference(dy.float().cpu(), offset.cpu(), shape, window, channels_last)
    assert_same("dx", ours.cpu(), expected.to(dy.dtype))
    assert ours.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.quick(12)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_max_pool(geometry, memory_format, device, dtype):
    shape, window, ceil_mode = GEOMETRIES[geometry]
    x = values(shape, dtype, device, memory_format)
    offset = compare_forward(x, window, ceil_mode)
    dy = torch.randn(offset.shape, device=device).to(dtype)
    compare_backward(dy, offset, shape, window, is_channels_last(x))


@pytest.mark.parametrize("config", CONFIGS[1:], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("device", DEVICES)
def test_every_configuration_computes_the_same(config, memory_format, device):
    x = values((2, 5, 23, 29), torch.float32, device, memory_format)
    offset = compare_forward(x, RESNET, False, config)
    dy = torch.randn(offset.shape, device=device)
    compare_backward(dy, offset, x.shape, RESNET, is_channels_last(x), config)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded"])
def test_any_strides(strides, device):
    x = values((4, 6, 9, 9), torch.float32, device)
    x = {"transposed": x.transpose(2, 3), "every other": x[:, ::2], "expanded": x[:, :1].expand(4, 6, 9, 9)}[strides]
    offset = compare_forward(x, RESNET, False)
    dy = torch.randn(offset.shape, device=device).transpose(2, 3)
    compare_backward(dy, offset, x.shape, RESNET, False)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_equals_that_of_stock(device):
    x = torch.randn(2, 3, 15, 17, device=device, requires_grad=True)
    dy = torch.randn(2, 3, 8, 9, device=device)
    with torch.random.fork_rng():
        torch.use_deterministic_algorithms(False)  # stock's gradient is not, on CUDA
        (expected,) = torch.autograd.grad(F.max_pool2d(x, *RESNET), x, dy)
    _, offset = max_pool2d_triton(x.detach(), RESNET, False)
    ours = max_pool2d_backward_triton(dy, offset, x.shape, RESNET, False)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)  # up to four numbers in another order on CUDA


@pytest.mark.quick(8)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_kernels_move_what_their_cases_declare(geometry, memory_format):
    shape, window, ceil_mode = GEOMETRIES[geometry]
    x = values(shape, torch.float16 if geometry == "many channels" else torch.float32, "cpu", memory_format)
    with traffic() as moved:
        y, offset = max_pool2d_triton(x, window, ceil_mode)
    assert moved.total == max_pool2d_bytes(x, window, ceil_mode)
    inputs = y, offset, shape, window, is_channels_last(y)
    with traffic() as moved:
        max_pool2d_backward_triton(*inputs)
    assert moved.total == max_pool2d_backward_bytes(*inputs)


@pytest.mark.quick(1)
@pytest.mark.parametrize("shape", [(2, 3, 25, 30), (1, 20, 25, 11)], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_tiles_that_share_borders_move_what_their_cases_declare(shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format)
    config = {"BLOCK": 256, "num_warps": 4}
    with traffic() as moved:
        y, offset = max_pool2d_triton(x, RESNET, False, config)
    assert moved.total == max_pool2d_bytes(x, RESNET, False, config) > x.nbytes + y.nbytes + offset.nbytes
    inputs = y, offset, shape, RESNET, is_channels_last(y), config
    with traffic() as moved:
        max_pool2d_backward_triton(*inputs)
    assert moved.total == max_pool2d_backward_bytes(*inputs) > x.nbytes + y.nbytes + offset.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_at_a_real_size_little_is_read_twice(case, dtype):
    inputs = case.make(dtype, "meta")
    assert case.floor(*inputs) <= case.moved(*inputs) <= 1.10 * case.floor(*inputs)


def test_wrong_windows_are_refused_in_the_words_of_pytorch():
    x = torch.randn(1, 1, 4, 4)
    for window in (Window((2, 2), (1, 1), (2, 2), (1, 1)), Window((5, 5), (1, 1), (0, 0), (1, 1))):
        with pytest.raises(RuntimeError) as stock:
            F.max_pool2d(x, *window)
        with pytest.raises(RuntimeError) as ours:
            max_pool2d_triton(x, window, False)
        assert str(ours.value) == str(stock.value)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("geometry", ["resnet", "ceil padded", "dilated", "more than 256", "unbatched"])
def test_operations_are_registered_as_pytorch_wants_them(geometry, memory_format):
    shape, window, ceil_mode = GEOMETRIES[geometry]
    x = values(shape, torch.float32, "cpu", memory_format).nan_to_num()  # the test compares twins without regard to NaN
    flat = op._geometry(window)
    torch.library.opcheck(op._max_pool2d.op, (x, flat, ceil_mode, is_channels_last(x)))
    y, offset = max_pool.max_pool2d(x, window, ceil_mode)
    torch.library.opcheck(op._max_pool2d_backward.op, (y, offset, list(shape), flat, is_channels_last(x)))


def test_operations_compile_in_one_graph():
    x, dy = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 5, 4)

    @torch.compile(fullgraph=True)
    def step(x, dy):
        y, offset = op._max_pool2d.op(x, op._geometry(RESNET), False, False)
        return y, offset, op._max_pool2d_backward.op(dy, offset, x.shape, op._geometry(RESNET), False)

    y, offset = max_pool.max_pool2d_reference(x, RESNET, False)
    dx = max_pool.max_pool2d_backward_reference(dy, offset, x.shape, RESNET, False)
    for name, ours, reference in zip(("y", "offset", "dx"), step(x, dy), (y, offset, dx), strict=True):
        assert_same(name, ours, reference)


def test_operations_run_on_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 3, 9, 8).to(memory_format=torch.channels_last)
        y, offset = op._max_pool2d.op(x, op._geometry(RESNET), False, True)
        assert y.stride() == offset.stride() == (60, 1, 12, 3)
        assert (offset.dtype, offset.shape) == (torch.uint8, (2, 3, 5, 4))


def test_offsets_past_two_to_the_31_are_computed_in_64_bits():
    wide = torch.empty(1, 1, 2**16, 2**15 + 2, dtype=torch.float16, device="meta")
    with launch.recorded() as launches:
        y, offset = max_pool2d_triton(wide, RESNET, False)
        max_pool2d_backward_triton(y, offset, wide.shape, RESNET, False)
    assert [launch.arguments["INDEX"] for launch in launches] == [tl.int64] * 2


@pytest.mark.slow
@pytest.mark.parametrize("maps", [1, 2**14], ids=["one large map", "many maps"])
def test_past_two_to_the_31_elements(maps):
    window = Window((2, 2), (2, 2), (0, 0), (1, 1))
    shape = (maps, 1, 2**16 // maps + 2, 2**15)
    x = torch.empty(shape, dtype=torch.float16)
    x[-1, 0, -2:] = torch.randn(2, 2**15)
    with last_program_only():
        y, offset = max_pool2d_triton(x, window, False)
    expected = max_pool.max_pool2d_reference(x[-1:, :, -2:, -512:], window, False)
    for name, ours, reference in zip(("y", "offset"), (y, offset), expected, strict=True):
        assert_same(name, ours[-1:, :, -1:, -256:], reference)
    y[-1, 0, -1] = torch.randn(2**14)
    offset[-1, 0, -1] = torch.randint(4, (2**14,), dtype=torch.uint8)
    last = y[-1:, :, -1:, -256:].clone(), offset[-1:, :, -1:, -256:].clone()
    del x
    with last_program_only():
        dx = max_pool2d_backward_triton(y, offset, shape, window, False)
    expected = max_pool.max_pool2d_backward_reference(*last, (1, 1, 2, 512), window, False)
    assert_same("dx", dx[-1:, :, -2:, -512:], expected)
