"""BlockPruning: gradients, bytes, which layers it takes, and when."""

import copy

import hydra
import pytest
import timm
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

import actpress
from actpress import layers, measure, swap
from actpress.codec import Context, encoded
from actpress.kernels.pruning import block_grid, code_bytes
from actpress.measure import saved_bytes
from actpress.methods import BlockPruning
from actpress.report import markdown
from actpress.tables import spec
from actpress.tables.result import Result, Section, summarise
from actpress.train import cli
from paths import CONFIGS

SHAPES = [(63,), (1, 63), (5, 63), (2, 17, 24), (1, 197, 40), (2, 3, 5, 7)]
BLOCKS = [(4, 4), (8, 8), (16, 16), (32, 32), (1, 384), (3, 5)]
# (2, 17, 24) read as (2, 24, 17): the cross-patch layer of ResMLP
VIEWS = {"contiguous": lambda x: x, "transposed": lambda x: x.transpose(-1, -2) if x.dim() > 1 else x}


def linear(features, out=11, dtype=torch.float32, **settings):
    """(stock layer, the same pruned)"""
    stock = nn.Linear(features, out).to(dtype)
    ours = copy.deepcopy(stock)
    actpress.apply(ours, BlockPruning(**settings))
    return stock, ours


def gradients(layer, x, dy):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    layer(x).backward(dy)
    return x.grad, layer.weight.grad, layer.bias.grad


@pytest.mark.quick(40)
@pytest.mark.parametrize("select", ["topk", "sample"])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_only_dw_changes_and_it_is_exact_at_what_was_decoded(shape, block, view, select):
    x = VIEWS[view](torch.randn(shape, dtype=torch.float64))
    stock, ours = linear(x.shape[-1], dtype=torch.float64, block=block, select=select)
    dy = torch.randn(*x.shape[:-1], 11, dtype=torch.float64)
    kept, saved = encoded(ours.codec, x, Context(ours.context.seed))  # the first draw, as the layer's own
    decoded = kept.decode(saved)
    dx, _, db = gradients(stock, x, dy)
    our_dx, our_dw, our_db = gradients(ours, x, dy)
    tight = {"rtol": 1e-12, "atol": 1e-12}  # fp64, sums of at most 200 terms in another order
    torch.testing.assert_close(our_dx, dx, msg=lambda m: f"dX: {m}", **tight)
    torch.testing.assert_close(our_db, db, msg=lambda m: f"db: {m}", **tight)
    torch.testing.assert_close(our_dw, gradients(stock, decoded, dy)[1], msg=lambda m: f"dW: {m}", **tight)
    pruned = code_bytes(block_grid(x.shape, block), 0.8, 8) < x.nbytes  # not a tensor of a single block
    assert (len(saved) == 2) == pruned == (decoded.count_nonzero().item() < x.numel())


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sparsity_zero_is_stock(shape, view):
    x = VIEWS[view](torch.randn(shape))
    stock, ours = linear(x.shape[-1], sparsity=0)
    dy = torch.randn(*x.shape[:-1], 11)
    for name, got, expected in zip(("dX", "dW", "db"), gradients(ours, x, dy), gradients(stock, x, dy), strict=True):
        torch.testing.assert_close(got, expected, msg=lambda m, name=name: f"{name}: {m}")


def test_sparsity_zero_keeps_the_tensor_itself():
    """The layer before it keeps that tensor too: one storage, as in stock, and a change of it is noticed."""
    stock, ours = linear(24, sparsity=0)
    x = torch.randn(6, 24, requires_grad=True)
    assert saved_bytes(lambda: ours(x.exp()).sum()) == saved_bytes(lambda: stock(x.exp()).sum()) == x.nbytes
    y = x.exp()
    loss = ours(y).sum()
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.quick(30)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(64, 80), (2, 17, 24), (1, 197, 40)], ids=str)
@pytest.mark.parametrize("select", ["topk", "sample"])
def test_saved_bytes_follow_the_formula(shape, block, dtype, select):
    x = torch.randn(shape).to(dtype)
    _, ours = linear(shape[-1], dtype=dtype, block=block, select=select)
    expected = code_bytes(block_grid(x.shape, block), 0.8, dtype.itemsize)
    assert expected < x.nbytes and saved_bytes(lambda: ours(x).sum()) == expected


