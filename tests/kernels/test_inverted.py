"""The derivative from output and bit: against the exact derivative, at every 16-bit input, in any layout."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from actpress.kernels.common import compare
from actpress.kernels.inverted import DECODERS, FITS, FUNCTIONS, decoded_by
from actpress.kernels.inverted.reference import derivative_reference, input_grad_reference, left_reference
from actpress.measure import derivatives
from actpress.methods.inverted import FromOutput
from paths import ROOT

FORWARD = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.slow
def test_the_coefficients_are_what_the_script_generates():
    command = [sys.executable, ROOT / "scripts/dev/fit_inverse.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "function,x_min,y_min",
    [  # to 17 digits, from an independent computation
        ("gelu", -0.75179152469356446, -0.16997120747990366),
        ("gelu_tanh", -0.75246142207101626, -0.17004075057125405),
        ("silu", -1.2784645427610738, -0.2784645427610738),
        ("quick_gelu", -0.75115425544128895, -0.2784645427610738),  # y in SiLU's units
    ],
)
def test_minima(function, x_min, y_min):
    assert (FITS[function].x_min, FITS[function].y_min) == (x_min, y_min)


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fit_in_double_precision(function, decoder):
    """fp64 outputs are exact for this purpose, so what remains is the error of the rational functions."""
    x = torch.linspace(-40, 40, 200_001, dtype=torch.float64)
    d = derivative_reference(FORWARD[function](x), left_reference(x, function), decoded_by(function, decoder))
    assert (d - derivatives.slope(x, function)).abs().max() < {"fine": 1.7e-6, "medium": 5.3e-4, "coarse": 1.5e-3}[
        decoder
    ]


@pytest.mark.parametrize("decoder", DECODERS[1:])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_coarser_decoder_hardly_shows_in_bf16(function, decoder):
    """Its largest error is within a tenth of the floor, which is the rounding of the output."""
    error = derivatives.derivative_error(FromOutput(decoder=decoder), function, "bf16")
    assert error.max <= 1.1 * error.floor_max


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_finite_and_bounded_for_every_finite_input(function, dtype):
    if dtype.itemsize == 2:
        x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        x = x[x.isfinite()]
    else:
        top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
        powers = torch.logspace(-45, 38, 5000, dtype=torch.float64).to(dtype)
        x = torch.cat([torch.tensor([0.0, -0.0, top, -top, tiny, -tiny, tiny / 4], dtype=dtype), powers, -powers])
    y = FORWARD[function](x)
    d = derivative_reference(y, left_reference(x, function), function)
    assert d.isfinite().all()
    assert (d > -0.14).all() and (d < 1.14).all()
    assert ((d[x > 20] - 1).abs() < 1.7e-6).all()  # the error of the fit
    assert (d[x < -40].abs() < 1e-12).all()  # SiLU: 40 exp(-40) is 2e-16


@pytest.mark.parametrize("function", FITS)
def test_any_output_gives_a_finite_derivative(function):
    """Also outputs that the function does not have: below the minimum, or positive with the left bit set."""
    y = torch.tensor([-1e30, -1.0, -0.3, -0.0, 0.0, 0.5, 1e30])
    for left in (True, False):
        assert derivative_reference(y, torch.full(y.shape, left), function).isfinite().all()


def test_not_a_number_stays_one():
    y = torch.tensor([float("nan")])
    assert derivative_reference(y, torch.tensor([False]), "gelu").isnan().all()
    assert derivative_reference(y, torch.tensor([True]), "gelu").isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_sign_next_to_the_minimum(function, dtype):
    x = FITS[function].x_min + torch.tensor([-0.1, -0.01, 0.01, 0.1], dtype=dtype)
    d = derivative_reference(FORWARD[function](x), left_reference(x, function), function)
    assert d.sign().tolist() == [-1, -1, 1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_bit_is_exact(function, dtype):
    """Also for the neighbours of the minimum, which the dtype cannot hold."""
    x_min = FITS[function].x_min
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    near = torch.tensor(x_min, dtype=dtype).view(integer) + torch.arange(-5, 6, dtype=integer)
    x = near.view(dtype)
    assert torch.equal(left_reference(x, function), x.double() < x_min)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [-1.2784645427610738, -0.7517915246935645, 0.1, 1 / 3, 2.41694646, 0.0, 1.0])
def test_least_not_below(value, dtype):
    found = compare.least_not_below(value, dtype)
    number = torch.tensor(found, dtype=dtype)
    below = number.double() - torch.finfo(dtype).eps * max(abs(found), torch.finfo(dtype).tiny)
    assert number.double().item() == found >= value
    assert value == found or below.item() < value


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[::2, 1::3], lambda x: x.expand(3, 7, 9), lambda x: x[0, 0], lambda x: x[:0]],
    ids=["transposed", "strided", "expanded", "scalar", "empty"],
)
def test_any_strides(function, view):
    x = torch.randn(7, 9)
    dy, y, left = (view(t) for t in (torch.randn(7, 9), FORWARD[function](x), left_reference(x, function)))
    expected = input_grad_reference(dy.contiguous(), y.contiguous(), left.contiguous(), function)
    # PyTorch's vectorised and scalar exp and log1p may differ in the last bit
    torch.testing.assert_close(input_grad_reference(dy, y, left, function), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_gradient_has_the_upstream_dtype(dtype):
    x = torch.randn(5, dtype=dtype)
    dx = input_grad_reference(torch.ones(5, dtype=dtype), F.gelu(x), left_reference(x, "gelu"), "gelu")
    assert dx.dtype == dtype
