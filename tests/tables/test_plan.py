"""What is recorded, what is to be measured, and what that costs."""

import pytest

import small_tables
from actpress.tables import plan
from actpress.tables.kind import compose
from actpress.tables.spec import Row
from actpress.train import cli, record
from paths import ROOT

NOT_HERE = "  - labels: {method: actnn}\n    requires: method actnn"


@pytest.fixture
def project(tmp_path):
    return small_tables.create(tmp_path)


def test_the_plan_says_what_it_costs_where_that_is_known(project):
    project.write("training")
    project.write_runs(90.0)
    table = project.load("training")
    lines = plan.lines(table, project, project.results)
    assert "a record is there" in lines[1] and lines[-1] == "  rows: 4 recorded; to results/tables"
    project.write("training", **{"seeds: [0, 1]": "seeds: [0]\nreuse: here"})
    lines = plan.lines(project.load("training"), project, project.local)
    assert "to train, 5 epochs" in lines[1] and ", 0:35 where it was recorded" in lines[1]
    assert lines[-1] == "  rows: 2 to measure, 1:10 where they were recorded; to outputs/reproduced/tables"


def test_a_row_that_no_machine_can_run_takes_no_record_of_another(project):
    project.write("training")
    project.write_runs(90.0)
    project.write("training", **{"  - labels: {method: division}\n    overrides: [method=division]": NOT_HERE})
    rows = project.measurements("training")
    assert [plan.find(row) is None for row in rows] == [False, False, True, True]


def test_a_composed_row_is_what_the_command_line_composes():
    row = Row({}, ("model=resnet20", "method=division"), {})
    for seed in (0, 3):
        line = cli.compose([*row.overrides, f"seed={seed}"], ROOT / "configs")
        assert compose(row, seed) == line and record.run_id(compose(row, seed)).count(f"-s{seed}-")