def test_a_code_no_smaller_than_the_tensor_is_not_made():
    x = torch.randn(64, 64)
    _, ours = linear(64, sparsity=0.05, block=(4, 4))  # 95% of the values and 6.25% of those for positions
    assert saved_bytes(lambda: ours(x).sum()) == x.nbytes
    _, ours = linear(64, sparsity=0.07, block=(4, 4))
    assert saved_bytes(lambda: ours(x).sum()) < x.nbytes


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
def test_an_empty_batch_passes(shape):
    _, ours = linear(24)
    dx, dw, _ = gradients(ours, torch.randn(shape), torch.randn(*shape[:-1], 11))
    assert dx.shape == shape and torch.equal(dw, torch.zeros(11, 24))


def test_bf16_autocast_keeps_bf16():
    x = torch.randn(8, 25, 64)
    _, ours = linear(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert saved_bytes(lambda: ours(x).sum()) == code_bytes(block_grid(x.shape, (8, 8)), 0.8, 2)
        y = ours(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert ours.weight.grad.dtype == torch.float32


def test_two_readers_share_one_code():
    net = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40)])
    actpress.apply(net, BlockPruning(select="sample"))
    x = torch.randn(64, 40)
    once = saved_bytes(lambda: net[0](x).sum())
    assert saved_bytes(lambda: (net[0](x) + net[1](x)).sum()) == once


def test_topk_is_biased_and_sampling_is_not():
    """Sampled dW: its part along the exact dW is 1 on average and each of 693 elements is exact on average, both within 4 standard
    errors (4.5 for the largest of 693). The same criteria reject top-k."""
    x, dy, draws = torch.randn(64, 63), torch.randn(64, 11), 2000
    stock, sampled = linear(63, select="sample", block=(4, 4))
    _, top = linear(63, block=(4, 4))
    exact = gradients(stock, x, dy)[1].double()
    found = torch.stack([gradients(sampled, x.clone(), dy)[1] for _ in range(draws)]).double()
    topk = gradients(top, x, dy)[1].double()

    def sigmas(mean, samples, expected):
        return ((mean - expected) / (samples.std(0) / draws**0.5)).abs().max().item()

    def along(dw):
        return (dw * exact).sum((-1, -2)) / exact.square().sum()

    parts = along(found)
    assert sigmas(parts.mean(), parts, 1) < 4 < sigmas(along(topk), parts, 1)
    assert sigmas(found.mean(0), found, exact) < 4.5 < sigmas(topk, found, exact)


def test_noise_is_reproducible_and_leaves_the_global_generator_alone():
    x, dy = torch.randn(64, 24), torch.randn(64, 11)
    torch.manual_seed(3)
    _, ours = linear(24, select="sample")
    twin = copy.deepcopy(ours)
    before = torch.get_rng_state()
    first, second = (gradients(ours, x.clone(), dy)[1] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, second)
    assert torch.equal(gradients(twin, x.clone(), dy)[1], first)


def test_dense_until_the_start_epoch():
    x, dy = torch.randn(64, 24), torch.randn(64, 11)
    stock, ours = linear(24, start_epoch=2)
    pruned = code_bytes(block_grid(x.shape, (8, 8)), 0.8, 4)
    exact = gradients(stock, x, dy)[1]
    for epoch, kept in enumerate([x.nbytes, x.nbytes, pruned, pruned]):
        swap.set_epoch(ours, epoch)
        assert saved_bytes(lambda: ours(x.clone()).sum()) == kept
        assert torch.allclose(gradients(ours, x.clone(), dy)[1], exact, rtol=1e-4, atol=1e-5) == (epoch < 2)


