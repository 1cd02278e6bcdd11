"""The table of networks: every row is buildable and comes from a builder; what a cell says; sizes of gradients on small networks."""

import re
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from actpress.measure.check import Check, Gradient, check
from actpress.methods import BlockPruning, Division, Quantize, Stock
from actpress.report import markdown, terminal
from actpress.swap import Method
from actpress.swap.saving import Dense
from actpress.tables import kinds, networks, plan, spec
from actpress.tables.kind import Folder, Project
from actpress.tables.kinds.function import arguments
from actpress.train import record
from paths import ROOT

PROJECT = Project()
TABLE = spec.load(PROJECT.tables, "networks")
ROWS = plan.measurements(TABLE, PROJECT)
ONE = {"draws": 1, "steps": 1, "seed": 0}


def test_every_network_has_a_row_for_every_method_and_only_transformers_needs_an_extra():
    configs = {path.stem: instantiate(OmegaConf.load(path)) for path in (ROOT / "configs" / "method").glob("*.yaml")}
    exact = {name for name, method in configs.items() if not method.rules()} - {
        "none"
    }  # their gradients need no comparison
    methods = configs.keys() - exact
    found = {(asked["network"], asked["method"]) for row in ROWS for asked in [arguments(row)]}
    assert found == {(network, method) for network in networks.NETWORKS for method in methods}
    assert len(ROWS) == len({tuple(row.row.labels.values()) for row in ROWS})
    for row in ROWS:
        asked = arguments(row)
        library = networks.NETWORKS[asked["network"]].library
        assert row.row.labels["network"].startswith(f"{library} ")
        assert row.row.requires == (("transformers",) if library == "transformers" else ())
        assert asked.get("weights", "initial") == row.row.labels["weights"]
        assert asked["draws"] >= 3
        assert asked["steps"] >= 3


def test_it_is_not_measured_unless_it_is_named():
    assert not TABLE.default


@pytest.mark.quick(8)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_builds_and_its_batch_fits(name):
    network = networks.NETWORKS[name]
    if network.library == "transformers":
        pytest.importorskip("transformers")
    model = network.build()
    batch = network.batch(torch.Generator().manual_seed(1))
    with torch.no_grad():
        loss = networks.loss_of(model.train(), batch)
    assert loss.shape == ()
    assert loss.isfinite()


def test_the_same_arguments_make_the_same_network():
    first, (x, y) = networks.made("mobilenetv3_small_100", 0, "initial")
    networks.made.cache_clear()
    torch.randn(7)
    second, (again, labels) = networks.made("mobilenetv3_small_100", 0, "initial")
    assert torch.equal(x, again)
    assert torch.equal(y, labels)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(x, networks.made("mobilenetv3_small_100", 1, "initial")[1][0])


def test_trained_weights_fit_the_batch_better():
    losses = [
        networks.loss_of(*networks.made("mobilenetv3_small_100", 0, weights)).item()
        for weights in ("initial", "trained")
    ]
    assert losses[1] <= losses[0] / 2


def test_a_cell_holds_what_check_found():
    found = networks.measure({"network": "mobilenetv3_small_100", "method": "quantize"} | ONE)
    model, batch = networks.made("mobilenetv3_small_100", 0, "initial")
    torch.manual_seed(0)
    expected = check(model, Quantize(), batch, draws=1, steps=1)
    assert found["saved"] == expected.ratio > 1.5
    assert found["cosine"] == pytest.approx(expected.cosine, abs=0.05)
    assert found["size"] == pytest.approx(expected.norm_ratio, abs=0.1)
    assert found["note"] == ""


def test_stock_beside_stock_is_exact():
    found = networks.measure({"network": "mobilenetv3_small_100", "method": "none"} | ONE)
    assert found["saved"] == 1.0
    assert found["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert found["size"] == pytest.approx(1.0, abs=1e-6)
    assert found["note"] == ""


def test_a_method_that_matches_nothing_says_so():
    found = networks.measure({"network": "resnet18", "method": "inverted"} | ONE)
    assert found == {"saved": "matches nothing", "cosine": "", "size": "", "step": "", "note": ""}


def test_a_gradient_that_is_not_finite_is_a_word(monkeypatch):
    lowest = Gradient("a.weight", float("nan"), float("inf"))
    broken = Check("M", "m", "l", 3, 1, float("nan"), float("inf"), 1.0, 1, [lowest], [], {})
    monkeypatch.setattr(networks, "check", lambda *args, **kwargs: broken)
    found = networks.measure({"network": "mobilenetv3_small_100", "method": "quantize"} | ONE)
    assert (found["saved"], found["cosine"], found["size"]) == (3.0, "nan", "inf")
    assert found["note"] == "gradient not finite; lowest cosine: nan, a.weight"


def test_other_keys_are_options_of_the_method():
    row = {"network": "mobilenetv3_small_100", "method": "quantize"} | ONE
    assert networks.measure(row | {"bits": 8})["saved"] < networks.measure(row)["saved"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "resnet17"}, "network=resnet17, allowed: vit_tiny, .*resnet18"),
        ({"weights": "best"}, "weights=best, allowed: initial, trained"),
        ({"method": "nosuch"}, "nosuch"),
        ({"method": "division", "batch": 4}, "no key 'method.batch'; allowed under method: align, bits"),
        ({"draws": 0}, "draws=0, allowed: integers from 1"),
    ],
)
def test_arguments_that_are_none_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        networks.measure({"network": "mobilenetv3_small_100", "method": "none"} | ONE | change)


