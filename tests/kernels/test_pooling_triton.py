"""Triton kernels of pooled maps against their references, and the weight gradient that is made with them."""

import pytest
import torch
from torch.nn import functional as F

import actpress
from actpress.kernels import pooling
from actpress.kernels.common import launch
from actpress.kernels.common.geometry import ConvGeometry
from actpress.kernels.pooling import cases, op, plan, triton_taps
from actpress.kernels.pooling.composed import conv2d_weight_grad_composed
from actpress.kernels.pooling.plan import Belongs, plan_of
from actpress.kernels.pooling.reference import ConvAxis, PooledConv, conv2d_weight_grad_reference, pool_reference
from actpress.kernels.pooling.triton import CONFIGS, conv2d_weight_grad_triton, pool_triton
from actpress.methods.pooling import PoolingCodec
from devices import BACKENDS, assert_close, assert_same, last_program_only, mimic_gpu, traffic

FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
# S and dW round by half a last place each; fp32: sums of a few hundred terms
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# channels in and out, kernel, stride, padding, dilation, groups
CONVS = {
    "1x1": (3, 2, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 stride 2": (3, 2, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    "3x3": (3, 2, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 stride 2": (3, 2, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "7x7 stem": (1, 5, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "dilated": (3, 2, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "grouped": (4, 2, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "grouped stem": (2, 16, (3, 3), (1, 1), (0, 0), (1, 1), 2),
    "depthwise": (2, 2, (3, 3), (2, 1), (1, 1), (1, 1), 2),
    "odd": (2, 3, (2, 4), (3, 1), (0, 2), (1, 3), 1),
    "3x6": (1, 1, (3, 6), (1, 1), (1, 2), (1, 1), 1),
}
SIZES = {1: (1, 7, 7), 2: (2, 7, 9), 3: (1, 13, 10), 4: (3, 9, 9), 20: (1, 7, 6)}  # blocks: samples, height, width
TRIED = [(name, block) for name in CONVS for block in (1, 2, 3, 4) if "stem" not in name and name != "3x6"]
TRIED += [("7x7 stem", 2), ("grouped stem", 2), ("3x6", 2), ("1x1", 20), ("3x3", 20)]
SMALL = {"LANES": 64, "CHANNELS": 2, "num_warps": 2}  # fewer idle lanes than the default has for small maps
pytestmark = pytest.mark.usefixtures("poisoned")


def inputs(name, block, align, device, dtype, memory_format=torch.contiguous_format):
    """p(x), dY and the geometry of a convolution."""
    i, o, kernel, *conv, groups = CONVS[name]
    n, *size = SIZES[block]
    x = torch.randn(n, i, *size, device=device).to(dtype).contiguous(memory_format=memory_format)
    shape = F.conv2d(
        x.to("meta"), torch.empty(o, i // groups, *kernel, device="meta", dtype=dtype), None, *conv, groups
    ).shape
    dy = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
    geometry = ConvGeometry(torch.Size((o, i // groups, *kernel)), *conv, groups)
    return pool_reference(x, block, align), dy, PooledConv(geometry, tuple(size), block, align)


@pytest.mark.quick(10)
@pytest.mark.parametrize("block", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (1, 1, 1, 1), (2, 3, 7, 9), (1, 5, 63, 8), (3, 4, 13, 197)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_pool(shape, block, device, dtype):
    for align in pooling.ALIGN:
        for words, memory_format in FORMATS.items():
            x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=memory_format)
            ours, reference = pool_triton(x, block, align), pool_reference(x, block, align)
            assert ours.stride() == reference.stride()
            if block == 1:
                assert_same(f"p(x) {align} {words}", ours, x)
            # fp32 sums in another order; a half type then rounds to the neighbour, once in thousands of elements
            assert_close(f"p(x) {align} {words}", ours, reference, 1e-6 if dtype == torch.float32 else 1e-4)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_pool_in_every_configuration(config, memory_format, device, dtype):
    x = torch.randn(3, 24, 15, 14, device=device).to(dtype).contiguous(memory_format=memory_format)
    assert_close("p(x)", pool_triton(x, 2, "ceil", config), pool_reference(x.double(), 2, "ceil"), TOLERANCE[dtype])


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_pool_of_any_strides(device, dtype):
    x = torch.randn(4, 6, 9, 8, device=device).to(dtype)
    for words, view in {
        "transposed": x.mT,
        "every other": x[:, ::2, 1:],
        "expanded": x[:, :, :, :1].expand(x.shape),
    }.items():
        assert_close(words, pool_triton(view, 2, "ceil"), pool_reference(view, 2, "ceil"), 1e-4)  # as above


def test_pool_keeps_infinities_and_nan():
    x = torch.randn(1, 1, 4, 6)
    x[..., 0, 0], x[..., 3, 3], x[..., 2, 5] = torch.inf, torch.nan, -torch.inf
    assert_same("p(x)", pool_triton(x, 2, "ceil").isfinite(), pool_reference(x, 2, "ceil").isfinite())


@pytest.mark.quick(12)
@pytest.mark.parametrize("name,block", TRIED)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient(name, block, device, dtype):
    for align in pooling.ALIGN:
        for words, memory_format in FORMATS.items():
            pooled, dy, geometry = inputs(name, block, align, device, dtype, memory_format)
            ours, _ = conv2d_weight_grad_triton(pooled, dy, geometry, config=SMALL)
            exact = conv2d_weight_grad_reference(pooled.double(), dy.double(), geometry)
            assert (ours.dtype, ours.is_contiguous()) == (dtype, True)
            assert_close(f"dW {align} {words}", ours, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("align", pooling.ALIGN)
@pytest.mark.parametrize("block", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("name", CONVS)
def test_the_sums_that_are_planned_are_those_of_the_rule(name, block, align):
    """Windows and their tables against the rule, of every axis that the kernel could be asked for; nothing is run."""
    _, _, (taps, _), (stride, _), (padding, _), (dilation, _), _ = CONVS[name]
    for length in (7, 9, 13, 14):
        outputs = (length + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        conv = ConvAxis(outputs, length, taps, stride, padding, dilation, min(block, length), align)
        for spread in (False, True):
            axis, stands_for = plan.axis_of(conv, spread)
            belongs, count = plan.belongs_reference(axis), len(axis.offsets)
            met = conv.blocks_met(0, torch.device("cpu"))
            assert torch.equal(belongs[stands_for[0]].any(0 if not spread else 1), met >= 0)
            found = torch.zeros_like(belongs)
            for u in range(axis.written):
                for k, m in enumerate(axis.reach):
                    v = (axis.up * u + axis.start) // axis.down - axis.bias + m
                    for tap in range(count) if 0 <= v < axis.read else ():
                        entry = axis.meets[k * count + tap]
                        checked = entry == Belongs.SOMETIMES
                        found[tap, u, v] = bool(belongs[tap, u, v]) if checked else entry != Belongs.NEVER
            assert (axis.up * 0 + axis.start) >= 0 and torch.equal(found, belongs)


@pytest.mark.quick(6)
@pytest.mark.parametrize("config", triton_taps.CONFIGS, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["3x3", "grouped stem"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_what_taps_meet_in_every_configuration(name, memory_format, config, device, dtype):
    pooled, dy, geometry = inputs(name, 2, "ceil", device, dtype, memory_format)
    chosen, groups = plan_of(pooled, dy, geometry), geometry.conv.groups
    assert chosen.spread == (name == "grouped stem")
    read = pooled if chosen.spread else dy
    ours = triton_taps.met_triton(read, chosen.rows, chosen.columns, groups, chosen.order, config)
    exact = plan.met_reference(read.double(), chosen.rows, chosen.columns, groups)
    assert_close("S", ours, exact, TOLERANCE[dtype])
    assert ours.permute(triton_taps.ORDERS[chosen.order]).is_contiguous()


@pytest.mark.quick(6)
@pytest.mark.parametrize("strides", ["transposed", "every other", "expanded", "mixed formats"])
@pytest.mark.parametrize("name", ["3x3", "grouped stem", "1x1 stride 2"])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient_from_any_strides(name, strides, device, dtype):
    pooled, dy, geometry = inputs(name, 2, "ceil", device, dtype)
    dy = {
        "transposed": dy.mT.contiguous().mT,
        "every other": torch.stack([dy, dy], 2).flatten(1, 2)[:, ::2],
        "expanded": dy[..., :1].expand(dy.shape),
        "mixed formats": dy.contiguous(memory_format=torch.channels_last),
    }[strides]
    ours, _ = conv2d_weight_grad_triton(pooled, dy, geometry, config=SMALL)
    exact = conv2d_weight_grad_reference(pooled.double(), dy.double(), geometry)
    assert_close("dW", ours, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("align", pooling.ALIGN)
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "dilated"])
def test_what_no_tap_meets_does_not_reach_the_gradient(name, align):
    pooled, dy, geometry = inputs(name, 2, align, "cpu", torch.float32)
    dy[:, 1, 0, 0], dy[:, 0, 2, 3] = torch.nan, torch.inf
    ours, _ = conv2d_weight_grad_triton(pooled, dy, geometry, config=SMALL)
    expected = conv2d_weight_grad_reference(pooled, dy, geometry)
    assert_same("finite", ours.isfinite(), expected.isfinite())


def test_gradient_of_nothing_is_zero():
    pooled, dy, geometry = inputs("3x3", 2, "ceil", "cpu", torch.float32)
    ours, _ = conv2d_weight_grad_triton(pooled[:0], dy[:0], geometry)
    assert_same("dW", ours, torch.zeros(geometry.conv.weight_shape))


def test_resnet_takes_the_cheaper_operand():
    """Operand and distinct taps of ResNet-50's convolutions for blocks of 2."""
    plans = {}
    for case in cases.weight_grad_cases():
        _, *arguments = case.make(torch.bfloat16, "meta")
        chosen = plan_of(*arguments)
        plans[case.name.removeprefix("pooled_dw_")] = ("spread" if chosen.spread else "sums", chosen.taps, chosen.kept)
    assert plans["3x3_64_at_56"] == plans["3x3_64_at_56_channels_last"] == ("sums", 9, False)
    assert plans["1x1_64_256_at_56"] == plans["1x1_256_64_at_56"] == ("sums", 1, False)
    assert plans["3x3_stride_2_128_at_56"] == ("sums", 4, False)
    assert plans["7x7_stride_2_3_64_at_224"] == ("spread", 16, False)
    assert plans["1x1_stride_2_256_512_at_56"] == ("spread", 1, True)


@pytest.mark.parametrize("align", pooling.ALIGN)
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape,block", [((2, 3, 8, 10), 2), ((2, 3, 7, 9), 2), ((1, 2, 5, 40), 3)], ids=str)
def test_pool_moves_what_it_declares(shape, block, memory_format, align):
    x = torch.randn(shape).contiguous(memory_format=memory_format)
    with traffic() as moved:
        y = pool_triton(x, block, align)
    covered = x if align == "ceil" else x[:, :, : y.shape[2] * block, : y.shape[3] * block]
    assert moved.total == launch.nbytes(covered, y)


@pytest.mark.quick(3, "*(13, 9)*", "*(36, 20)*")
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "channels,kernel,stride,size,block",
    [
        ((2, 3), 3, 1, (70, 70), 2),  # several tiles, which share the rims of their windows
        ((2, 3), 3, 1, (36, 36), 4),
        ((2, 3), 1, 1, (13, 9), 2),
        ((2, 3), 3, 2, (36, 20), 2),
        ((1, 20), 7, 2, (80, 24), 2),
    ],
    ids=str,
)
def test_taps_move_what_they_declare(channels, kernel, stride, size, block, memory_format):
    x = torch.randn(2, channels[0], *size).contiguous(memory_format=memory_format)
    dy = F.conv2d(x, torch.randn(channels[1], channels[0], kernel, kernel), None, stride, kernel // 2)
    dy = dy.contiguous(memory_format=memory_format)
    weight_shape = torch.Size((*channels[::-1], kernel, kernel))
    conv = ConvGeometry(weight_shape, (stride, stride), (kernel // 2, kernel // 2), (1, 1), 1)
    pooled = pool_reference(x, block, "ceil")
    chosen = plan_of(pooled, dy, PooledConv(conv, size, block, "ceil"))
    arguments = pooled if chosen.spread else dy, chosen.rows, chosen.columns, 1, chosen.order
    with traffic() as moved:
        triton_taps.met_triton(*arguments)
    assert moved.total == triton_taps.met_bytes(*arguments)


def test_the_operations_are_well_formed():
    pooled, dy, geometry = inputs("3x3", 2, "ceil", "cpu", torch.float32)
    torch.library.opcheck(op._conv2d_weight_grad.op, (pooled, dy, *geometry.numbers()))
    for memory_format in FORMATS.values():
        x = torch.randn(2, 3, 7, 9).contiguous(memory_format=memory_format)
        torch.library.opcheck(op._pool.op, (x, 2, "ceil"))
        torch.library.opcheck(op._pool.op, (x, 4, "authors"))


def test_the_operations_compile():
    pooled, dy, geometry = inputs("3x3 stride 2", 2, "ceil", "cpu", torch.float32)
    x = torch.randn(2, 5, 7, 9)

    def both(x, pooled, dy):
        return op._pool.op(x, 2, "ceil"), op._conv2d_weight_grad.op(pooled, dy, *geometry.numbers())

    for name, ours, eager in zip(
        ("p(x)", "dW"), torch.compile(both, fullgraph=True)(x, pooled, dy), both(x, pooled, dy), strict=True
    ):
        assert_same(name, ours, eager)


def test_a_cpu_takes_no_kernel_and_the_codec_asks_the_public_functions(monkeypatch):
    pooled, dy, geometry = inputs("3x3", 2, "ceil", "cpu", torch.float32)
    x, expected = torch.randn(2, 5, 7, 9), conv2d_weight_grad_composed(pooled, dy, geometry)
    assert_same("p(x)", pooling.pool(x, 2, "ceil"), pool_reference(x, 2, "ceil"))
    with launch.recorded() as launches:
        assert_same("dW", pooling.conv2d_weight_grad(pooled, dy, geometry), expected)
    assert not launches
    mimic_gpu(monkeypatch)
    called = []
    for name in ("_pool", "_conv2d_weight_grad"):
        operation = getattr(op, name)
        run = operation.op
        monkeypatch.setattr(operation, "op", lambda *given, run=run, name=name: called.append(name) or run(*given))
    layer = torch.nn.Sequential(torch.nn.Conv2d(5, 6, 3))
    actpress.apply(layer, actpress.methods.Pooling(2))
    layer(x).sum().backward()
    assert called == ["_pool", "_conv2d_weight_grad"] and isinstance(layer[0].codec, PoolingCodec)


@pytest.mark.parametrize(
    ("kernel", "stride", "groups", "block", "too_many"),
    [(3, 1, 1, 2, False), (7, 1, 8, 2, False), (16, 16, 1, 2, False), (31, 1, 8, 2, True), (31, 1, 1, 4, True)],
)
def test_many_taps_are_decoded_before_anything_is_launched(kernel, stride, groups, block, too_many, monkeypatch):
    """What the kernel would write is bounded whatever the convolution, and dW is the same."""
    x, padding = torch.randn(1, 8, 32, 32), 0 if stride == kernel else kernel // 2
    weight_shape = torch.Size((8, 8 // groups, kernel, kernel))
    dy = torch.randn_like(F.conv2d(x, torch.zeros(weight_shape), None, stride, padding, 1, groups))
    conv = ConvGeometry(weight_shape, (stride, stride), (padding, padding), (1, 1), groups)
    geometry = PooledConv(conv, (32, 32), block, "ceil")
    pooled = pool_reference(x, block, "ceil")
    assert plan.has_too_many_taps(pooled, dy, geometry) == too_many
    monkeypatch.setattr(op, "conv2d_weight_grad_triton", lambda *_: ("the kernel", None))
    dw = op._weight_grad_launcher(pooled, dy, *geometry.numbers())
    if too_many:
        exact = conv2d_weight_grad_reference(pooled.double(), dy.double(), geometry)
        assert_close("dW", dw, exact, 1e-6)  # sums of 1024 terms in fp32
    else:
        assert dw == "the kernel"


@pytest.mark.slow
def test_past_two_to_the_31_elements():
    """Only the last program runs; it must find the end of tensors of 4 GiB."""
    x = torch.empty(129, 1, 4096, 4096, dtype=torch.float16)
    x[-1, :, -256:] = torch.randn(1, 256, 4096)
    with last_program_only():
        y = pool_triton(x, 4, "ceil")
    assert_close("p(x)", y[-1, :, -1, -32:], pool_reference(x[-1:, :, -4:, -128:], 4, "ceil")[0, :, 0], 1e-3)
    rows, _ = plan.axis_of(ConvAxis(4096, 4096, 1, 1, 0, 1, 4, "ceil"), False)
    with last_program_only():
        met = triton_taps.met_triton(x, rows, rows, 1, "taps")
    ends = pool_reference(x[-1:, :, -128:, -128:].float(), 4, "ceil")[0] * 16
    assert_close("S", met[0, 0, :, -1, -32:, -32:], ends, 2**-11)  # S rounds to fp16
