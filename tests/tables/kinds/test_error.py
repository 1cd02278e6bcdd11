"""Tables of errors of derivatives."""

import small_tables
from actpress.tables import kinds, spec
from actpress.tables.kind import Project
from actpress.tables.result import summarise


def test_a_row_is_computed(tmp_path):
    project = small_tables.create(tmp_path)
    project.write("error")
    (row,) = project.measurements("error")
    found = kinds.get("error").measure(row).values
    assert 0 < found["floor_max"] <= found["max"] < 0.0325  # that of the authors' code
    assert found["seed"] == 0


def test_the_error_table_judges_by_not_worse():
    table = spec.load(Project().tables, "inverted_error")
    gelu = next(i for i, row in enumerate(table.rows) if row.labels == {"function": "GELU", "dtype": "bf16"})
    for error, verdict in ((0.0001, True), (0.0325, True), (0.0326, False)):
        values = [[] for _ in table.rows]
        values[gelu] = [{"max": error}]
        assert summarise(table, table.rows, values)[gelu].summaries["max"].within is verdict
    assert table.metrics["max"].text(0.0000123) == "1.23e-05"
