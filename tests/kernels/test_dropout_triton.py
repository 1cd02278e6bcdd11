"""Triton kernels of dropout against their references."""

import pytest
import torch
from torch import nn

from actpress.kernels import dropout, masks
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.common.noise import uniform_reference
from actpress.kernels.dropout import op
from actpress.kernels.dropout.cases import cases
from actpress.kernels.dropout.triton import (
    dropout_backward_regenerated_triton,
    dropout_backward_triton,
    dropout_triton,
)
from actpress.kernels.masks.triton import CONFIGS
from devices import BACKENDS, DEVICES, assert_same, traffic

SIZES = [(0,), (1,), (7,), (8,), (63,), (4097,), (3, 5, 7), (2, 5, 7, 9)]
SEED = 2**62 + 12345
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in multiply"),  # inf * 0, in the interpreter
]


def seed_on(device):
    return torch.full((1,), SEED, dtype=torch.int64, device=device)


def noise_of(x):
    """What kernels draw for x from SEED, in its memory order."""
    noise = uniform_reference(SEED, x.numel()).to(x.device)
    return torch.empty_like(x, dtype=torch.float32).set_(noise.untyped_storage(), 0, x.shape, x.stride())


@pytest.mark.quick(20)
@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_dropout_and_its_gradient_from_the_seed(shape, device, dtype, config):
    x, dy = torch.randn(2, *shape, device=device).to(dtype)
    x.view(-1)[::5] = torch.inf  # dropped, it becomes NaN, as in PyTorch
    outputs = dropout_triton(x, 0.3, seed_on(device), config)
    for name, ours, reference in zip(
        ("y", "mask"), outputs, dropout.dropout_reference(x, noise_of(x), 0.3), strict=True
    ):
        assert_same(name, ours, reference)
    ours = dropout_backward_regenerated_triton(dy, 0.3, seed_on(device), False, config)
    assert_same("dx", ours, dropout.dropout_backward_reference(dy, outputs[1], 0.3, False))


