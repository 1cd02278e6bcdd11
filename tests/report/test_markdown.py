"""The Markdown page of a table."""

import small_tables
from actpress.report import markdown
from actpress.tables.kind import Kind
from actpress.tables.result import Result, Section, summarise

MIB = 2**20
ENVIRONMENT = dict.fromkeys(("device", "device_type", "torch", "python", "commit"), "x") | {"dirty": False}


def page(table, values):
    section = Section("", "", summarise(table, table.rows, values))
    return markdown.page(Result(table, Kind().columns(table), [section], [ENVIRONMENT], [], ""))


def test_rendered_text(tmp_path):
    sizes = (4, 8, 1, 2)
    table = small_tables.paper_table(tmp_path)
    lines = page(table, [*([{"saved_bytes": size * MIB}] for size in sizes), [], []]).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert (
        rows[0]
        == "| method | batch | saved, MiB: measured (fake tensors) | paper | difference | within 2.0% | vs none |"
    )
    assert rows[2] == "| none | 1 | 4.0 | 4 | +0.0% | yes |  |"
    assert rows[3] == "| none | 2 | 8.0 | OOM |  |  |  |"
    assert rows[4] == "| division | 1 | 1.0 | 1.5 | -33.3% | **no** | 4.00x |"
    assert rows[6] == "| actnn | 1 | not run (needs method actnn) | 0.4 |  |  |  |"
    assert lines[-1] == "Predicted with fake tensors: x (x), torch x, Python x, commit x."


def test_spread_over_seeds_and_words(tmp_path):
    mixed = [{"saved_bytes": value} for value in ("OOM", 2 * MIB, "OOM")]
    values = [[{"saved_bytes": v * MIB} for v in (3, 5)], [{"saved_bytes": "OOM"}], mixed, [], [], []]
    text = page(small_tables.paper_table(tmp_path), values)
    assert "| 4.0 ± 1.4 (n=2) |" in text and "| none | 2 | OOM | OOM |" in text and "| 2.0 (n=1 of 3) |" in text


def test_paired_differences(tmp_path):
    assert "-0.83 ± 0.29 (paired, n=3, p=0.038)" in page(*small_tables.paired_table(tmp_path))
