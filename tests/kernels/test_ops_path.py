"""The path that CUDA tensors take, through registered operations, on a CPU, where their body is the reference.

On the CPU layers call references directly. Here CPU tensors are sent through the operations instead: everything must stay as it is,
outputs, gradients, their strides and what is kept, in eager mode, compiled and with fake tensors. In eager mode, where nobody watches, CUDA
tensors skip the operations too and go to the launchers, whose kernels run in Triton's interpreter here.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import actpress
from actpress import measure
from actpress.kernels import masks
from actpress.kernels.common import launch
from actpress.methods import BlockPruning, Division, FewBit, Inverted, Pooling, Quantize
from actpress.swap import Method
from devices import INTERPRETED, mimic_gpu
from networks import convolutions


class Case(NamedTuple):
    """A layer or a model, the shape of its input, and a method for it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    method: Method
    noisy: bool = False  # stochastic rounding: compiled code draws other noise


CASES = {
    "relu": Case(nn.ReLU, (2, 6, 9, 7), Division()),
    "relu in place": Case(lambda: nn.ReLU(inplace=True), (2, 6, 9, 7), Division()),
    "relu of tokens": Case(nn.ReLU, (3, 197, 5), Division()),
    "dropout": Case(lambda: nn.Dropout(0.3), (2, 6, 9, 7), Division()),
    "dropout of tokens": Case(lambda: nn.Dropout(0.3), (3, 197, 5), Division()),
    "max pool": Case(lambda: nn.MaxPool2d(3, 2, 1), (2, 6, 9, 7), Division()),
    "max pool ceil dilated": Case(lambda: nn.MaxPool2d((2, 3), (2, 1), 1, (1, 2), ceil_mode=True), (1, 3, 8, 9), Division()),
    "max pool large window": Case(lambda: nn.MaxPool2d(17), (1, 2, 35, 40), Division()),
    "max pool unbatched": Case(lambda: nn.MaxPool2d(2), (6, 9, 7), Division()),
    "division": Case(convolutions, (4, 3, 11, 10), Division(bits=8), noisy=True),
    "division of tokens": Case(lambda: nn.Linear(12, 7), (2, 19, 12), Division(bits=8), noisy=True),
    "quantize": Case(convolutions, (2, 3, 11, 10), Quantize(rounding="nearest")),
    "quantize groups": Case(convolutions, (2, 3, 11, 10), Quantize(rounding="nearest", grouping="group", size=32)),
    "pooling": Case(convolutions, (2, 3, 11, 10), Pooling()),
    "pruning": Case(lambda: nn.Linear(12, 7), (2, 19, 12), BlockPruning(sparsity=0.5, block=(4, 4))),
    "inverted": Case(nn.GELU, (2, 6, 9, 7), Inverted()),
    "few-bit": Case(nn.SiLU, (2, 6, 9, 7), FewBit()),
}  # fmt: skip
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PAIRS = [
    pytest.param(CASES[name], memory_format, id=f"{name}, {label}")
    for name in CASES
    for label, memory_format in FORMATS.items()
    if label == "contiguous" or len(CASES[name].shape) == 4
]


class Operations(TorchDispatchMode):
    """Counts the registered operations that run, and those among them that are handed fp64."""

    def __init__(self):
        super().__init__()
        self.count = self.doubles = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "actpress":
            self.count += 1
            self.doubles += any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in args)
        return func(*args, **(kwargs or {}))


def prepared(case, memory_format, dtype=torch.float32):
    """(the model with the method applied, x)"""
    torch.manual_seed(0)
    model = case.build().to(dtype)
    actpress.apply(model, case.method)
    x = torch.randn(case.shape).to(dtype).to(memory_format=memory_format)
    return model.to(memory_format=memory_format), x


def step(model, x, run=None):
    """{name: tensor} of one forward and backward pass, that noise included which the model draws. run: the model, compiled."""
    model = copy.deepcopy(model) if run is None else model
    torch.manual_seed(5)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = (model if run is None else run)(leaf * 1)  # * 1: in-place layers may not touch a leaf
    torch.manual_seed(6)
    y.backward(torch.randn_like(y))
    return {"y": y, "dx": leaf.grad, **{name: p.grad for name, p in model.named_parameters()}}


def assert_identical(ours, expected):
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].stride() == tensor.stride(), f"{name}: {ours[name].stride()}"
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("case", "memory_format"), PAIRS)
def test_eager(case, memory_format, dtype, monkeypatch):
    model, x = prepared(case, memory_format, dtype)
    with Operations() as direct:
        expected = step(model, x)
    mimic_gpu(monkeypatch)
    with Operations() as through:
        ours = step(model, x)
    assert direct.count == 0 and through.count >= 2  # at least one on the way there and one on the way back
    assert_identical(ours, expected)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need the interpreter")
@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", ["relu", "relu in place", "dropout", "max pool", "quantize"])  # equal bit for bit
def test_without_operations(name, memory_format, monkeypatch):
    model, x = prepared(CASES[name], memory_format)
    expected = step(model, x)
    mimic_gpu(monkeypatch)
    monkeypatch.setattr(launch, "directly", launch.plain)
    launched, run = [], launch.run
    monkeypatch.setattr(
        launch, "run", lambda kernel, *args, **how: (launched.append(kernel), run(kernel, *args, **how))
    )
    refuse_operations(monkeypatch)
    assert_identical(step(model, x), expected)
    assert len(launched) >= 2


