"""Predicted saved bytes, and peak bytes against sizes worked out by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from actpress import measure, swap
from actpress.methods import Division, Stock


@pytest.mark.parametrize("method", [Stock(), Division()], ids=lambda m: type(m).__name__)
def test_fake_tensors_give_the_bytes_of_real_ones(method):
    def build():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 10)
        )

    def loss(net):
        return F.cross_entropy(net(torch.ones(4, 3, 16, 16)), torch.zeros(4, dtype=torch.long))

    real = build()
    swap.apply(real, method)
    with measure.fake_model(build) as fake:
        swap.apply(fake, method)
        predicted = measure.saved_bytes(lambda: loss(fake))
    assert predicted == measure.saved_bytes(lambda: loss(real))


def test_peak_bytes_of_a_chain():
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(1000, 8)
    parameters = sum(p.nbytes for p in net.parameters())

    def step():
        net(x).sum().backward()

    forward = 1000 * 16 * 4 * 2  # the last linear's input and the gradient that reaches it
    peak = measure.peak_bytes(step, "cpu", (net, x))
    assert forward + x.nbytes + 2 * parameters <= peak <= 1.6 * forward + x.nbytes + 3 * parameters


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("CUDNN_STATUS_ALLOC_FAILED"), False),
    ],
    ids=str,
)
def test_out_of_memory_is_recognized(error, expected):
    assert measure.is_out_of_memory(error) is expected
