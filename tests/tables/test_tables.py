"""Tables: reading, expanding, comparing, rendering; and the shipped ones against their promises."""

import re

import pytest
import torchvision

import reproduce_table
import table_rows
from actpress import measure, tables
from actpress.methods import Division, Stock
from actpress.report import headlines
from paths import ROOT

FOLDER = ROOT / "configs" / "tables"
SMALL = """
title: A title
source: a paper
kind: memory
metrics:
  saved_bytes: {label: saved, unit: MiB, tolerance: 0.02, versus_baseline: ratio}
baselines: [{method: none}]
common: [model=resnet20]
sweep: {batch: {override: recipe.batch_size, values: [1, 2]}}
rows:
  - labels: {method: none}
    overrides: [method=none]
    paper: {saved_bytes: [4.0, OOM]}
  - labels: {method: division}
    overrides: [method=division]
    paper: {saved_bytes: [1.5, 2.0]}
  - labels: {method: actnn}
    requires: method actnn
    paper: {saved_bytes: [0.4, 0.8]}
"""
MIB = 2**20


@pytest.fixture
def small(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    return tables.load(tmp_path, "small")


def results(table):
    stock, division = (
        [[{"saved_bytes": 4 * MIB}], [{"saved_bytes": 8 * MIB}]],
        [[{"saved_bytes": MIB}], [{"saved_bytes": 2 * MIB}]],
    )
    return tables.summarise(table, stock + division + [[], []])


def test_rows_expand_over_the_sweep(small):
    assert len(small.cells) == 6
    assert small.cells[3].labels == {"method": "division", "batch": 2}
    assert small.cells[3].overrides == ("model=resnet20", "method=division", "recipe.batch_size=2")
    assert small.cells[3].paper == {"saved_bytes": 2.0}


def test_a_row_that_has_the_swept_label_itself_is_one_cell(tmp_path):
    row = "  - labels: {method: division, batch: largest}\n    overrides: [method=division, recipe.batch_size=8]\n"
    (tmp_path / "small.yaml").write_text(SMALL + row)
    *swept, last = tables.load(tmp_path, "small").cells
    assert len(swept) == 6
    assert last.labels == {"method": "division", "batch": "largest"}
    assert last.overrides == ("model=resnet20", "method=division", "recipe.batch_size=8")


def test_rows_of_a_fidelity_table_expand_over_networks(tmp_path):
    text = """
title: A title
source: none
kind: fidelity
metrics: {}
common: [data=digits]
networks:
  - {name: A, overrides: [model=resnet20]}
  - {name: B, overrides: [model=vit_nano]}
fidelity: {draws: 7}
rows:
  - labels: {method: division}
    overrides: [method=division]
  - labels: {method: few-bit}
    networks: [B]
    overrides: [method=few_bit]
"""
    (tmp_path / "small.yaml").write_text(text)
    table = tables.load(tmp_path, "small")
    assert [tuple(cell.labels.values()) for cell in table.cells] == [
        ("A", "division"),
        ("B", "division"),
        ("B", "few-bit"),
    ]
    assert table.cells[1].overrides == ("data=digits", "model=vit_nano", "method=division")
    assert table.fidelity["draws"] == 7 and table.fidelity["weights"] == ["trained"]
    (tmp_path / "small.yaml").write_text(text.replace("[B]", "[C]"))
    with pytest.raises(ValueError, match="network 'C', allowed: A, B"):
        tables.load(tmp_path, "small")
    (tmp_path / "small.yaml").write_text(text.replace("draws: 7", "draw: 7"))
    with pytest.raises(ValueError, match="'draw', allowed: batches, examples, draws"):
        tables.load(tmp_path, "small")


def test_measured_paper_difference_and_verdict(small):
    found = [r.summaries["saved_bytes"] for r in results(small)]
    assert (found[0].mean, found[0].difference, found[0].within) == (4.0, 0.0, True)
    assert found[1].mean == 8.0 and found[1].difference is None  # the paper ran out of memory
    assert found[2].difference == pytest.approx(-1 / 3) and found[2].within is False
    assert found[3].within is True and found[3].versus == [4.0]
    assert found[4].mean is None and found[4].n == 0


def test_rendered_text(small):
    lines = tables.render(small, results(small), "Measured somewhere.").splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert (
        rows[0]
        == "| method | batch | saved, MiB: measured (fake tensors) | paper | difference | within 2.0% | vs none |"
    )
    assert rows[2] == "| none | 1 | 4.0 | 4 | +0.0% | yes |  |"
    assert rows[3] == "| none | 2 | 8.0 | OOM |  |  |  |"
    assert rows[4] == "| division | 1 | 1.0 | 1.5 | -33.3% | **no** | 4.00x |"
    assert rows[6] == "| actnn | 1 | not run (needs method actnn) | 0.4 |  |  |  |"
    assert lines[-1] == "Measured somewhere."


def test_spread_over_seeds_and_words(small):
    mixed = [{"saved_bytes": value} for value in ("OOM", 2 * MIB, "OOM")]
    summary = tables.summarise(
        small, [[{"saved_bytes": v * MIB} for v in (3, 5)], [{"saved_bytes": "OOM"}], mixed, [], [], []]
    )
    assert (summary[0].summaries["saved_bytes"].mean, summary[0].summaries["saved_bytes"].n) == (4.0, 2)
    text = tables.render(small, summary, "")
    assert "| 4.0 ± 1.4 (n=2) |" in text and "| none | 2 | OOM | OOM |" in text and "| 2.0 (n=1 of 3) |" in text


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("kind: memory", "kind: speed", "kind 'speed', allowed: memory, training"),
        ("kind: memory", "kind: function", "kind 'function' with measure None"),
        ("kind: memory", "kind: memory\nmeasure: a.b", "kind 'memory' with measure 'a.b'"),
        ("unit: MiB", "unit: GB", "unit 'GB', allowed: GiB, MiB"),
        ("paper: {saved_bytes: [1.5, 2.0]}", "paper: {saved_bytes: [1.5]}", "1 paper numbers of saved_bytes for 2"),
        ("paper: {saved_bytes: [1.5, 2.0]}", "paper: {peak: [1.5, 2.0]}", "paper metric 'peak', allowed: saved_bytes"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    (tmp_path / "bad.yaml").write_text(SMALL.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.load(tmp_path, "bad")


@pytest.mark.parametrize("name", ["nosuch", "../tables/division_memory", str(FOLDER / "division_memory"), ".", ""])
def test_unknown_table_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"table {name!r} not found, allowed: .*division_memory"):
        tables.load(FOLDER, name)


CLAIM = {"paper": "P", "claim": "small", "metric": "saved_bytes", "text": "{:.1f}x", "show": "versus"}


@pytest.mark.parametrize(
    "row,limit,measured,verdict",
    [
        ({"method": "division", "batch": 2}, {"at_least": 3}, "4.0x", "holds"),
        ({"method": "division", "batch": 2}, {"at_least": 5}, "4.0x", "does not hold"),
        ({"method": "division", "batch": 2}, {"at_most": 5}, "4.0x", "holds"),
        ({"method": "actnn"}, {"at_least": 3}, "not run", "open"),
    ],
)
def test_headlines_say_what_was_measured(small, row, limit, measured, verdict):
    (told,) = headlines.fill([CLAIM | {"row": row} | limit], results(small))
    assert told == {"paper": "P", "claim": "small", "measured": measured, "verdict": verdict}


def test_headlines_name_mistakes(small):
    with pytest.raises(ValueError, match="no row"):
        headlines.fill([CLAIM | {"row": {"method": "nosuch"}, "at_least": 1}], results(small))
    with pytest.raises(ValueError, match="show 'ratio', allowed: mean, difference, versus, paired"):
        headlines.fill([CLAIM | {"row": {"method": "none"}, "at_least": 1, "show": "ratio"}], results(small))


@pytest.mark.quick(
    6, "digits_training", "pooling_accuracy", "division_fidelity", "inverted_memory", "inverted_error", "networks"
)
@pytest.mark.parametrize("name", tables.names(FOLDER))
def test_shipped_tables_load_and_compose(name):
    table = tables.load(FOLDER, name)
    rows = table_rows.rows_of(table)
    assert len(reproduce_table.plan(table, table_rows.RESULTS)) == 2 + len(rows)
    assert len(rows) % len(table.cells) == 0  # as many for each cell: seeds, weights
    assert all(labels.keys() <= table.cells[0].labels.keys() for labels in table.baselines)
    for cell in table.cells:
        if table.kind == "function":  # its overrides are arguments, of a training config or not
            continue
        if table_rows.exists(cell):
            table_rows.compose(cell, seed=0)
        else:
            assert all(need.startswith("method ") for need in cell.requires)


NETS = {"ResNet-50": torchvision.models.resnet50, "WRN-50-2": torchvision.models.wide_resnet50_2}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETS)
def test_division_memory_reproduces_the_paper(network):
    """Batch 64 and 512: the rows between lie on a line."""
    table = tables.load(FOLDER, "division_memory")
    methods = {"Normal": Stock(), "DIVISION (official layout)": Division(align="authors"), "DIVISION": Division()}
    values = {}
    for cell in table.cells:
        labels = cell.labels
        if labels["network"] == network and labels["method"] in methods and labels["batch"] in (64, 512):
            values[labels["method"], labels["batch"]] = measure.predicted_memory(
                NETS[network], methods[labels["method"]], labels["batch"], 224, "fp32"
            )
    stock = {"ResNet-50": (5.12, 40.97), "WRN-50-2": (6.688, 53.50)}[
        network
    ]  # the second pair: 26.75 at 256, so 53.50 at 512
    division = {"ResNet-50": (0.49, 3.94), "WRN-50-2": (0.64, 5.02)}[network]
    for batch, expected, papers in zip((64, 512), stock, division, strict=True):
        assert values["Normal", batch]["saved_bytes"] / 2**30 == pytest.approx(expected, rel=0.01)
        assert values["DIVISION (official layout)", batch]["authors_activation"] / 2**30 == pytest.approx(
            papers, rel=0.025
        )
    ratio = values["Normal", 64]["saved_bytes"] / values["DIVISION", 64]["saved_bytes"]
    assert ratio >= 11.3


def test_precision_halves_activations_but_not_parameters():
    full, half = (measure.predicted_memory(torchvision.models.resnet18, Stock(), 4, 64, p) for p in ("fp32", "bf16"))
    assert half["saved_bytes"] < 0.6 * full["saved_bytes"] and half["parameter_bytes"] == full["parameter_bytes"]


def test_differences_to_the_baseline_are_paired_by_seed(tmp_path):
    text = SMALL.replace("kind: memory", "kind: training").replace("unit: MiB", 'unit: "%"')
    (tmp_path / "small.yaml").write_text(text.replace("versus_baseline: ratio", "versus_baseline: difference"))
    table = tables.load(tmp_path, "small")
    stock = [{"seed": seed, "saved_bytes": value} for seed, value in ((0, 70.0), (1, 80.0), (2, 75.0))]
    ours = [{"seed": seed, "saved_bytes": value} for seed, value in ((2, 74.0), (0, 69.5), (1, 79.0), (3, 10.0))]
    found = tables.summarise(table, [stock, [], ours, [], [], []])[2].summaries["saved_bytes"].paired[0]
    assert found["n"] == 3 and found["mean"] == pytest.approx(-5 / 6) and 0 < found["p"] < 0.1
    summaries = tables.summarise(table, [stock, [], ours, [], [], []])
    assert "-0.83 ± 0.29 (paired, n=3, p=0.038)" in tables.render(table, summaries, "")
    claim = CLAIM | {"show": "paired", "text": "{mean:+.2f}, n={n}"}
    rows = [{"method": "division", "batch": 1}, {"method": "division", "batch": 2}]
    lower, not_run = headlines.fill([claim | {"row": row} for row in rows], summaries)
    assert (lower["measured"], lower["verdict"]) == ("-0.83, n=3", "lower")
    assert (not_run["measured"], not_run["verdict"]) == ("not run", "open")
    ours[2]["seed"] = 4  # two pairs are left: too few to tell
    (unclear,) = headlines.fill([claim | {"row": rows[0]}], tables.summarise(table, [stock, [], ours, [], [], []]))
    assert unclear["verdict"] == "no difference seen"


def test_time_to_accuracy_is_that_of_the_first_epoch_that_reaches_it():
    history = [
        {"epoch": epoch, "train_seconds": 10.0, "test_accuracy": accuracy}
        for epoch, accuracy in ((1, 40.0), (2, 52.0), (3, 49.0))
    ]
    assert tables.time_to(history, 50) == {"epochs_to_reach": 2, "seconds_to_reach": 20.0}
    assert tables.time_to(history, 60)["epochs_to_reach"] == "not reached"


def test_stock_of_a_row_is_without_all_its_method_sets():
    added = ("model=resnet20", "method=pooling", "method.block=1", "+method.stages={layer1.*:2}", "seed=1")
    assert table_rows.stock_of(tables.Cell({}, added, {})).overrides == ("model=resnet20", "seed=1", "method=none")