def refuse_operations(monkeypatch):
    def refused(op, *_):
        raise AssertionError(f"{op._qualname} was called")

    monkeypatch.setattr(CustomOpDef, "__call__", refused)


@pytest.mark.skipif(not INTERPRETED, reason="CPU tensors need the interpreter")
def test_a_change_in_place_is_counted_without_operations_too(monkeypatch):
    mimic_gpu(monkeypatch)
    monkeypatch.setattr(launch, "directly", launch.plain)
    x = torch.randn(3, 5)
    with torch.no_grad():
        masks.relu_(x)
    assert x._version == 1 and (x >= 0).all()


def test_whoever_looks_sees_operations():
    x = torch.randn(2, 3)
    assert not launch.plain(x)  # autograd may record
    with torch.no_grad():
        assert launch.plain(x) and launch.plain(nn.Parameter(x))
        assert not launch.directly(x)  # on a CPU
        assert not launch.plain(torch._neg_view(x)) and not launch.plain(torch._efficientzerotensor(3))
        assert not launch.plain(x.as_subclass(type("Subclass", (torch.Tensor,), {})))
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
        assert not launch.plain(fake)
        with Operations():
            assert not launch.plain(x)
        seen = []
        torch.func.vmap(lambda row: (seen.append(launch.plain(row)), row)[1])(x)
        torch.jit.trace(lambda x: (seen.append(launch.plain(x)), x * 1)[1], x, check_trace=False)
        assert not any(seen) and len(seen) == 2


@pytest.mark.quick(
    5, "relu, contiguous", "dropout, contiguous", "pruning*", "inverted, contiguous", "few-bit, contiguous"
)
@pytest.mark.parametrize(("case", "memory_format"), PAIRS)
def test_compiled(case, memory_format, monkeypatch):
    """Against the direct path compiled: compiled code may draw noise, dropout's too, in another order."""
    ours, expected = compiled_both_ways(case, memory_format, monkeypatch, backend="aot_eager")
    if not case.noisy:
        assert_identical(ours, expected)
    for name, tensor in expected.items():  # 8 bits: two draws differ by .4% of the range at most, per element
        error = (ours[name] - tensor).norm() / tensor.norm()
        assert error < 0.02, f"{name}: relative error {error:.1e}"


@pytest.mark.slow
def test_compiled_by_inductor(monkeypatch):
    layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.ReLU(inplace=True))
    case = Case(lambda: nn.Sequential(*copy.deepcopy(layers)), (2, 3, 9, 7), Pooling(block=1))
    assert_inductor_agrees(case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["division", "quantize", "pooling", "inverted", "few-bit", "max pool"])
def test_every_method_compiled_by_inductor(name, monkeypatch):
    assert_inductor_agrees(CASES[name], monkeypatch)


def assert_inductor_agrees(case, monkeypatch):
    ours, expected = compiled_both_ways(case, torch.channels_last, monkeypatch, backend="inductor")
    for name, tensor in expected.items():  # fused otherwise; noise as in test_compiled
        error = (ours[name] - tensor).norm() / tensor.norm()
        assert error < (0.02 if case.noisy else 1e-5), f"{name}: relative error {error:.1e}"


def compiled_both_ways(case, memory_format, monkeypatch, backend):
    """(results of the registered operations, those of the direct path)"""
    results = []
    for through in (False, True):
        if through:
            mimic_gpu(monkeypatch)
        torch._dynamo.reset()
        model, x = prepared(case, memory_format)
        results.append(step(model, x, torch.compile(model, fullgraph=True, backend=backend)))
    return reversed(results)


@pytest.mark.parametrize(("case", "memory_format"), PAIRS)
def test_fake_tensors(case, memory_format, monkeypatch):
    model, x = prepared(case, memory_format)
    expected = step(model, x)
    mimic_gpu(monkeypatch)
    fake = copy.deepcopy(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Operations() as through:
        fake.to_empty(device="cpu")
        ours = step(fake, mode.from_tensor(x), fake)
    assert through.count >= 2
    for name, tensor in expected.items():
        for of in (torch.Tensor.size, torch.Tensor.stride, lambda t: t.dtype):
            assert of(ours[name]) == of(tensor), f"{name}: {of(ours[name])}"


@pytest.mark.parametrize(("case", "memory_format"), PAIRS)
def test_saved_bytes(case, memory_format, monkeypatch):
    model, x = prepared(case, memory_format)
    saved = []
    for through in (False, True):
        if through:
            mimic_gpu(monkeypatch)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        saved.append(measure.saved_bytes(lambda leaf=leaf: model(leaf * 1).sum()))
    assert saved[0] == saved[1] > 0


@pytest.mark.parametrize(("case", "memory_format"), PAIRS)
def test_doubles_take_the_reference(case, memory_format, monkeypatch):
    mimic_gpu(monkeypatch)
    with Operations() as through:
        step(*prepared(case, memory_format, torch.float64))
    assert through.doubles == 0
