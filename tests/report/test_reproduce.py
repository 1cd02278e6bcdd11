"""Reproducing tables: measured once, written once; the command line."""

import re

import pytest

import small_tables
from actpress.report import pages, reproduce
from actpress.train import command, record
from actpress.train.errors import BAD_INPUT
from small_tables import CALLS


def test_a_function_is_called_once_for_each_row_and_its_pages_stay_as_they_are(project, capsys):
    project.write("function")
    reproduce.main([], project)
    assert [
        {"batch": 2, "network": name, "method": {"name": "division", "bits": [2, 4]}, "seed": 0} for name in "ab"
    ] == CALLS
    shown = capsys.readouterr().out
    assert re.search(r"1/2 A, division: saved 4.10 x \(\d:\d\d so far, 1 left: about \d:\d\d\)", shown)
    assert (
        re.search(r"1 table done, 2 rows measured, in \d:\d\d", shown)
        and "results/report.html" in shown.splitlines()[-1]
    )
    before = small_tables.files(project.root)
    assert {"results/tables/function.md", "results/tables/index.md", "results/README.md"} < before.keys()
    entry = record.read(next((project.results.root / "function").glob("A-division-s0-*.json")))
    assert entry["values"] == {"saved": 4.1, "cosine": 0.9987654} and entry["environment"]["commit"]
    reproduce.main(["function"], project)
    shown = capsys.readouterr().out
    assert len(CALLS) == 2 and small_tables.files(project.root) == before
    assert "0 rows to measure, 2 recorded already" in shown and shown.splitlines()[-1] == "results/ is as it was"
    assert pages.check(project) == []


def test_the_whole_table_is_printed_with_its_verdicts(project, capsys):
    project.write("function")
    reproduce.main([], project)
    shown = capsys.readouterr().out.splitlines()
    head = next(line for line in shown if "difference" in line)
    assert head.split() == ["network", "method", "measured", "paper", "difference", "(5.0%)", "measured"]
    rows = [line.split() for line in shown if line.startswith(("A ", "B "))]
    assert rows[0] == ["A", "division", "4.10", "4", "+2.5%", "within", "0.9988"]
    assert rows[1] == ["B", "division", "3.00", "4", "-25.0%", "outside", "0.9988"]


def test_overridden_tables_and_those_of_this_machine_stay_out_of_results(project, capsys):
    project.write("function", **{"default: true": "reuse: here"})
    before = small_tables.files(project.root)
    reproduce.main(["function"], project)
    new = small_tables.files(project.root).keys() - before.keys()
    assert new and all(name.startswith("outputs/reproduced/") for name in new)
    assert capsys.readouterr().out.splitlines()[-1] == "results/ is as it was"
    project.write("function")
    reproduce.main(["function", "batch=3"], project)
    assert not (project.results.root / "tables").exists()
    reproduce.main(["function", "publish=true"], project)
    assert (project.results.root / "tables" / "function.md").exists()


@pytest.mark.parametrize("dry", ["dry=true", "dry=false"])
def test_an_override_that_no_row_can_have_is_named_before_anything_is_measured(project, capsys, dry):
    project.write("training")
    assert command.main(lambda: reproduce.main(["training", "recipe.epochs=abc", dry], project)) == BAD_INPUT
    assert capsys.readouterr() == ("", "error: recipe.epochs=abc must be a whole number >= 1\n")
    assert not (project.root / "outputs").exists()


def test_switches_that_are_none_are_named():
    with pytest.raises(ValueError, match="publish=yes, allowed: publish=true, publish=false"):
        reproduce.parse(["publish=yes"])
    with pytest.raises(ValueError, match="table 'a' is given twice; give each once"):
        reproduce.parse(["a", "b", "a"])
    found = reproduce.parse(["a", "dry=true", "data.root=x", "b"])
    assert found == (["a", "b"], ["data.root=x"], {"dry": True, "publish": False})


def test_the_same_prediction_leaves_files_as_they_are_another_makes_all_pages_anew(project, predictions):
    project.write("memory")
    predictions(4 * 2**20, "a" * 40)
    reproduce.main(["memory"], project)
    before = small_tables.files(project.root)
    predictions(4 * 2**20, "b" * 40)
    reproduce.main(["memory"], project)
    assert small_tables.files(project.root) == before and pages.check(project) == []
    predictions(3 * 2**20, "c" * 40)
    reproduce.main(["memory"], project)
    page = (project.results.root / "tables" / "memory.md").read_text()
    assert "| 3.0 | 4 | -25.0% | **no** |" in page and "commit cccccccccc" in page
    assert pages.check(project) == []
    assert "not run (needs method actnn)" in page
