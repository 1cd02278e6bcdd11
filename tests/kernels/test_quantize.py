"""Group quantisation: the reference against the formulas, group by group, and what it promises."""

import pytest
import torch

from actpress.codec import Context
from actpress.kernels import quantize
from actpress.kernels.common.groups import GROUPINGS, LARGEST, partition
from actpress.kernels.common.layout import is_channels_last
from actpress.kernels.quantize import Format, code_bytes, decode_reference, encode_reference

SHAPES = [(1,), (7,), (3, 63), (2, 197, 8), (2, 3, 7, 7), (3, 5, 14, 9), (1, 2, 3, 4, 5)]
SIZES = [1, 5, 24, 256]
KINDS = [("group", size) for size in SIZES] + [("channel", 256), ("sample", 256)]


def groups_of(x, grouping, size):
    """The groups of a contiguous tensor, one by one, as (index tensors into x.view(-1))."""
    index = torch.arange(x.numel()).view(x.shape)
    samples = list(index) if x.dim() > 1 else [index]
    if grouping == "group":
        return [part for sample in samples for part in sample.reshape(-1).split(size)]
    if grouping == "channel" and x.dim() > 2:
        channels = -1 if x.dim() == 3 else 0
        return [channel.reshape(-1) for sample in samples for channel in sample.movedim(channels, 0)]
    return [sample.reshape(-1) for sample in samples]


def code_and_decode(x, noise, grouping, size, bits):
    format = Format(grouping, size, bits)
    code = encode_reference(x, noise, format)
    return code, decode_reference(code, x.shape, x.dtype, is_channels_last(x), format)


def steps_like(x, code, grouping, size):
    """The step of each element's group, of a contiguous x, fp32."""
    step = torch.empty(x.numel())
    for group, value in zip(groups_of(x, grouping, size), code.step.float(), strict=True):
        step[group] = value
    return step.view(x.shape)


@pytest.mark.quick(40)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("grouping", "size"), KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_each_group_spans_its_least_to_its_greatest(shape, grouping, size, bits):
    x = torch.randn(shape) * 3 + 1
    code, decoded = code_and_decode(x, torch.rand(shape), grouping, size, bits)
    groups = groups_of(x, grouping, size)
    assert len(groups) == len(code.low) == len(code.step) == partition(x.shape, False, grouping, size).groups
    flat = x.view(-1)
    least, greatest = (torch.stack([bound(flat[group]) for group in groups]) for bound in (torch.amin, torch.amax))
    top = code.low.float() + (2**bits - 1) * code.step.float()
    slack = 2**-7 * torch.maximum(least.abs(), greatest - least)  # a bf16 has 8 bits
    assert (code.low.float() <= least).all() and (code.low.float() >= least - slack).all()
    # from the rounded low, and one rounding of fp32 in the product
    assert (top >= greatest - 1e-6 * greatest.abs()).all() and (top <= greatest + 2 * slack).all()
    error = (decoded - x).abs()
    # one step of stochastic rounding, plus fp32 rounding of the sum
    assert (error <= steps_like(x, code, grouping, size) + 1e-6 * x.abs().amax()).all(), f"x~: {error.max()}"


