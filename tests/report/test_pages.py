"""Pages of results: one that does not fit its records is named, and left alone where only measuring again can repair it."""

import re
from pathlib import Path

import pytest

from actpress.report import pages, reproduce
from actpress.tables.kinds import fidelity, function
from actpress.train import command, provenance, record
from actpress.train.errors import BAD_INPUT
from small_tables import CALLS


def test_a_function_that_is_called_otherwise_makes_its_page_stale(project):
    project.write("function")
    reproduce.main([], project)
    project.write("function", **{"batch=2": "batch=4"})
    name = function.file_of(project.measurements("function")[0]).rpartition("-")[0]
    (first, second) = pages.check(project)
    assert first.startswith(f"function: A, division is stale: the page shows {name}-") and "B, division" in second
    assert pages.main(project) == 1  # and leaves the page as it is
    assert "4.10" in (project.results.root / "tables" / "function.md").read_text()
    reproduce.main(["function"], project)
    assert pages.check(project) == [] and len(CALLS) == 4


@pytest.mark.parametrize("change", ["- labels: {method: none}", "[method=none]", "| 4.0 |"])
def test_a_page_that_does_not_fit_is_named(project, predictions, change):
    project.write("memory")
    predictions(4 * 2**20, "a" * 40)
    reproduce.main(["memory"], project)
    markdown = project.results.root / "tables" / "memory.md"
    if change == "| 4.0 |":
        markdown.write_text(markdown.read_text().replace("| 4.0 |", "| 3.9 |"))
        assert pages.check(project) == ["memory: memory.md is not what the records give; make report"]
        assert pages.main(project) == 0 and pages.check(project) == []
        return
    project.write("memory", **{change: change.replace("none", "division")})
    assert (
        pages.check(project)[0].startswith("memory: ")
        and "today's configuration has no record" in pages.check(project)[0]
    )


def test_pages_over_all_tables_are_checked(project, predictions):
    project.write("memory")
    predictions(4 * 2**20, "a" * 40)
    reproduce.main(["memory"], project)
    (project.results.root / "LOG.md").write_text("# Log\n\nA finding.\n")
    (project.results.root / "tables" / "gone.md").write_text("of a table that was deleted")
    assert pages.check(project) == [
        "gone: gone.md belongs to no table of configs/tables; delete it",
        "results/report.html is not what the tables and records give; make report",
    ]
    (project.results.root / "tables" / "memory.json").unlink()
    assert pages.check(project)[0] == "memory: no page; make reproduce-table TABLE=memory"


def test_trained_rows_come_from_their_records_and_an_older_default_is_stale(project, capsys):
    project.write("training")
    project.write_runs(90.0)
    reproduce.main(["training"], project)
    assert re.search(r"none +90\.50 ± 0\.71 \(n=2\)", capsys.readouterr().out)
    assert pages.check(project) == []
    old = record.run_id(project.measurements("training")[0].config)
    project.write("training", **{"recipe=quick]": "recipe=quick, recipe.epochs=7]"})
    found = pages.check(project)
    assert len(found) == 4  # two rows of two seeds
    assert found[0] == (
        f"training: none, seed 0 is stale: the page shows {old}, and today's configuration has no record"
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "no record at"),
        (lambda path: path.write_text(""), "is not valid JSON"),
        (lambda path: path.write_text("{"), "is not valid JSON"),
        (lambda path: path.write_text('{"status": "ok"}'), "is damaged: it has no run_id"),
    ],
    ids=["gone", "empty", "cut short", "a status alone"],
)
def test_a_record_that_is_gone_or_damaged_is_named(project, capsys, damage, message):
    project.write("training", "function")
    project.write_runs(90.0)
    reproduce.main(["training"], project)
    name = record.run_id(project.measurements("training")[0].config)
    path = project.results.root / "runs" / f"{name}.json"
    damage(path)
    capsys.readouterr()
    for called in (
        lambda: pages.main(project, check_only=True),
        lambda: reproduce.main(["function"], project),
        *(
            [lambda: reproduce.main(["training", "dry=true"], project)] if path.exists() else []
        ),  # else it is to be measured
    ):
        assert command.main(called) == BAD_INPUT
        err = capsys.readouterr().err
        assert message in err and str(path) in err and len(err.splitlines()) == 1
    assert (project.results.root / "tables" / "function.md").is_file()


@pytest.mark.parametrize(("table", "place"), [("memory", "tables"), ("function", "tables"), ("function", "function")])
@pytest.mark.parametrize("text", ["", "{}", '{"values": 3}'])
def test_a_damaged_page_or_record_of_any_table_is_named(project, predictions, capsys, table, place, text):
    project.write(table)
    predictions(4 * 2**20, "a" * 40)
    reproduce.main([table], project)
    path = sorted((project.results.root / place).glob("*.json"))[0]
    path.write_text(text)
    capsys.readouterr()
    assert command.main(lambda: pages.main(project, check_only=True)) == BAD_INPUT
    err = capsys.readouterr().err
    assert str(path) in err and len(err.splitlines()) == 1


def test_gradients_come_from_their_records(project, capsys):
    project.write("fidelity")
    figures = {"cosine": 0.9, "cosine_sd": 0.01, "norm_ratio": 1.0, "bias": 0.1, "noise": 0.2, "excess": 1.5, "n": 4}
    for row in project.measurements("fidelity"):
        if not row.row.requires:
            entry = {"id": fidelity.id_of(row), "layers": ["conv.weight"], "saved_share": 0.1}
            entry |= {
                "figures": {"conv.weight": figures, "total": figures},
                "environment": provenance.environment("cpu"),
            }
            record.write(project.results.root / "fidelity" / f"{entry['id']}.json", entry)
    reproduce.main(["fidelity"], project)
    assert pages.check(project) == []
    page = (project.results.root / "tables" / "fidelity.md").read_text()
    assert "not run: few-bit (needs method few_bit_of_another)" in page and "in 1 of 1 layers" in page
    assert "division, 4 bits" in capsys.readouterr().out
    project.write("fidelity", **{"method.bits=4": "method.bits=3"})
    found = pages.check(project)
    assert len(found) == 2 and "division, 4 bits, init weights is stale: the page shows resnet20-digits-" in found[0]
