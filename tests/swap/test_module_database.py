"""PyTorch's own database of modules: every sample of every layer that has a rule, under every method."""

import copy

import pytest
import torch
from torch import nn

import actpress
from actpress.methods import BlockPruning, Division, FewBit, Frequency, Inverted, Pooling, Quantize

METHODS = (
    *(Division(), Division(align="authors"), Division(relu_mask=True), Frequency()),
    *(Quantize(), Quantize(grouping="group"), Quantize(grouping="sample"), Quantize(levels="normal")),
    *(Pooling(), Pooling(align="authors"), Pooling(reduce="max")),
    *(BlockPruning(skip=()), BlockPruning(skip=(), select="sample"), Inverted(), FewBit()),
)
MODULES = [
    *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.AvgPool2d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm),
    *(nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Mish, nn.Softplus),
    *(nn.GELU, nn.SiLU),
]


def module_samples(cls):
    """PyTorch's own inputs of a module: (constructor's arguments, forward's arguments)."""
    pytest.importorskip("expecttest", reason="PyTorch's database of modules needs the package expecttest")
    from torch.testing._internal.common_modules import module_db

    info = next(info for info in module_db if info.module_cls is cls)
    for training in (True, False):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for sample in info.module_inputs_func(info, "cpu", dtype, True, training):
                yield training, dtype, sample.constructor_input, sample.forward_input


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", MODULES, ids=lambda cls: cls.__name__)
def test_the_module_database_of_pytorch(cls):
    chosen = [method for method in METHODS if method.replacement("0", cls.__new__(cls)) is not None]
    assert chosen
    for training, dtype, made_of, given in module_samples(cls):
        stock = nn.Sequential(cls(*made_of.args, **made_of.kwargs)).to(dtype).train(training)
        for method in chosen:
            ours = copy.deepcopy(stock)
            actpress.apply(ours, method)
            results = []
            for net in (stock, ours):
                torch.manual_seed(1)
                net.zero_grad()
                args = [a.detach().clone().requires_grad_(a.is_floating_point()) for a in given.args]
                kwargs = {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in given.kwargs.items()}
                y = net[0](*args, **kwargs)
                y = y[0] if isinstance(y, tuple) else y
                y.float().sum().backward()
                results.append((y.detach(), [a.grad for a in args] + [p.grad for p in net.parameters()]))
            (y_stock, expected), (y, got) = results
            where = f"{made_of.kwargs}, {dtype}, training={training}, {method}"
            assert torch.equal(y, y_stock), where
            for gradient, stock_gradient in zip(got, expected, strict=True):
                assert (gradient is None) == (stock_gradient is None), where
                if gradient is not None:
                    assert (gradient.dtype, gradient.shape) == (stock_gradient.dtype, stock_gradient.shape), where
                    assert gradient.isfinite().all(), where