@pytest.mark.parametrize("p", [0.0, 2**-17, 0.1, 0.5, 1 - 2**-17, 0.99999999])
@pytest.mark.parametrize("device", DEVICES)
def test_dropout_draws_the_mask_of_its_noise_at_any_p(p, device):
    x = torch.randn(5000, device=device)
    y, packed = dropout_triton(x, p, seed_on(device))
    expected, mask = dropout.dropout_reference(x, noise_of(x), p)
    assert_same("mask", packed, mask)
    assert_same("y", y, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_an_element_is_kept_as_long_as_p_does_not_exceed_its_noise(device):
    x = torch.ones(100, device=device)
    for k, noise in enumerate(noise_of(x).tolist()):
        for p in (noise, noise + 2**-18):
            y, _ = dropout_triton(x, p, seed_on(device))
            assert (y[k] != 0) == (p == noise), f"element {k}, noise {noise}, p {p}"


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_dropout_backward(shape, device, dtype, config):
    dy = torch.randn(shape, device=device).to(dtype)
    dy.view(-1)[::3] = torch.inf
    packed = masks.pack_mask_reference(torch.rand(shape, device=device) > 0.3)
    ours = dropout_backward_triton(dy, packed, 0.3, False, config)
    assert_same("dx", ours, dropout.dropout_backward_reference(dy, packed, 0.3, False))


@pytest.mark.parametrize("order", ["channels_last", "transposed"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_dropout_of_any_strides(order, device, dtype):
    x, dy = torch.randn(2, 2, 6, 5, 7, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last) if order == "channels_last" else x.transpose(1, 2)
    dy = dy if order == "channels_last" else dy.transpose(1, 2)
    y, packed = dropout_triton(x, 0.3, seed_on(device))
    channels_last = is_channels_last(x)
    assert is_channels_last(y) == channels_last
    x = x if channels_last else x.contiguous()
    for name, ours, reference in zip(
        ("y", "mask"), (y, packed), dropout.dropout_reference(x, noise_of(x), 0.3), strict=True
    ):
        assert_same(name, ours, reference)
    expected = dropout.dropout_backward_reference(dy, packed, 0.3, channels_last)
    for ours in (
        dropout_backward_triton(dy, packed, 0.3, channels_last),
        dropout_backward_regenerated_triton(dy, 0.3, seed_on(device), channels_last),
    ):
        assert_same("dx", ours, expected)
        assert is_channels_last(ours) == channels_last


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradient_is_that_of_stock_dropout_on_cuda(dtype):
    x = torch.randn(4097, device="cuda", dtype=dtype)
    dy = torch.randn_like(x)
    _, mask = torch.native_dropout(x, 0.1, True)
    ours = dropout.dropout_backward(dy, masks.pack_mask(mask), 0.1, False)
    assert_same("dx", ours, torch.ops.aten.native_dropout_backward(dy, mask, 1 / 0.9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 1 / 3, 0.5])
def test_gradient_is_that_of_stock_dropout_on_the_cpu(dtype, p):
    x = (1 + torch.rand(1000)).to(dtype).requires_grad_()  # no zero, which would look dropped
    dy = torch.randn(1000, dtype=dtype)
    y = nn.functional.dropout(x, p)
    y.backward(dy)
    packed = masks.pack_mask(y.detach() != 0)
    assert_same("dx", dropout.dropout_backward(dy, packed, p, False), x.grad)


@pytest.mark.parametrize("n", [1000, 2043, 4096])
def test_kernels_move_what_their_cases_declare(n):
    x, packed, seed = torch.randn(n), torch.randint(256, (-(-n // 8),), dtype=torch.uint8), seed_on("cpu")
    inputs = {
        "dropout": (x, 0.3, seed),
        "dropout_backward": (x, packed, 0.3, False),
        "dropout_backward_regenerated": (x, 0.3, seed, False),
    }
    for case in cases():
        with traffic() as moved:
            case.kernel(*inputs[case.name])
        assert moved.total == case.moved(*inputs[case.name]), case.name
        real = case.make(torch.bfloat16, "meta")
        assert case.moved(*real) <= 1.01 * case.floor(*real)


def operations(x, channels_last):
    packed = masks.pack_mask_reference(x > 0)
    return {
        "dropout": (op._dropout.op, (x, 0.3, seed_on("cpu"), channels_last)),
        "dropout_backward": (op._dropout_backward.op, (x, packed, 0.3, channels_last)),
        "regenerated": (op._dropout_backward_regenerated.op, (x, 0.3, seed_on("cpu"), channels_last)),
    }


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", ["dropout", "dropout_backward", "regenerated"])
def test_operations_are_registered_as_pytorch_wants_them(name, memory_format):
    x = torch.randn(2, 6, 5, 7).to(memory_format=memory_format)
    op, arguments = operations(x, is_channels_last(x))[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_public_functions_agree_on_the_cpu(memory_format, dtype):
    x = torch.randn(4, 6, 5, 7, dtype=dtype).to(memory_format=memory_format)
    channels_last = is_channels_last(x)

    def step(x, seed):
        y, packed = dropout.dropout(x, 0.25, seed)
        with_mask = dropout.dropout_backward(x, packed, 0.25, channels_last)
        return y, with_mask, dropout.dropout_backward_regenerated(x.contiguous(), 0.25, seed, channels_last)

    for run in (step, torch.compile(step, fullgraph=True)):
        y, with_mask, regenerated = run(x, seed_on("cpu"))
        assert_same("dx with the mask", with_mask, y)
        assert_same("dx from the seed", regenerated, y)
        assert is_channels_last(regenerated) == channels_last
        kept = (y != 0).double().mean()
        assert abs(kept - 0.75) < 4 * (0.75 * 0.25 / x.numel()) ** 0.5  # four standard deviations
        torch.testing.assert_close(y[y != 0], x[y != 0] / 0.75)


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_probabilities_outside_of_the_unit_interval_are_refused(p):
    for call in (
        lambda: dropout.dropout(torch.ones(3), p, seed_on("cpu")),
        lambda: dropout.dropout_backward_regenerated(torch.ones(3), p, seed_on("cpu"), False),
    ):
        with pytest.raises(ValueError, match=r"dropout: p=.*, allowed: 0 <= p < 1"):
            call()
