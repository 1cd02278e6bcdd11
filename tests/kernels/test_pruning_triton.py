"""Triton kernels of block-sparse pruning against their references."""

import pytest
import torch

from actpress import layers
from actpress.codec import Context
from actpress.kernels.common.layout import dense
from actpress.kernels.pruning import cases, op, triton_product
from actpress.kernels.pruning import triton as kernels
from actpress.kernels.pruning.reference import (
    Blocks,
    Grid,
    block_grid,
    block_scores_reference,
    decode_reference,
    encode_reference,
    kept_blocks,
    take_reference,
    weight_grad_reference,
)
from actpress.methods.pruning import BlockPruningCodec
from devices import BACKENDS, DEVICES, INTERPRETED, assert_close, assert_same, last_program_only, mimic_gpu, traffic

SHAPES = [(1, 1), (1, 7), (7, 1), (63, 17), (197, 63), (3, 180)]
BLOCKS = [(1, 1), (4, 4), (8, 8), (3, 5), (32, 32), (1, 384), (50, 7)]
CONFIGS = {"tensor": triton_product.TENSOR_CONFIGS, "exact": triton_product.EXACT_CONFIGS}
VIEWS = {
    "transposed": lambda x: x.transpose(1, 2),
    "every other column": lambda x: x[..., ::2],
    "slices of a batch": lambda x: x[:, 1:],
    "three levels": lambda x: x.unflatten(1, (5, 5))[:, ::2, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 7, -1),
    "one row": lambda x: x[0, 0],
}
pytestmark = pytest.mark.usefixtures("poisoned")


def eighths(*shape, device="cpu", dtype=torch.float32):
    """Random multiples of 1/8 below 8: their sums are exact in any order, so that scores are equal bit for bit."""
    return ((torch.randn(shape, device=device) * 8).round().clamp(-63, 63) / 8).to(dtype)


def kept_at_random(grid, sparsity, dtype, device):
    blocks = cases.random_blocks(grid, sparsity, dtype, device)
    zero = torch.zeros(grid.rows, grid.columns, dtype=dtype, device=device)  # zeros past the edge, as encode pads
    edge = take_reference(zero + 1, grid, blocks.index)
    return Blocks(blocks.values * edge, blocks.index)


def small(config, **changes):
    """The configuration in tiles that leave several programs on a small matrix, and not too many for the interpreter."""
    return {**config, "OUTPUTS": 16, "COLUMNS": 16, "GROUPED": min(config["GROUPED"], 16), "PROGRAMS": 24, **changes}


@pytest.mark.quick(12)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_encode_and_decode(shape, block, device, dtype):
    x = eighths(*shape, device=device, dtype=dtype)
    grid = block_grid(x.shape, block)
    for name, noise in (("top-k", None), ("sample", torch.full((1,), 0.3, device=device))):
        kept = kept_blocks(grid, 0.7)
        values, index = kernels.encode_by_kernels(x, grid.height, grid.width, kept, noise)
        expected = encode_reference(x, grid, kept, noise)
        assert_same(f"{name}: index", index, expected.index)
        assert_same(f"{name}: values", values, expected.values)
        decoded = kernels.decode_triton(values, index, *shape)
        assert_same(f"{name}: x~", decoded, decode_reference(expected, grid))


