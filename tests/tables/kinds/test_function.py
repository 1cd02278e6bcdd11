"""Tables of a Python function: it is called once for each row, and its record is named by what it was called with."""

import pytest

import small_tables
from actpress.tables import kinds
from actpress.tables.kinds import function
from actpress.train import record
from small_tables import CALLS


@pytest.fixture
def project(tmp_path):
    project = small_tables.create(tmp_path)
    project.write("function")
    return project


def test_a_row_is_called_with_its_overrides_and_found_again(project):
    kind, (first, _) = kinds.get("function"), project.measurements("function")
    assert kind.find(first) is None
    found = kind.measure(first)
    assert CALLS == [{"batch": 2, "network": "a", "method": {"name": "division", "bits": [2, 4]}, "seed": 0}]
    assert kind.find(first) == found
    assert found.values["saved"] == 4.1 and found.values["record"].startswith("function/A-division-s0-")
    entry = record.read(project.results.root / found.values["record"])
    assert entry["arguments"] == CALLS[0] and entry["environment"]["commit"]


def test_another_function_or_argument_is_another_record(project):
    name = function.file_of(project.measurements("function")[0])
    for change in ({"batch=2": "batch=4"}, {"small_tables.ratio": "small_tables.create"}):
        project.write("function", **change)
        assert function.file_of(project.measurements("function")[0]) != name


def test_a_function_may_give_the_metrics_of_its_table_only(project, monkeypatch):
    monkeypatch.setattr(small_tables, "ratio", lambda row: {"speed": 1.0})
    with pytest.raises(ValueError, match="gave speed, allowed: saved, cosine"):
        kinds.get("function").measure(project.measurements("function")[0])
