"""Triton kernels of masks and ReLU against their references."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from actpress.kernels import masks
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.masks import op
from actpress.kernels.masks.cases import cases
from actpress.kernels.masks.triton import (
    CONFIGS,
    pack_mask_triton,
    relu_backward_triton,
    relu_inplace_triton,
    relu_triton,
    unpack_mask_triton,
)
from devices import BACKENDS, DEVICES, assert_same, last_program_only, traffic

SIZES = [(0,), (1,), (7,), (8,), (63,), (4097,), (3, 5, 7), (2, 5, 7, 9)]
STRIDES = ["channels_last", "transposed", "every other", "expanded", "channels_last slice"]
pytestmark = pytest.mark.usefixtures("poisoned")


def strided(kind, x):
    """x [2, 6, 5, 7], or part of it, with odd strides."""
    return {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 2),
        "every other": x[:, ::2],
        "expanded": x[:, :1].expand(2, 6, 5, 7),
        "channels_last slice": x.to(memory_format=torch.channels_last)[:, :, 1:],
    }[kind]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_relu(shape, device, dtype, config):
    x = torch.randn(shape, device=device).to(dtype)
    x.view(-1)[::5] = torch.nan
    for name, ours, reference in zip(("y", "mask"), relu_triton(x, config), masks.relu_reference(x), strict=True):
        assert_same(name, ours, reference)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_relu_in_place(shape, device, dtype):
    x = torch.randn(shape, device=device).to(dtype)
    twin = x.clone()
    assert_same("mask", relu_inplace_triton(x, False), masks.relu_inplace_reference(twin, False))
    assert_same("y", x, twin)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_relu_backward(shape, device, dtype):
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    dy.view(-1)[::3] = torch.inf
    _, packed = masks.relu_reference(x)
    ours = relu_backward_triton(dy, packed, False)
    assert_same("dx", ours, masks.relu_backward_reference(dy, packed, False))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_relu_of_any_strides(strides, device, dtype):
    x = strided(strides, torch.randn(2, 6, 5, 7, device=device).to(dtype))
    y, packed = relu_triton(x)
    assert is_channels_last(y) == is_channels_last(x)
    expected = x.relu()
    assert_same("y", y, expected)
    assert_same("mask", masks.unpack_mask_reference(packed, x.shape, is_channels_last(y)), expected > 0)
    dy = torch.randn_like(x)
    ours = relu_backward_triton(dy, packed, is_channels_last(y))
    assert is_channels_last(ours) == is_channels_last(y)
    assert_same("dx", ours, masks.relu_backward_reference(dy, packed, is_channels_last(y)))


@pytest.mark.parametrize("strides", [kind for kind in STRIDES if kind != "expanded"])
@pytest.mark.parametrize("device", DEVICES)
def test_relu_in_place_of_any_strides(strides, device):
    x = torch.randn(2, 6, 5, 7, device=device)
    y = strided(strides, x)
    expected = y.relu()
    packed = relu_inplace_triton(y, is_channels_last(y))
    assert_same("y", y, expected)
    assert_same("mask", masks.unpack_mask_reference(packed, y.shape, is_channels_last(y)), expected > 0)
    assert_same("mask of the reference", masks.relu_(y), packed)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_masks_pack_and_unpack(shape, device, config):
    mask = torch.rand(shape, device=device) > 0.3
    packed = pack_mask_triton(mask, config)
    assert_same("packed", packed, masks.pack_mask_reference(mask))
    assert_same("mask", unpack_mask_triton(packed, mask.shape, False, config), mask)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("device", DEVICES)
def test_masks_of_any_strides_pack_and_unpack(strides, device):
    mask = strided(strides, torch.rand(2, 6, 5, 7, device=device) > 0.3)
    packed = pack_mask_triton(mask)
    assert_same("packed", packed, masks.pack_mask_reference(mask))
    unpacked = unpack_mask_triton(packed, mask.shape, is_channels_last(mask))
    assert_same("mask", unpacked, mask)
    assert is_channels_last(unpacked) == is_channels_last(mask)


@pytest.mark.parametrize("n", [1000, 2043, 4096])
def test_kernels_move_what_their_cases_declare(n):
    x, mask = torch.randn(n), torch.rand(n) > 0.5
    packed = masks.pack_mask_reference(mask)
    calls = {
        "relu": (lambda: relu_triton(x), (x,)),
        "relu_": (lambda: relu_inplace_triton(x, False), (x,)),
        "relu_backward": (lambda: relu_backward_triton(x, packed, False), (x,)),
        "pack_mask": (lambda: pack_mask_triton(mask), (mask,)),
        "unpack_mask": (lambda: unpack_mask_triton(packed, mask.shape, False), (packed, mask.shape, False)),
    }
    for case in cases():
        run, inputs = calls[case.name]
        with traffic(on_chip=0) as moved:  # 0: what is read in order to be overwritten is read
            run()
        assert moved.total == case.moved(*inputs), case.name
        real = case.make(case.dtypes[0], "meta")
        assert case.moved(*real) == case.floor(*real)


def operations(x, dy, packed):
    channels_last = is_channels_last(x)
    return {
        "relu": (op._relu.op, (x, channels_last)),
        "relu_": (op._relu_inplace.op, (x.clone(memory_format=torch.preserve_format), channels_last)),
        "relu_backward": (op._relu_backward.op, (dy, packed, channels_last)),
        "pack_mask": (op._pack_mask.op, (x > 0, channels_last)),
        "unpack_mask": (op._unpack_mask.op, (packed, list(x.shape), channels_last)),
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["relu", "relu_", "relu_backward", "pack_mask", "unpack_mask"])
def test_operations_are_registered_as_pytorch_wants_them(name, memory_format):
    x = torch.randn(2, 6, 5, 7).to(memory_format=memory_format)
    op, arguments = operations(x, torch.randn_like(x), masks.relu_reference(x)[1])[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("strides", ["transposed", "every other", "channels_last slice"])
@pytest.mark.parametrize("name", ["relu", "relu_", "relu_backward", "pack_mask"])
def test_operations_promise_the_strides_they_return(name, strides):
    x = strided(strides, torch.randn(2, 6, 5, 7))
    dy = strided(strides, torch.randn(2, 6, 5, 7))
    op, arguments = operations(x, dy, masks.pack_mask_reference(x > 0))[name]
    torch.library.opcheck(op, arguments, test_utils=("test_faketensor",))


def test_operations_compile_in_one_graph():
    x, dy = torch.randn(2, 2, 6, 5, 7)

    @torch.compile(fullgraph=True)
    def step(x, dy):
        y, packed = op._relu.op(x * 2, False)
        z = x * 3
        again = op._relu_inplace.op(z, False)
        mask = op._unpack_mask.op(packed, x.shape, False)
        return y, z, packed, again, op._pack_mask.op(mask, False), op._relu_backward.op(dy, packed, False)

    _, packed = masks.relu_reference(x)
    expected = ((x * 2).relu(), (x * 3).relu(), packed, packed, packed, dy * (x > 0))
    for name, ours, reference in zip("yzpaqd", step(x, dy), expected, strict=True):
        assert_same(name, ours, reference)


def test_operations_run_on_fake_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 6, 5, 7)
        y, packed = op._relu.op(x, False)
        assert (y.shape, packed.shape) == ((2, 6, 5, 7), (53,))
        assert op._relu_inplace.op(x, False).shape == (53,)
        assert op._relu_backward.op(y, packed, True).stride() == (210, 1, 42, 6)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu"])
def test_relu_past_two_to_the_31_elements(device):
    n = 2**31 + 4096
    x = torch.empty(n, dtype=torch.float16)
    x[-4096:] = torch.randn(4096)
    with last_program_only():
        y, packed = relu_triton(x)
    for name, ours, reference in zip(("y", "mask"), (y[-8:], packed[-1:]), masks.relu_reference(x[-8:]), strict=True):
        assert_same(name, ours, reference)