def test_the_epoch_comes_back_with_the_state():
    _, ours = linear(24, start_epoch=2)
    swap.set_epoch(ours, 3)
    _, fresh = linear(24, start_epoch=2)
    swap.load_state(fresh, swap.state(ours))
    x = torch.randn(64, 24)
    assert saved_bytes(lambda: fresh(x).sum()) == saved_bytes(lambda: ours(x).sum()) < x.nbytes


def test_a_late_start_compiles_twice_and_no_more():
    x, graphs = torch.randn(64, 24), []
    _, ours = linear(24, start_epoch=10)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    for epoch in range(12):
        swap.set_epoch(ours, epoch)
        compiled(x).sum().backward()
    assert len(graphs) == 2


@pytest.mark.quick(1)
@pytest.mark.parametrize("select", ["topk", "sample"])
def test_compiled_gives_what_eager_gives(select):
    x, dy = torch.randn(3, 17, 40), torch.randn(3, 17, 11)
    stock, ours = linear(40, select=select)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    dw = gradients(compiled, x, dy)[1]
    if select == "topk":  # compiled noise is PyTorch's own
        torch.testing.assert_close(dw, gradients(ours, x, dy)[1])
    assert 0.2 < F.cosine_similarity(dw.flatten(), gradients(stock, x, dy)[1].flatten(), dim=0) < 0.99