@pytest.mark.parametrize(("grouping", "size"), KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_nearest_is_off_by_half_a_step(grouping, size, bits):
    x = torch.randn(3, 4, 9, 7)
    code, decoded = code_and_decode(x, None, grouping, size, bits)
    # fp32 rounding of the sum beside the half
    assert ((decoded - x).abs() <= 0.5 * steps_like(x, code, grouping, size) + 1e-6 * x.abs().amax()).all()


@pytest.mark.quick(8)
@pytest.mark.parametrize(("grouping", "size"), [("group", 256), ("group", 24), ("channel", 256), ("sample", 256)])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_rounding_is_unbiased(grouping, size, bits):
    """The mean over all noise is x. With n evenly spread noise values a rounding of v to neighbours has mean v within 1/n."""
    x, n = torch.randn(2, 3, 9, 9), 256
    total = torch.zeros_like(x)
    for i in range(n):
        code, decoded = code_and_decode(x, torch.full_like(x, (i + 0.5) / n), grouping, size, bits)
        total += decoded
    bias = (total / n - x).abs() / steps_like(x, code, grouping, size)
    assert bias.max() < 1.01 / n, f"x~: the mean is {bias.max():.4f} steps from x, 1 / n is {1 / n:.4f}"


@pytest.mark.quick(40)
@pytest.mark.parametrize("shape", [*SHAPES, (0,), (2, 0, 3, 4)], ids=str)
@pytest.mark.parametrize(("grouping", "size"), KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_bytes_are_as_declared(shape, grouping, size, bits):
    x = torch.randn(shape)
    code, decoded = code_and_decode(x, torch.rand(shape), grouping, size, bits)
    assert sum(t.nbytes for t in code) == code_bytes(x.shape, Format(grouping, size, bits))
    assert decoded.shape == x.shape


@pytest.mark.parametrize(
    ("grouping", "bits", "bits_per_element"), [("group", 2, 2.125), ("channel", 2, 2 + 32 / 3136), ("sample", 8, 8.0)]
)
def test_bits_per_element_of_the_formula(grouping, bits, bits_per_element):
    shape = torch.Size((64, 256, 56, 56))
    measured = 8 * code_bytes(shape, Format(grouping, 256, bits)) / shape.numel()
    assert measured == pytest.approx(bits_per_element, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grouping", ["channel", "sample"])
def test_channels_last_gives_the_same_values(dtype, grouping):
    x, noise = torch.randn(2, 5, 11, 13).to(dtype), torch.rand(2, 5, 11, 13)
    code, expected = code_and_decode(x, noise, grouping, 256, 2)
    nhwc = x.to(memory_format=torch.channels_last)
    other, decoded = code_and_decode(nhwc, noise, grouping, 256, 2)
    assert decoded.dtype == dtype and is_channels_last(decoded)
    assert torch.equal(decoded, expected)
    assert torch.equal(other.low, code.low) and torch.equal(other.step, code.step)


def test_channels_last_groups_run_through_memory():
    x = torch.randn(2, 5, 11, 13).to(memory_format=torch.channels_last)
    code, decoded = code_and_decode(x, None, "group", 24, 4)
    expected, expected_decoded = code_and_decode(x.permute(0, 2, 3, 1), None, "group", 24, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(code, expected, strict=True))
    assert torch.equal(decoded.permute(0, 2, 3, 1), expected_decoded)


def test_channels_of_tokens_are_features():
    x = torch.randn(2, 12, 5)
    as_map = x.transpose(1, 2).contiguous().view(2, 5, 3, 4)
    _, decoded = code_and_decode(x, None, "channel", 256, 2)
    _, expected = code_and_decode(as_map, None, "channel", 256, 2)
    assert torch.equal(decoded.transpose(1, 2).reshape(as_map.shape), expected)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("step", [1.0, 3.0, 0.375, 127.0])
def test_what_the_code_can_represent_is_kept(bits, step):
    """Values low + k step of a group in which k = 0 and k = 2^Q - 1 occur; all numbers here are exact in fp32 and bf16."""
    k = torch.randint(2**bits, (4, 3, 8, 8))
    k[..., 0, 0], k[..., 0, 1] = 0, 2**bits - 1
    low = torch.tensor([-64, -4, -1, 0, 1, 8])[torch.randint(6, (4, 3, 1, 1))]
    x = low * step + k * step
    code, decoded = code_and_decode(x, None, "channel", 256, bits)
    assert (code.step == step).all() and torch.equal(code.low, (low * step).flatten().bfloat16())
    assert torch.equal(decoded, x)
    # The inverse of the step is rounded: up to 255 * 2^-24 of a step is lost, which only noise as close to 0 or 1 sees.
    _, decoded = code_and_decode(x, torch.rand(x.shape).clamp(2**-12, 1 - 2**-12), "channel", 256, bits)
    assert torch.equal(decoded, x)


@pytest.mark.parametrize("value", [0.0, 3.140625, -1.5, 2.0**-126, 2.0**120])
@pytest.mark.parametrize(("grouping", "size"), KINDS)
def test_constant_groups_that_bf16_holds_are_exact(value, grouping, size):
    x = torch.full((2, 3, 5, 5), value)
    code, decoded = code_and_decode(x, torch.rand(x.shape), grouping, size, 2)
    assert torch.equal(decoded, x) and (code.step == 0).all()


def test_constant_groups_are_as_close_as_their_code():
    """Those that bf16 does not hold lie between low and low + step, which is bf16's spacing by then."""
    x = torch.full((2, 3, 5, 5), 3.1415926)
    code, decoded = code_and_decode(x, torch.rand(x.shape), "channel", 256, 2)
    assert ((decoded - x).abs() <= code.step.float().view(2, 3, 1, 1)).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("grouping", "size"), [("group", 24), ("channel", 256)])
def test_what_is_not_finite_spoils_its_group_alone(bad, grouping, size):
    x = torch.randn(2, 3, 6, 6)
    _, expected = code_and_decode(x, None, grouping, size, 2)
    x.view(-1)[50] = bad
    _, decoded = code_and_decode(x, None, grouping, size, 2)
    (group,) = (group for group in groups_of(x, grouping, size) if 50 in group)
    spoilt = torch.zeros(x.numel(), dtype=torch.bool).index_fill(0, group, True).view(x.shape)
    assert decoded[spoilt].isnan().all() and torch.equal(decoded[~spoilt], expected[~spoilt])


def test_ranges_of_the_smallest_numbers_count_as_constant():
    x = torch.rand(1000) * 1e-41
    _, decoded = code_and_decode(x, torch.rand(1000), "sample", 256, 2)
    assert decoded.isfinite().all() and (decoded - x).abs().max() <= 1e-41


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_fp64_is_computed_in_fp64(grouping):
    x = 1 + 1e-9 * torch.rand(3, 4, 8, 8, dtype=torch.float64)
    _, decoded = code_and_decode(x, None, grouping, 256, 8)
    assert decoded.dtype == torch.float64
    # low and step are bf16, so the grid is that of bf16's spacing at 1, and x is within half a step of it
    assert (decoded - x).abs().max() <= 2**-8 / 255


@pytest.mark.parametrize("source", [Context(3), None], ids=["stochastic", "nearest"])
def test_public_functions_are_the_reference_on_a_cpu(source):
    x = torch.randn(2, 3, 9, 9)
    format = Format("channel", bits=4)
    code = quantize.encode(x, source, format)
    noise = None if source is None else Context(3).uniform_like(x)
    expected, decoded = code_and_decode(x, noise, "channel", 256, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(code, expected, strict=True))
    assert torch.equal(quantize.decode(code, x.shape, x.dtype, False, format), decoded)


@pytest.mark.slow
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_public_functions_compile_to_one_graph(grouping):
    """The same values up to the order in which the compiler rounds: a step of the code at most."""
    x, format = torch.randn(2, 3, 10, 10), Format(grouping, 64, 4)

    @torch.compile(fullgraph=True)
    def there_and_back(x):
        code = quantize.encode(x, None, Format(grouping, 64, 4))
        return code.step, quantize.decode(code, x.shape, x.dtype, False, Format(grouping, 64, 4))

    step, decoded = there_and_back(x)
    expected = quantize.decode(quantize.encode(x, None, format), x.shape, x.dtype, False, format)
    assert ((decoded - expected).abs() <= step.float().max()).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grouping": "row"}, "quantize: grouping='row', allowed: group, channel, sample"),
        ({"size": 0}, f"quantize: size=0, allowed: integers from 1 to {LARGEST}"),
        ({"size": 2 * LARGEST}, f"quantize: size={2 * LARGEST}, allowed: integers from 1 to {LARGEST}"),
        ({"bits": 3}, "quantize: bits=3, allowed: 1, 2, 4, 8"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_refuses(options, message):
    with pytest.raises(ValueError) as error:
        quantize.encode(torch.randn(4, 4), None, Format(**options))
    assert str(error.value) == message


@pytest.mark.quick(30)
@pytest.mark.parametrize(("grouping", "size"), KINDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sign", [1, -1], ids=["up", "down"])
def test_the_end_of_a_dtype_decodes_to_finite_numbers(grouping, size, bits, dtype, sign):
    """What is decoded past it, since a step is rounded up, is its largest number."""
    for part in (1, 0.999, 0.95):
        top = torch.finfo(dtype).max * part
        x = (torch.rand(2, 3, 7, 9) * sign * top).to(dtype)
        x[..., 0, 0], x[..., -1, -1] = sign * top, 0
        code, decoded = code_and_decode(x, torch.rand(x.shape), grouping, size, bits)
        assert decoded.isfinite().all()
        # a step, the bounds that bf16 cuts off, and rounding of x~
        error = (decoded.double() - x.double()).abs()
        step = steps_like(x, code, grouping, size).double().abs()  # below 0 where bf16 cannot hold the only number
        assert (error <= 1.01 * step + 2**-7 * x.double().abs()).all()


@pytest.mark.parametrize(("grouping", "size"), KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_groups_with_what_fp32_cannot_hold_decode_to_nan(grouping, size, value):
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    x[1, 2, 3, 4] = value
    _, decoded = code_and_decode(x, torch.rand(x.shape), grouping, size, 2)
    for group in groups_of(x, grouping, size):
        held = x.view(-1)[group].float().isfinite().all()
        assert decoded.view(-1)[group].isfinite().all() if held else decoded.view(-1)[group].isnan().all()


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_range_that_exceeds_fp32_decodes_to_nan(bits):
    x = torch.tensor([[3e38, -3e38, 0.0, 1.0], [3e38, 0.0, 1.0, 2.0]])
    _, decoded = code_and_decode(x, torch.rand(x.shape), "sample", 256, bits)
    assert decoded[0].isnan().all() and decoded[1].isfinite().all()