def noted(method: Method = Division(), **changes) -> str:  # noqa: B008 - frozen
    """The note of a Check with these numbers."""
    numbers = {"cosine": 0.9, "norm_ratio": 1.1, "saved_before": 30, "saved_after": 10} | changes
    lowest, dense = Gradient("a.weight", 0.125, 2.0), Dense("nn.Linear", 8, 0.8)
    found = Check("M", "m", "l", step_ratio=1.0, draws=3, gradients=[lowest], dense=[dense], untouched={}, **numbers)
    return networks.note(found, method)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, ""),
        ({"norm_ratio": 1.49}, ""),
        ({"norm_ratio": 1.51}, "size not within 1.5 of exact; lowest cosine: 0.12, a.weight"),
        ({"norm_ratio": 0.67}, ""),
        ({"norm_ratio": 0.66}, "size not within 1.5 of exact; lowest cosine: 0.12, a.weight"),
        ({"cosine": 0.5}, ""),
        ({"cosine": 0.49}, "cosine under 0.5; lowest cosine: 0.12, a.weight"),
        ({"norm_ratio": float("nan"), "cosine": float("nan")}, "gradient not finite; lowest cosine: 0.12, a.weight"),
        ({"saved_after": 20}, ""),
        ({"saved_after": 21}, "saves little, 80% nn.Linear stay dense"),
        ({"saved_after": 21, "method": BlockPruning()}, ""),  # means to cover Linear alone: 10/9 will do
        ({"saved_after": 28, "method": BlockPruning()}, "saves little, 80% nn.Linear stay dense"),
        ({"saved_after": 30, "method": Stock()}, ""),
    ],
)
def test_a_note_says_what_apply_and_check_warn_of(changes, note):
    assert noted(**changes) == note


def test_the_page_shows_numbers_words_and_notes(tmp_path):
    folder = Folder(tmp_path)
    wanted = [("torchvision resnet18", "inverted"), ("timm vit_tiny", "pooling")]
    rows = [
        replace(row.row, overrides=tuple(word.replace("=3", "=1") for word in row.row.overrides))
        for row in ROWS
        if (row.row.labels["network"], row.row.labels["method"]) in wanted
        if row.row.labels["weights"] == "initial"
    ]
    table, kind = replace(TABLE, rows=rows), kinds.get("function")
    measurements = plan.measurements(table, PROJECT, folder)
    result = kind.result(table, {m: kind.measure(m) for m in measurements})
    again = kind.result(table, {m: plan.find(m) for m in measurements})
    page = markdown.page(result)
    assert (markdown.page(again), kind.page(again)) == (page, kind.page(result))
    lines = page.splitlines()
    assert lines[4].startswith("| network | weights | method | less kept for backward, x: measured | ")
    assert lines[4].endswith(" | note |")
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[6:8]]
    assert shown[1] == ["torchvision resnet18", "initial", "inverted", "matches nothing", "", "", "", ""]
    number = r"\d+\.\d\d"
    assert shown[0][:3] == ["timm vit_tiny", "initial", "pooling"]
    assert all(re.fullmatch(rf"{number}(\d\d)?", text) for text in shown[0][3:7])
    assert re.fullmatch(
        r"saves little, \d+% nn\.Linear, .* stay dense", shown[0][7]
    )  # the patch embedding is all it has
    assert "matches nothing" in terminal.page(result, 120)


def test_the_committed_page_has_every_row_that_needs_no_extra():
    page = record.read(ROOT / "results" / "tables" / "networks.json")
    measured = [row for row in page["rows"] if row["values"]]
    assert len(measured) == len(page["rows"]) == len(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["division", "quantize"])
@pytest.mark.parametrize("name", ["regnety_002", "convnextv2_atto", "llama"])
@pytest.mark.parametrize("weights", networks.WEIGHTS)
def test_sizes_of_gradients_are_near_exact(name, method, weights):
    if networks.NETWORKS[name].library == "transformers":
        pytest.importorskip("transformers")
    found = networks.measure({"network": name, "method": method, "weights": weights} | ONE | {"draws": 3})
    assert 1 / 1.5 <= found["size"] <= 1.5
    assert found["cosine"] >= 0.5
