"""Tables of gradients: sections, records, what a page says of each method and layer."""

import pytest

import small_tables
from actpress.report import markdown
from actpress.tables import kinds
from actpress.tables.kind import Measured, Measurement
from actpress.tables.kinds import fidelity
from actpress.tables.spec import Row
from actpress.train import provenance, record

FIGURES = {"cosine": 0.9, "cosine_sd": 0.01, "norm_ratio": 1.0, "bias": 0.1, "noise": 0.2, "excess": 1.5, "n": 4}


@pytest.fixture
def project(tmp_path):
    project = small_tables.create(tmp_path)
    project.write("fidelity")
    return project


def entry(name: str, **changes) -> dict:
    total = FIGURES | changes
    return {
        "id": name,
        "layers": ["a", "b"],
        "saved_share": 0.25,
        "figures": {"a": total, "b": FIGURES, "total": total},
    }


def test_measurements_go_network_by_network_and_weights_by_weights(project):
    found = [(m.weights, m.row.labels["method"]) for m in project.measurements("fidelity")]
    assert found == [(weights, name) for weights in ("init", "trained") for name in ("division", "division", "few-bit")]


def test_a_row_is_measured_and_found_again(project):
    project.write("fidelity", **{"weights: [init, trained]": "batches: 1, examples: 2, draws: 2, weights: [init]"})
    kind, (first, *_) = kinds.get("fidelity"), project.measurements("fidelity")
    found = kind.measure(first)
    assert kind.find(first).values == record.as_read(found.values)
    assert 0.5 < found.values["figures"]["total"]["cosine"] < 1 and 0 < found.values["saved_share"] < 0.5
    assert found.values["layers"] and found.values["figures"].keys() > set(found.values["layers"])
    assert kind.outcome(first, found).startswith("cosine 0.")


def test_a_section_has_a_line_for_each_method_that_was_measured(project):
    kind, table, measurements = kinds.get("fidelity"), project.load("fidelity"), project.measurements("fidelity")
    environment = provenance.environment("cpu")
    entries = [entry("one"), entry("two", excess=None, noise=0.0), None, None, None, None]
    found = {m: e and Measured(e, environment) for m, e in zip(measurements, entries, strict=True)}
    result = kind.result(table, found)
    first, second = result.sections
    assert (first.name, first.title) == ("init", "init weights") and not second.measured
    rows = [[s.mean for s in row.summaries.values()] for row in first.measured]
    assert rows[0][0] == "25.0%" and rows[0][5] == "1.5" and rows[1][5] == "deterministic" and rows[0][8] == "4"
    assert result.measured == "2 of 6"
    text = markdown.page(result)
    assert "not run: few-bit (needs method few_bit_of_another)" in text
    assert "not run (needs method few_bit_of_another)" in text
    assert kind.page(result)["gradients"] == {"init": {"division": "one", "division, 4 bits": "two"}, "trained": {}}


def test_details_count_the_layers_in_which_the_first_of_a_pair_is_closer():
    found = {"two": entry("", cosine=0.8)["figures"], "eight": entry("")["figures"]}
    details = fidelity.layer_by_layer(found, ["a", "b"], ("two", "eight"))
    assert [row[0] for row in details.rows] == ["a", "b", "total"]
    assert details.head == ["layer", "two: cosine", "two: norm ratio", "eight: cosine", "eight: norm ratio"]
    assert details.remark.startswith(
        "two has at least the mean cosine of eight in 1 of 2 layers. The largest shortfall"
    )
    assert fidelity.layer_by_layer(found, ["a", "b"], ("eight", "two")).remark.endswith("in 2 of 2 layers.")
    assert fidelity.layer_by_layer(found, ["a", "b"], ("eight", "none")).remark == ""  # not measured


def test_stock_of_a_row_is_without_all_its_method_sets(project):
    added = ("model=resnet20", "method=pooling", "method.block=1", "+method.stages={layer1.*:2}", "seed=1")
    row = Row({}, added, {})
    measurement = Measurement(project.load("fidelity"), row, 0, project, project.results)
    assert fidelity.stock_of(measurement).row.overrides == ("model=resnet20", "seed=1", "method=none")
