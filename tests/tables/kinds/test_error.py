"""Tables of errors of derivatives."""

import small_tables
from actpress.tables import kinds


def test_a_row_is_computed(tmp_path):
    project = small_tables.create(tmp_path)
    project.write("error")
    (row,) = project.measurements("error")
    found = kinds.get("error").measure(row).values
    assert 0 < found["floor_max"] <= found["max"] < 0.0325  # that of the authors' code
    assert found["seed"] == 0