BYTE_MODEL = {  # batch -> reduction in percent at each sparsity, computed from tensor shapes
    32: {0.5: 18.3, 0.75: 27.5, 0.8: 29.3, 0.9: 33.0},
    128: {0.5: 20.3, 0.75: 30.4, 0.8: 32.5, 0.9: 36.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("batch", BYTE_MODEL)
def test_resmlp_saves_what_the_byte_model_says(batch):
    """ResMLP-S12, 8x8 blocks: activations + 4 x parameters + input, within one point, and as the table states it."""
    table = spec.load(CONFIGS / "tables", "pruning_memory")
    values, expected = [], {}
    for row in table.rows:
        wanted = row.labels["network"] == "ResMLP-S12" and row.labels["batch"] == batch
        if wanted and ("8x8" in row.labels["method"] or row.labels["method"] == "none"):
            cfg = cli.compose([*row.overrides], CONFIGS)
            method = hydra.utils.instantiate(cfg.method)
            bytes_ = measure.predicted_memory(
                lambda cfg=cfg: hydra.utils.instantiate(cfg.model), method, batch, 224, "fp32"
            )
            values.append([bytes_])
            if isinstance(method, BlockPruning):
                expected[row.labels["method"]] = BYTE_MODEL[batch][method.sparsity]
                assert row.paper == {"reduction": expected[row.labels["method"]]}
        else:
            values.append([])
    results = summarise(table, table.rows, values)
    found = {r.row.labels["method"]: r.summaries["reduction"] for r in results if r.values}
    assert found.pop("none").mean == 0 and found.keys() == expected.keys() and len(found) == 4
    for label, reduction in found.items():
        assert reduction.mean == pytest.approx(expected[label], abs=1), label
        assert reduction.within
    text = markdown.page(Result(table, table.metrics, [Section("", "", results)], [], [], ""))
    assert "%: measured (fake tensors) | byte model | difference | within 2.5% |" in text


def test_a_reduction_needs_a_known_metric(tmp_path):
    text = (CONFIGS / "tables" / "pruning_memory.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("reduction_of: training_bytes", "reduction_of: nothing"))
    with pytest.raises(ValueError, match=r"reduction_of 'nothing', allowed: .*training_bytes"):
        spec.load(tmp_path, "bad")


@pytest.mark.slow
def test_accuracy_rows_compose():
    for row in spec.load(CONFIGS / "tables", "pruning_accuracy").rows:
        cfg = cli.compose([*row.overrides], CONFIGS)
        hydra.utils.instantiate(cfg.method)
        assert cfg.data.image_size == 224 and row.requires


def replaced_in(build, **settings):
    with measure.fake_model(build) as model:
        report = actpress.apply(model, BlockPruning(**settings))
        types = {name: type(module) for name, module in model.named_modules()}
    return report, types


def test_resmlp_head_and_patch_embedding_stay_dense():
    report, types = replaced_in(lambda: timm.create_model("resmlp_12_224"))
    inner = ("linear_tokens", "mlp_channels.fc1", "mlp_channels.fc2")
    assert set(report.replaced) == {f"blocks.{i}.{name}" for i in range(12) for name in inner}
    assert types["head"] is nn.Linear and types["stem.proj"] is nn.Conv2d
    assert types["blocks.11.linear_tokens"] is layers.Linear


@pytest.mark.parametrize(
    ("model", "inner"),
    [
        ("resmlp_s12", ("linear_tokens", "mlp_channels.fc1", "mlp_channels.fc2")),
        ("vit_ti", ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    ],
)
def test_configured_models(model, inner):
    cfg = cli.compose([f"model={model}", "data=imagenet", "method=pruning"], CONFIGS)
    with measure.fake_model(lambda: hydra.utils.instantiate(cfg.model)) as net:
        report = actpress.apply(net, hydra.utils.instantiate(cfg.method))
        assert set(report.replaced) == {f"blocks.{i}.{name}" for i in range(12) for name in inner}
        x = torch.empty(2, 3, 224, 224)
        assert saved_bytes(lambda: net(x).sum()) > 0


@pytest.mark.parametrize("name", ["head", "fc", "classifier"])
def test_classifiers_and_listed_names_stay_dense(name):
    net = nn.Sequential()
    for child in ("patch_embed", "body", "tail", name):
        net.add_module(child, nn.Linear(4, 4))
    assert list(actpress.apply(copy.deepcopy(net), BlockPruning()).replaced) == ["body", "tail"]
    only = BlockPruning(skip=("t*", name, "patch_embed"))
    assert list(actpress.apply(copy.deepcopy(net), only).replaced) == ["body"]
    assert len(actpress.apply(net, BlockPruning(skip=())).replaced) == 4


def test_a_model_of_skipped_layers_is_an_error():
    net = nn.Sequential()
    net.add_module("head", nn.Linear(4, 4))
    with pytest.raises(ValueError, match="BlockPruning"):
        actpress.apply(net, BlockPruning())


def test_configuration_is_the_default_and_lists_become_tuples():
    method = hydra.utils.instantiate(OmegaConf.load(CONFIGS / "method" / "pruning.yaml"))
    assert method == BlockPruning() and hash(method) == hash(BlockPruning())
    listed = BlockPruning(block=[4, 8], skip=["a"])
    assert listed.block == (4, 8) and listed.skip == ("a",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, "sparsity=1.0, allowed: 0 <= sparsity < 1"),
        ({"sparsity": -0.1}, "sparsity=-0.1, allowed"),
        ({"sparsity": float("nan")}, "sparsity=nan, allowed"),
        ({"sparsity": "0.8"}, "sparsity='0.8', allowed"),
        ({"block": 8}, "block=8, allowed: two integers from 1"),
        ({"block": (8, 0)}, r"block=\(8, 0\), allowed"),
        ({"block": (8, 8, 8)}, r"block=\(8, 8, 8\), allowed"),
        ({"block": (8.0, 8)}, r"block=\(8.0, 8\), allowed"),
        ({"select": "random"}, "select='random', allowed: topk, sample"),
        ({"start_epoch": -1}, "start_epoch=-1, allowed: integers from 0"),
        ({"start_epoch": 1.5}, "start_epoch=1.5, allowed"),
        ({"skip": "head"}, "skip='head', allowed: a list of name patterns"),
    ],
)
def test_bad_arguments_name_the_value_and_the_allowed_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockPruning(**arguments)