@pytest.mark.quick(12)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("block", [(8, 8), (1, 384), (3, 5)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_encode_of_any_strides(block, view, device, dtype):
    x = VIEWS[view](eighths(3, 25, 22, device=device, dtype=dtype))
    grid = block_grid(x.shape, block)
    values, index = kernels.encode_by_kernels(x, grid.height, grid.width, kept_blocks(grid, 0.6))
    expected = encode_reference(x.reshape(-1, x.shape[-1]), grid, kept_blocks(grid, 0.6))
    assert_same("index", index, expected.index)
    assert_same("values", values, expected.values)


@pytest.mark.parametrize("view", VIEWS)
def test_views_on_two_levels_are_not_copied(view):
    x = VIEWS[view](torch.randn(3, 25, 22))
    seen, _ = kernels.matrix(x)
    assert (seen is x) == (view != "three levels")


@pytest.mark.quick(2)
@pytest.mark.parametrize("config", kernels.SCORES_CONFIGS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_scores(device, dtype, config):
    rows = torch.randn(2, 70, 150, device=device).to(dtype)
    patches = rows.transpose(1, 2)
    for x, block in ((rows, (8, 8)), (rows, (1, 384)), (rows, (40, 3)), (patches, (8, 8)), (patches, (1, 64))):
        grid = block_grid(x.shape, block)
        ours = kernels.block_scores_triton(x, grid, config)
        expected = block_scores_reference(x.reshape(-1, grid.columns), grid)
        assert_close(f"scores of {block}", ours, expected, 3e-7)  # at most 150 fp32 terms, in another order


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_what_is_not_finite_is_kept(device, dtype, value):
    x = eighths(20, 30, device=device, dtype=dtype)
    x[11, 22] = value
    values, index = kernels.encode_by_kernels(x, 4, 4, 1)
    assert index.tolist() == [2 * 8 + 5]
    assert_same("values", values, x[None, 8:12, 20:24])


@pytest.mark.parametrize("config", kernels.TAKE_CONFIGS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_take(device, dtype, config):
    x = torch.randn(70, 150, device=device).to(dtype)
    for block in ((8, 8), (1, 150), (40, 70)):
        grid = block_grid(x.shape, block)
        index = kept_at_random(grid, 0.5, dtype, device).index
        weight = torch.rand(index.numel(), device=device) * 5
        for w in (None, weight):
            ours = kernels.take_triton(x, grid, index, w, config)
            assert_same(f"blocks of {block}", ours, take_reference(x, grid, index, w))


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy: inf - inf
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_take_beyond_the_end_of_a_dtype(device, dtype):
    x = torch.randn(20, 30, device=device).mul(torch.finfo(dtype).max / 2).to(dtype)
    x[::7, 0], x[3, ::5], x[4, ::5] = torch.inf, -torch.inf, torch.nan
    grid = block_grid(x.shape, (4, 4))
    index = torch.arange(grid.down * grid.across, dtype=torch.int32, device=device)
    weight = torch.rand(index.numel(), device=device) * 5
    ours = kernels.take_triton(x, grid, index, weight)
    assert_same("blocks", ours, take_reference(x, grid, index, weight))
    assert ours.isinf().any() and ours.isnan().any()


@pytest.mark.parametrize("config", kernels.DECODE_CONFIGS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_decode(device, dtype, config):
    for block in ((8, 8), (1, 150), (40, 70), (3, 5)):
        grid = block_grid(torch.Size((70, 150)), block)
        blocks = kept_at_random(grid, 0.5, dtype, device)
        ours = kernels.decode_triton(*blocks, 70, 150, config)
        assert_same(f"x~ of {block}", ours, decode_reference(blocks, grid))


@pytest.mark.quick(12)
@pytest.mark.parametrize("block", BLOCKS[1:], ids=str)
@pytest.mark.parametrize(("shape", "sparsity"), [((63, 17), 0.0), *((shape, 0.8) for shape in SHAPES)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient(shape, block, sparsity, device, dtype):
    grid = block_grid(torch.Size(shape), block)
    blocks = kept_at_random(grid, sparsity, dtype, device)
    dy = torch.randn(shape[0], 19, device=device).to(dtype)
    config = small(CONFIGS["exact" if dtype == torch.float32 else "tensor"][0])
    ours = triton_product.weight_grad_triton(*blocks, dy, shape[1], config)
    assert ours.dtype == torch.float32
    check_weight_gradient(ours, blocks, dy, grid)


def check_weight_gradient(ours, blocks, dy, grid, tolerance=2e-6):
    """At most 200 fp32 terms an element: a rounding of 2^-24 each, twice that where tensor cores round towards zero."""
    dy = dy.reshape(-1, dy.shape[-1])
    exact = dy.double().T @ decode_reference(blocks, grid).double()
    assert_close("dW", ours, exact, tolerance)
    assert_close("dW of the reference", weight_grad_reference(blocks, dy, grid), exact, 2e-6)


@pytest.mark.quick(8)
@pytest.mark.parametrize(("kind", "position"), [(kind, i) for kind in CONFIGS for i in range(3)])
@pytest.mark.parametrize("block", [(8, 8), (16, 16), (1, 24), (1, 150)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient_in_every_configuration(kind, position, block, device, dtype):
    grid = block_grid(torch.Size((90, 150)), block)
    blocks = kept_at_random(grid, 0.7, dtype, device)
    dy = torch.randn(90, 128 if block == (8, 8) else 40, device=device).to(dtype)
    config = {**CONFIGS[kind][position], "PROGRAMS": 8}
    check_weight_gradient(triton_product.weight_grad_triton(*blocks, dy, 150, config), blocks, dy, grid)


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient_in_tf32(device, dtype):
    grid = block_grid(torch.Size((90, 150)), (8, 8))
    blocks = kept_at_random(grid, 0.7, dtype, device)
    dy = torch.randn(90, 40, device=device).to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        ours = triton_product.weight_grad_triton(*blocks, dy, 150)
    finally:
        torch.set_float32_matmul_precision(before)
    # Factors of fp32 are cut to 11 bits: up to 2^-10 of each.
    check_weight_gradient(ours, blocks, dy, grid, 2e-3 if dtype == torch.float32 and device == "cuda" else 2e-6)


DY = {
    "contiguous": lambda dy: dy,
    "slices of a batch": lambda dy: torch.cat([dy, dy], 1)[:, : dy.shape[1]],
    "wider rows": lambda dy: torch.cat([dy, dy], 2)[..., : dy.shape[2]],
    "transposed": lambda dy: dy.transpose(1, 2).contiguous().transpose(1, 2),
    "three levels": lambda dy: torch.cat([dy, dy], 1)[:, : dy.shape[1]].unflatten(1, (5, 5)).transpose(0, 1),
    "expanded": lambda dy: dy[:1, :1].expand(3, 25, -1),
}


@pytest.mark.quick(5)
@pytest.mark.parametrize("view", DY)
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient_of_any_strides(view, device, dtype):
    dy = DY[view](torch.randn(3, 25, 33, device=device).to(dtype))
    grid = Grid(75, 40, 8, 8)
    blocks = kept_at_random(grid, 0.5, dtype, device)
    config = small(triton_product.TENSOR_CONFIGS[0])
    check_weight_gradient(triton_product.weight_grad_triton(*blocks, dy, 40, config), blocks, dy, grid)


@pytest.mark.quick(5)
@pytest.mark.parametrize("where", ["one column", "one row", "last block", "first block"])
@pytest.mark.parametrize("grouped", [8, 16])
@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient_where_blocks_gather(where, grouped, device, dtype):
    grid = Grid(90, 60, 4, 8)  # 23 x 8 blocks
    i = torch.arange(23 * 8, dtype=torch.int32, device=device)
    index = {"one column": i[5::8], "one row": i[72:80], "last block": i[-1:], "first block": i[:1]}[where]
    ones = torch.ones(90, 60, dtype=dtype, device=device)
    blocks = Blocks(take_reference(ones, grid, index).contiguous(), index)
    dy = torch.randn(90, 19, device=device).to(dtype)
    config = small(triton_product.TENSOR_CONFIGS[0], GROUPED=grouped)
    check_weight_gradient(triton_product.weight_grad_triton(*blocks, dy, 60, config), blocks, dy, grid)


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient_shows_what_is_not_finite(device, dtype):
    grid = Grid(40, 32, 8, 8)
    blocks = kept_at_random(grid, 0.0, dtype, device)
    dy = torch.randn(40, 5, device=device).to(dtype)
    dy[3, 2] = torch.nan
    ours = triton_product.weight_grad_triton(*blocks, dy, 32, small(triton_product.TENSOR_CONFIGS[0]))
    assert ours[2].isnan().all() and ours[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize(("device", "dtype"), BACKENDS)
def test_weight_gradient_is_deterministic(device, dtype):
    grid = Grid(197, 63, 8, 8)
    blocks, dy = kept_at_random(grid, 0.6, dtype, device), torch.randn(197, 33, device=device).to(dtype)
    config = small(triton_product.TENSOR_CONFIGS[0])
    first, second = (triton_product.weight_grad_triton(*blocks, dy, 63, config) for _ in range(2))
    assert_same("dW", second, first)


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_dtypes_and_no_outputs(device):
    grid = Grid(40, 32, 8, 8)
    blocks = kept_at_random(grid, 0.5, torch.float16, device)
    dy = torch.randn(40, 5, device=device)
    check_weight_gradient(triton_product.weight_grad_triton(*blocks, dy, 32), blocks, dy, grid)
    assert triton_product.weight_grad_triton(*blocks, dy[:, :0].half(), 32).shape == (0, 32)


@pytest.mark.skipif(not INTERPRETED, reason="bytes are counted in the interpreter")
class TestTraffic:
    @pytest.mark.parametrize("block", [(4, 4), (8, 8), (1, 384)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_encode(self, block, dtype):
        named = {case.name: case for case in cases.cases()}
        for x in (torch.randn(64, 384).to(dtype), torch.randn(2, 32, 64).to(dtype).transpose(1, 2)):
            grid = block_grid(x.shape, block)
            index = cases.random_blocks(grid, 0.8, dtype, "cpu").index
            for name, launcher, inputs in (
                ("prune_scores_fc1_8x8", kernels.block_scores_triton, (x, grid)),
                ("prune_take_fc1_8x8", kernels.take_triton, (x, grid, index)),
            ):
                with traffic() as moved:
                    launcher(*inputs)
                assert moved.total == named[name].moved(*inputs), name

    @pytest.mark.quick(5)
    @pytest.mark.parametrize("block", [(8, 8), (1, 384), (5, 7)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_decode(self, block, dtype):
        (case, *_) = (case for case in cases.cases() if case.name.startswith("prune_decode"))
        grid = Grid(70, 168, *block)
        blocks = cases.random_blocks(grid, 0.8, dtype, "cpu")
        past_the_edge = take_reference(torch.ones(grid.rows, grid.columns), grid, blocks.index).eq(0).sum()
        with traffic() as moved:
            kernels.decode_triton(*blocks, 70, 168)
        filled = 4 * grid.down * grid.across  # by PyTorch
        unread = int(past_the_edge) * dtype.itemsize
        assert moved.total + filled + unread == case.moved(*blocks, 70, 168)

    @pytest.mark.quick(1)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_weight_gradient_of_one_tile(self, dtype):
        """Nothing is shared among programs here, and all block rows are visited: what is declared is exact."""
        grid = Grid(400, 128 if dtype == torch.float16 else 8, 8, 8)
        blocks = cases.random_blocks(grid, 0.0, dtype, "cpu")
        dy = torch.randn(400, 40).to(dtype)
        with traffic() as moved:
            triton_product.weight_grad_triton(*blocks, dy, grid.columns)
        sums = 4 * 40 * grid.columns
        by_torch = 4 * grid.down * grid.across + sums * (50 + 1)  # the map is filled; 50 partial sums are added
        assert moved.total + by_torch == cases.weight_grad_bytes(*blocks, dy, grid.columns)

    @pytest.mark.parametrize("grouped", [8, 16, 32])
    def test_weight_gradient_through_l2(self, grouped):
        """The formulas of the module: rows of dY for each group that visits them, values for each tile of outputs."""
        grid = Grid(96, 48, 8, 8)
        blocks = cases.random_blocks(grid, 0.6, torch.float32, "cpu")
        dy = torch.randn(96, 32)
        config = small(triton_product.TENSOR_CONFIGS[0], COLUMNS=32, GROUPED=grouped, PROGRAMS=1)
        kept = torch.zeros(12 * 6, dtype=torch.bool).index_fill_(0, blocks.index.long(), True).view(12, 6)
        groups = kept.split(grouped // 8, dim=1)
        visited = sum(int(group.any(1).sum()) for group in groups)
        assert visited <= 12 * len(groups) and (grouped > 8 or visited == blocks.index.numel())
        slots = 4 * visited * (1 + grouped // 8)
        lists = 4 * (2 * blocks.index.numel() + 72) + slots + 4 * len(groups)
        with traffic() as moved:
            triton_product.weight_grad_triton(*blocks, dy, 48, config)
        products = visited * 8 * 32 * 4 + 2 * blocks.values.nbytes + 2 * (slots + 4 * len(groups)) + 4 * 32 * 48
        assert moved.total == lists + products


@pytest.mark.parametrize("case", cases.cases(), ids=lambda case: case.name)
def test_realistic_sizes_move_little_more_than_they_must(case):
    for dtype in case.dtypes:
        inputs = case.make(dtype, "meta")
        moved, floor = case.moved(*inputs), case.floor(*inputs)
        if case.flops is None:
            assert moved <= 1.1 * floor, f"{case.name} {dtype}: {moved / floor:.3f} of the floor"
        else:  # lists and partial sums of a product stay in the L2 cache until the next launch reads them; an H100's holds 50 MB
            assert moved - floor <= 45e6, f"{case.name} {dtype}: {(moved - floor) / 1e6:.1f} MB"


def test_operations_are_registered_well():
    x = torch.randn(3, 25, 22)
    grid = block_grid(x.shape, (8, 8))
    for view in (x, x.transpose(1, 2)):
        torch.library.opcheck(op._encode.op, (view, 8, 8, 10))
        torch.library.opcheck(op._encode.op, (view, 8, 8, 10, torch.rand(1)))
    blocks = encode_reference(x.reshape(75, 22), grid, 10)
    torch.library.opcheck(op._decode.op, (*blocks, 75, 22))
    torch.library.opcheck(op._weight_grad.op, (*blocks, torch.randn(3, 25, 6), 22))


def test_operations_compile_in_one_graph():
    x, dy = torch.randn(3, 24, 40), torch.randn(3, 24, 6)
    grid = block_grid(x.shape, (8, 8))

    def run(x, dy):
        blocks = op._encode.op(x, 8, 8, 9)
        return op._decode.op(*blocks, 72, 40), op._weight_grad.op(*blocks, dy, 40)

    torch._dynamo.reset()
    decoded, dw = torch.compile(run, fullgraph=True, backend="aot_eager")(x, dy)
    blocks = encode_reference(x.reshape(72, 40), grid, 9)
    assert_same("x~", decoded, decode_reference(blocks, grid))
    assert_same("dW", dw, weight_grad_reference(blocks, dy.reshape(72, 6), grid))


@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
def test_layers_give_the_same_through_the_operations(select, transposed, monkeypatch):
    base = torch.randn(3, 24, 40)
    x = base.transpose(1, 2) if transposed else base
    dy = dense(torch.randn(*x.shape[:-1], 6))
    gradients = []
    for _ in range(2):
        layer = layers.Linear(x.shape[-1], 6)
        torch.nn.init.ones_(layer.weight)
        layer.codec, layer.context = BlockPruningCodec(0.8, (8, 8), select), Context(5)
        layer(x.detach().requires_grad_()).backward(dy)
        gradients.append(layer.weight.grad)
        mimic_gpu(monkeypatch)
    assert_same("dW", gradients[1], gradients[0])


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="runs the last program alone")
def test_past_two_to_the_31_elements():
    rows, columns = 2**22 + 8, 512
    grid = Grid(rows, columns, 8, 8)
    x = torch.empty(rows, columns, dtype=torch.float16)
    x[-8:] = eighths(8, columns, dtype=torch.float16)
    last = torch.tensor([grid.down * grid.across - 1], dtype=torch.int32)
    with last_program_only():
        scores = kernels.block_scores_triton(x, grid)
        values = kernels.take_triton(x, grid, last)
        # x stands in for dy, one segment: its last program sees the last block alone
        config = small(triton_product.TENSOR_CONFIGS[0], PROGRAMS=1)
        dw = triton_product.weight_grad_triton(values, last, x, columns, config)
        decoded = kernels.decode_triton(values, last, rows, columns)
    corner = x[-8:, -8:]
    assert_same("score", scores[-1:], block_scores_reference(corner, Grid(8, 8, 8, 8)))
    assert_same("values", values, corner[None])
    assert_same("x~", decoded[-8:, -8:], corner)
    assert_close("dW", dw[-8:, -8:], corner.double().T @ corner.double(), 1e-6)  # 8 terms


@pytest.mark.gpu
def test_past_two_to_the_31_elements_on_a_gpu():
    x = torch.zeros(2**22 + 8, 512, dtype=torch.float16, device="cuda")
    x[-20:] = eighths(20, 512, device="cuda", dtype=torch.float16)
    grid = block_grid(x.shape, (8, 8))
    blocks = op.encode(x, grid, 3 * 64)
    assert torch.equal(op.decode(blocks, grid), x)
    dw = op.weight_grad(blocks, x, grid)
    assert_close("dW", dw, x[-20:].double().T @ x[-20:].double(), 1e-6)  # 20 terms
