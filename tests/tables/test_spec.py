"""YAML files of tables: what is read, how rows expand, which mistakes are named; and every file of configs/tables."""

import re

import pytest

import small_tables
from actpress.tables import kinds, plan, spec
from actpress.tables.kind import Project, compose
from paths import ROOT
from small_tables import PAPER

PROJECT = Project()

FOLDER = ROOT / "configs" / "tables"


@pytest.fixture
def small(tmp_path):
    return small_tables.paper_table(tmp_path)


def test_rows_expand_over_the_sweep(small):
    assert len(small.rows) == 6
    assert small.rows[3].labels == {"method": "division", "batch": 2}
    assert small.rows[3].overrides == ("model=resnet20", "method=division", "recipe.batch_size=2")
    assert small.rows[3].paper == {"saved_bytes": 2.0}


def test_a_row_that_has_the_swept_label_itself_is_one_cell(tmp_path):
    row = "  - labels: {method: division, batch: largest}\n    overrides: [method=division, recipe.batch_size=8]\n"
    (tmp_path / "small.yaml").write_text(PAPER + row)
    *swept, last = spec.load(tmp_path, "small").rows
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
    table = spec.load(tmp_path, "small")
    assert [tuple(row.labels.values()) for row in table.rows] == [
        ("A", "division"),
        ("B", "division"),
        ("B", "few-bit"),
    ]
    assert table.rows[1].overrides == ("data=digits", "model=vit_nano", "method=division")
    assert table.settings["draws"] == 7 and table.settings["weights"] == ["trained"]
    (tmp_path / "small.yaml").write_text(text.replace("[B]", "[C]"))
    with pytest.raises(ValueError, match="network 'C', allowed: A, B"):
        spec.load(tmp_path, "small")
    (tmp_path / "small.yaml").write_text(text.replace("draws: 7", "draw: 7"))
    with pytest.raises(ValueError, match="'draw', allowed: batches, examples, draws"):
        spec.load(tmp_path, "small")


@pytest.mark.parametrize(
    "old,new,message",
    [
        ("kind: memory", "kind: speed", "kind 'speed', allowed: error, fidelity, function, memory, training"),
        ("kind: memory", "kind: function", "measure None, allowed: a function's dotted name"),
        ("kind: memory", "kind: memory\nmeasure: a.b", "key 'measure', allowed: title, source, kind"),
        ("unit: MiB", "unit: GB", "unit 'GB', allowed: GiB, MiB"),
        ("paper: {saved_bytes: [1.5, 2.0]}", "paper: {saved_bytes: [1.5]}", "1 paper numbers of saved_bytes for 2"),
        ("paper: {saved_bytes: [1.5, 2.0]}", "paper: {peak: [1.5, 2.0]}", "paper metric 'peak', allowed: saved_bytes"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    (tmp_path / "bad.yaml").write_text(PAPER.replace(old, new))
    with pytest.raises(ValueError, match=re.escape(message)):
        spec.load(tmp_path, "bad")


@pytest.mark.parametrize("name", ["nosuch", "../tables/division_memory", str(FOLDER / "division_memory"), ".", ""])
def test_unknown_table_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"table {name!r} not found, allowed: .*division_memory"):
        spec.load(FOLDER, name)


@pytest.mark.quick(5, "digits_training", "composition_fidelity", "inverted_memory", "inverted_error", "networks")
@pytest.mark.parametrize("name", spec.names(FOLDER))
def test_shipped_tables_load_and_compose(name):
    table = spec.load(FOLDER, name)
    measurements = plan.measurements(table, PROJECT)
    assert len(plan.lines(table, PROJECT, PROJECT.results)) == 2 + len(measurements)
    assert len(measurements) % len(table.rows) == 0  # as many for each row: seeds, weights
    assert all(labels.keys() <= table.rows[0].labels.keys() for labels in table.baselines)
    for row in (table.rows[0], table.rows[-1]):  # make check-pages composes the others
        if not kinds.get(table.kind).composes:
            continue
        if plan.can_exist(row):
            compose(row, seed=0)
        else:
            assert all(need.startswith("method ") for need in row.requires)
