"""Block-sparse pruning: the reference against dense products, loops and closed formulas, on ugly sizes."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from actpress.kernels.pruning import reference
from actpress.kernels.pruning.reference import (
    Blocks,
    block_grid,
    block_scores_reference,
    code_bytes,
    decode_reference,
    encode_reference,
    inclusion_reference,
    kept_blocks,
    sample_reference,
    take_reference,
    topk_reference,
    weight_grad_reference,
)

SHAPES = [(1, 1), (1, 7), (7, 1), (8, 8), (9, 17), (3, 180), (108, 3), (197, 63)]
BLOCKS = [(1, 1), (4, 4), (8, 8), (3, 5), (32, 32), (1, 384), (16, 4)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def encoded(x, block=(8, 8), sparsity=0.8, noise=None):
    grid = block_grid(x.shape, block)
    return encode_reference(x, grid, kept_blocks(grid, sparsity), noise), grid


def padded_blocks(x, grid):
    """Every block of x with its position, cut by loops."""
    for i, j in itertools.product(range(grid.down), range(grid.across)):
        rows, columns = slice(i * grid.height, (i + 1) * grid.height), slice(j * grid.width, (j + 1) * grid.width)
        block = x.new_zeros(grid.height, grid.width)
        part = x[rows, columns]
        block[: part.shape[0], : part.shape[1]] = part
        yield i * grid.across + j, block


def relative_error(name, got, expected):
    error = ((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()
    return error, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_scores_are_means_in_which_padding_counts_as_zeros(shape, block):
    x = torch.randn(shape, dtype=torch.float64)
    grid = block_grid(x.shape, block)
    expected = torch.stack([cut.abs().mean() for _, cut in padded_blocks(x, grid)])
    torch.testing.assert_close(block_scores_reference(x, grid), expected)


@pytest.mark.quick(30)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_topk_keeps_the_largest_blocks_and_nothing_else(shape, block, sparsity):
    x = torch.randn(shape)
    blocks, grid = encoded(x, block, sparsity)
    cuts = dict(padded_blocks(x, grid))
    kept = blocks.index.tolist()
    assert kept == sorted(set(kept))
    for position, values in zip(kept, blocks.values, strict=True):
        assert torch.equal(values, cuts[position])
    dropped = [cut.abs().sum() for position, cut in cuts.items() if position not in kept]
    assert not dropped or min(cuts[position].abs().sum() for position in kept) >= max(dropped)
    expected = sum(cuts[position].abs().double().sum() for position in kept)
    decoded = decode_reference(blocks, grid)
    assert decoded.shape == x.shape and ((decoded == x) | (decoded == 0)).all()
    torch.testing.assert_close(decoded.abs().double().sum(), expected)  # none of the kept blocks is lost or doubled


def test_ties_go_to_the_first_block():
    assert topk_reference(torch.tensor([1.0, 3, 2, 2, 2, 3]), 4).tolist() == [1, 2, 3, 5]
    assert topk_reference(torch.ones(1000), 10).tolist() == list(range(10))


@pytest.mark.quick(40)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_bytes_are_as_declared(shape, block, dtype):
    for noise in (None, torch.rand(1)):
        blocks, grid = encoded(torch.randn(shape).to(dtype), block, 0.8, noise)
        assert blocks.values.dtype == dtype and blocks.index.dtype == torch.int32
        assert sum(t.nbytes for t in blocks) == code_bytes(grid, 0.8, dtype.itemsize)


@pytest.mark.parametrize(
    ("block", "percent"), [((4, 4), 6.25), ((8, 8), 1.5625), ((16, 16), 0.390625), ((32, 32), 0.09765625)], ids=str
)
def test_overhead_of_the_positions_in_fp32(block, percent):
    blocks, _ = encoded(torch.randn(196, 384), block)
    assert 100 * blocks.index.nbytes / blocks.values.nbytes == percent


@pytest.mark.parametrize(
    ("count", "sparsity", "kept"),
    [(10, 0.8, 2), (10, 0.75, 3), (10, 0.99, 1), (1, 0.9, 1), (1176, 0.9, 118), (7, 0, 7)],
)
def test_number_of_kept_blocks_is_the_nearest(count, sparsity, kept):
    assert kept_blocks(block_grid(torch.Size((count, 1)), (1, 1)), sparsity) == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_keeping_all_blocks_is_lossless(shape, dtype, select):
    x = torch.randn(shape).to(dtype)
    blocks, grid = encoded(x, (3, 5), 0.0, torch.rand(1) if select == "sample" else None)
    assert torch.equal(decode_reference(blocks, grid), x)


@pytest.mark.quick(50)
@pytest.mark.parametrize("chunk", [1, 500, 2**20], ids="chunk {}".format)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_weight_gradient_is_that_of_the_dense_product(shape, block, chunk, sparsity, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", chunk)
    x, dy = torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], 5, dtype=torch.float64)
    blocks, grid = encoded(x, block, sparsity)
    dw = weight_grad_reference(blocks, dy, grid)
    assert dw.shape == (5, shape[1]) and dw.is_contiguous()
    error, message = relative_error("dW", dw, dy.T @ decode_reference(blocks, grid))
    assert error < 1e-13, message  # fp64, sums of at most 200 terms


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 1e-6), (torch.bfloat16, 1e-6)], ids=str
)
def test_weight_gradient_is_summed_in_fp32(dtype, limit):
    x, dy = torch.randn(197, 63).to(dtype), torch.randn(197, 31).to(dtype)
    blocks, grid = encoded(x)
    dw = weight_grad_reference(blocks, dy, grid)
    assert dw.dtype == torch.float32
    error, message = relative_error("dW", dw, dy.double().T @ decode_reference(blocks, grid).double())
    assert error < limit, message  # products of half numbers are exact in fp32; about 40 roundings of 6e-8


@pytest.mark.parametrize("block", [(4, 4), (8, 8), (32, 32), (1, 384)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_weight_gradient_does_only_the_work_of_the_kept_blocks(block, sparsity):
    x, dy = torch.randn(416, 384), torch.randn(416, 96)
    blocks, grid = encoded(x, block, sparsity)
    with FlopCounterMode(display=False) as counter:
        weight_grad_reference(blocks, dy, grid)
    kept = 2 * blocks.values.numel() * dy.shape[1]
    assert kept <= counter.get_total_flops() <= 1.125 * kept
    assert kept == pytest.approx(
        (1 - sparsity) * 2 * x.numel() * dy.shape[1], rel=0.03
    )  # whole blocks: 16 of 156 are 10.3%


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_weight_gradient_never_builds_the_dense_input(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2**16)
    x, dy = torch.randn(4096, 512), torch.randn(4096, 24)
    blocks, grid = encoded(x, sparsity=0.9)
    with Largest() as largest:
        weight_grad_reference(blocks, dy, grid)
    assert largest.elements <= 1.125 * blocks.values.numel()  # dy, 98304 elements, is smaller than what is kept
    with Largest() as largest:
        decode_reference(blocks, grid)
    assert largest.elements >= x.numel()  # the meter works


@pytest.mark.parametrize("select", ["topk", "sample"])
def test_views_give_what_copies_give(select):
    noise = torch.rand(1) if select == "sample" else None
    base = torch.randn(60, 45)
    for view in (base.T, base[::2, 3:40], base.T[5:, ::3]):
        got, expected = encoded(view, noise=noise)[0], encoded(view.contiguous(), noise=noise)[0]
        assert torch.equal(got.values, expected.values) and torch.equal(got.index, expected.index)
    dy = torch.randn(31, 60).T
    blocks, grid = encoded(base)
    torch.testing.assert_close(
        weight_grad_reference(blocks, dy, grid), weight_grad_reference(blocks, dy.contiguous(), grid)
    )


def water_filled(scores, kept):
    """Inclusion probabilities by the textbook loop: whoever exceeds 1 is capped, the rest is scaled anew."""
    capped = [False] * len(scores)
    while True:
        total = sum(s for s, c in zip(scores, capped, strict=True) if not c)
        places = kept - sum(capped)
        p = [1.0 if c else s * places / total for s, c in zip(scores, capped, strict=True)]
        over = [value > 1 for value in p]
        if not any(over):
            return torch.tensor(p, dtype=torch.float64)
        capped = [c or o for c, o in zip(capped, over, strict=True)]


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("kept", [1, 7, 50, 99])
def test_inclusion_is_proportional_to_the_score_up_to_one(spread, kept):
    scores = (torch.randn(100, dtype=torch.float64) * spread).exp()
    p = inclusion_reference(scores, kept)
    torch.testing.assert_close(p, water_filled(scores.tolist(), kept))
    assert p.sum().item() == pytest.approx(kept) and p.max() <= 1


def test_inclusion_where_scores_are_zero():
    p = inclusion_reference(torch.tensor([0.0, 4, 0, 1, 0]), 3)
    torch.testing.assert_close(p, torch.tensor([1 / 3, 1, 1 / 3, 1, 1 / 3], dtype=torch.float64))
    torch.testing.assert_close(inclusion_reference(torch.zeros(8), 2), torch.full((8,), 0.25, dtype=torch.float64))
    assert inclusion_reference(torch.tensor([0.0, 4, 0, 1, 3]), 2).tolist()[0] == 0


@pytest.mark.parametrize("kept", [1, 3, 20, 39])
def test_a_sample_has_a_fixed_size_and_the_right_probabilities(kept):
    """Over n evenly spread noise values a block is hit p * n times, to within one."""
    p, n = inclusion_reference(torch.randn(40).exp(), kept), 4000
    hits = torch.zeros(40, dtype=torch.float64)
    for i in range(n):
        index = sample_reference(p, kept, torch.tensor([(i + 0.5) / n], dtype=torch.float64))
        assert index.diff().gt(0).all() and index.numel() == kept and index[0] >= 0 and index[-1] < 40
        hits[index] += 1
    assert (hits / n - p).abs().max() <= 1.001 / n


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-24])
def test_a_sample_is_distinct_and_in_range_at_the_ends_of_the_noise(noise):
    for scores in (torch.ones(7), torch.zeros(7), torch.tensor([1e-30, 1, 1e30, 1, 0, 0, 0]), torch.arange(7.0)):
        for kept in (1, 3, 6, 7):
            index = sample_reference(inclusion_reference(scores, kept), kept, torch.tensor([noise]))
            assert index.diff().gt(0).all() and index[0] >= 0 and index[-1] < 7


def test_the_mean_over_all_noise_is_the_input_exactly():
    """Scores 1..4 and 6 of 16, so p = score / 8 at two kept blocks: 8 noise values visit every outcome equally often."""
    levels = torch.tensor([1.0, 2, 3, 4, 6], dtype=torch.float64)
    x = levels[:, None] * torch.tensor([1.0, -1, -1, 1], dtype=torch.float64)  # five blocks of 1x4
    grid = block_grid(x.shape, (1, 4))
    draws = [
        decode_reference(encode_reference(x, grid, 2, torch.tensor([(i + 0.5) / 8], dtype=torch.float64)), grid)
        for i in range(8)
    ]
    torch.testing.assert_close(torch.stack(draws).mean(0), x, rtol=1e-15, atol=0)


@pytest.mark.quick(4)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(9, 17), (3, 180), (108, 3)], ids=str)
def test_the_mean_over_a_sweep_of_noise_is_the_input(shape, block):
    x, n = torch.randn(shape, dtype=torch.float64), 1000
    x[0] = 0
    grid = block_grid(x.shape, block)
    kept = kept_blocks(grid, 0.8)
    total = torch.zeros_like(x)
    for i in range(n):
        noise = torch.tensor([(i + 0.5) / n], dtype=torch.float64)
        total += decode_reference(encode_reference(x, grid, kept, noise), grid)
    ones = Blocks(
        inclusion_reference(block_scores_reference(x, grid), kept)[:, None, None].expand(-1, grid.height, grid.width),
        torch.arange(grid.down * grid.across, dtype=torch.int32),
    )
    allowed = 1.001 / n * x.abs() / decode_reference(ones, grid)  # a block is hit p * n times, to within one
    assert ((total / n - x).abs() <= allowed.nan_to_num(0) + 1e-12).all()


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sparsity", [0.5, 0.97])
def test_what_is_not_finite_shows_in_the_gradient(value, select, sparsity):
    for seed in range(20):
        x = torch.rand(20, 30, generator=torch.Generator().manual_seed(seed))
        x[11, 22] = value
        noise = torch.tensor([seed / 20]) if select == "sample" else None
        blocks, grid = encoded(x, (4, 4), sparsity, noise)
        assert not weight_grad_reference(blocks, torch.ones(20, 2), grid).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_samples_stay_in_the_finite_range_of_their_dtype(dtype):
    """One block in ten is kept, times about ten: more than the dtype holds. fp32 just holds the sum over a block."""
    x = torch.full((40, 40), torch.finfo(dtype).max / 4.1, dtype=dtype)
    x[:4] *= -1
    blocks, grid = encoded(x, (1, 4), 0.9, torch.tensor([0.3]))
    assert (blocks.values.abs() == torch.finfo(dtype).max).all()
    assert ((decode_reference(blocks, grid) == 0) | (decode_reference(blocks, grid).sign() == x.sign())).all()
    taken = take_reference(x, grid, torch.tensor([3]), torch.tensor([2.0]))
    assert torch.equal(taken, 2 * x[None, :1, 12:16])


@pytest.mark.parametrize("select", ["topk", "sample"])
def test_nothing_waits_for_the_values(select):
    """Fake tensors have none: an operation whose sizes or branches depend on values raises."""
    with FakeTensorMode():
        x, dy = torch.empty(197, 63), torch.empty(197, 31)
        blocks, grid = encoded(x, noise=torch.empty(1) if select == "sample" else None)
        assert weight_grad_reference(blocks, dy, grid).shape == (31, 63)
        assert decode_reference(blocks, grid).shape == x.shape
