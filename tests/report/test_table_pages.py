"""Reproducing tables: measured once, written once; a page that does not fit its records is named; what a terminal shows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import progress
import report
import reproduce_table
import table_rows
from actpress import tables
from actpress.report import terminal
from actpress.train import cli, command, provenance, record
from actpress.train.errors import BAD_INPUT
from paths import ROOT

FUNCTION = """
title: Two networks
source: no paper
kind: function
measure: test_table_pages.ratio
default: true
metrics:
  saved: {label: saved, unit: x, tolerance: 0.05}
  cosine: {label: gradient, unit: cosine}
common: [batch=2]
networks:
  - {name: A, overrides: [network=a]}
  - {name: B, overrides: [network=b]}
rows:
  - labels: {method: division}
    overrides: [method.name=division, "method.bits=[2,4]"]
    paper: {saved: 4}
"""
MEMORY = """
title: Predicted
source: a paper
kind: memory
metrics:
  saved_bytes: {label: saved, unit: MiB, tolerance: 0.1}
common: [model=resnet20]
rows:
  - labels: {method: none}
    overrides: [method=none]
    paper: {saved_bytes: 4}
  - labels: {method: actnn}
    requires: method actnn
    paper: {saved_bytes: 0.5}
"""
TRAINING = """
title: Trained
source: no paper
kind: training
metrics:
  top1_last: {label: top-1, unit: "%", versus_baseline: difference}
baselines: [{method: none}]
seeds: [0, 1]
common: [model=resnet20, data=digits, recipe=quick]
rows:
  - labels: {method: none}
    overrides: [method=none]
  - labels: {method: division}
    overrides: [method=division]
"""
FIDELITY = """
title: Gradients
source: no paper
kind: fidelity
metrics: {}
common: [model=resnet20, data=digits]
fidelity: {weights: [init, trained], pair: [division, "division, 4 bits"]}
rows:
  - labels: {method: division}
    overrides: [method=division]
  - labels: {method: division, bits: 4 bits}
    overrides: [method=division, method.bits=4]
  - labels: {method: few-bit}
    requires: method few_bit_of_another
"""
SMALL = {"function": FUNCTION, "memory": MEMORY, "training": TRAINING, "fidelity": FIDELITY}
CALLS: list[dict] = []


def ratio(row: dict) -> dict:
    """What the table of kind function measures."""
    CALLS.append(row)
    return {"saved": 4.1 if row["network"] == "a" else 3.0, "cosine": 0.9987654}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with nothing but tables and results; call it with the names of SMALL to write their YAML."""
    results, local, configs = tmp_path / "results", tmp_path / "outputs" / "reproduced", tmp_path / "configs" / "tables"
    (tmp_path / "README.md").write_text("No block of a GPU.\n")
    for module, names in (
        (table_rows, {"RESULTS": table_rows.Place(results), "LOCAL": table_rows.Place(local)}),
        (reproduce_table, {"RESULTS": table_rows.Place(results), "LOCAL": table_rows.Place(local), "TABLES": configs}),
        (report, {"RESULTS": results, "TABLES": configs, "ROOT": tmp_path}),
        (reproduce_table, {"ROOT": tmp_path}),
    ):
        for name, value in names.items():
            monkeypatch.setattr(module, name, value)
    configs.mkdir(parents=True)
    results.mkdir()
    (results / "LOG.md").write_text("# Log\n")
    CALLS.clear()

    def write(*kinds: str, **changes: str) -> Path:
        for kind in kinds:
            text = SMALL[kind]
            for old, new in changes.items():
                text = text.replace(old, new)
            (configs / f"{kind}.yaml").write_text(text)
        return tmp_path

    return write


def load(root: Path, name: str) -> tables.Table:
    return tables.load(root / "configs" / "tables", name)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_function_is_called_once_for_each_row_and_its_pages_stay_as_they_are(project, capsys):
    root = project("function")
    reproduce_table.main([])
    assert [
        {"batch": 2, "network": name, "method": {"name": "division", "bits": [2, 4]}, "seed": 0} for name in "ab"
    ] == CALLS
    shown = capsys.readouterr().out
    assert re.search(r"1/2 A, division: saved 4.10 x \(\d:\d\d so far, 1 left: about \d:\d\d\)", shown)
    assert (
        re.search(r"1 table done, 2 rows measured, in \d:\d\d", shown)
        and "results/report.html" in shown.splitlines()[-1]
    )
    before = files(root)
    assert {"results/tables/function.md", "results/tables/index.md", "results/README.md"} < before.keys()
    entry = record.read(next((root / "results" / "function").glob("A-division-s0-*.json")))
    assert entry["values"] == {"saved": 4.1, "cosine": 0.9987654} and entry["environment"]["commit"]
    reproduce_table.main(["function"])
    shown = capsys.readouterr().out
    assert len(CALLS) == 2 and files(root) == before
    assert "0 rows to measure, 2 recorded already" in shown and shown.splitlines()[-1] == "results/ is as it was"
    assert report.check() == []


def test_a_function_may_give_the_metrics_of_its_table_only(project, monkeypatch):
    project("function")
    monkeypatch.setattr(sys.modules[__name__], "ratio", lambda row: {"speed": 1.0})
    with pytest.raises(ValueError, match="gave speed, allowed: saved, cosine"):
        reproduce_table.main([])


def test_the_whole_table_is_printed_with_its_verdicts(project, capsys):
    project("function")
    reproduce_table.main([])
    shown = capsys.readouterr().out.splitlines()
    head = next(line for line in shown if "difference" in line)
    assert head.split() == ["network", "method", "measured", "paper", "difference", "(5.0%)", "measured"]
    rows = [line.split() for line in shown if line.startswith(("A ", "B "))]
    assert rows[0] == ["A", "division", "4.10", "4", "+2.5%", "within", "0.9988"]
    assert rows[1] == ["B", "division", "3.00", "4", "-25.0%", "outside", "0.9988"]


def test_a_function_that_is_called_otherwise_makes_its_page_stale(project):
    root = project("function")
    reproduce_table.main([])
    project("function", **{"batch=2": "batch=4"})
    name = table_rows.function_file(table_rows.rows_of(load(root, "function"))[0]).rpartition("-")[0]
    (first, second) = report.check()
    assert first.startswith(f"function: A, division is stale: the page shows {name}-") and "B, division" in second
    assert report.main([]) == 1  # and leaves the page as it is
    assert "4.10" in (root / "results" / "tables" / "function.md").read_text()
    reproduce_table.main(["function"])
    assert report.check() == [] and len(CALLS) == 4


def test_overridden_tables_and_those_of_this_machine_stay_out_of_results(project, capsys):
    root = project("function", **{"default: true": "reuse: here"})
    before = files(root)
    reproduce_table.main(["function"])
    new = files(root).keys() - before.keys()
    assert new and all(name.startswith("outputs/reproduced/") for name in new)
    assert capsys.readouterr().out.splitlines()[-1] == "results/ is as it was"
    project("function")
    reproduce_table.main(["function", "batch=3"])
    assert not (root / "results" / "tables").exists()
    reproduce_table.main(["function", "publish=true"])
    assert (root / "results" / "tables" / "function.md").exists()


@pytest.mark.parametrize("dry", ["dry=true", "dry=false"])
def test_an_override_that_no_row_can_have_is_named_before_anything_is_measured(project, capsys, dry):
    root = project("training")
    assert command.main(lambda: reproduce_table.main(["training", "recipe.epochs=abc", dry])) == BAD_INPUT
    assert capsys.readouterr() == ("", "error: recipe.epochs=abc must be a whole number >= 1\n")
    assert not (root / "outputs").exists()


def test_switches_that_are_none_are_named():
    with pytest.raises(ValueError, match="publish=yes, allowed: publish=true, publish=false"):
        reproduce_table.parse(["publish=yes"])
    with pytest.raises(ValueError, match="table 'a' is given twice; give each once"):
        reproduce_table.parse(["a", "b", "a"])
    found = reproduce_table.parse(["a", "dry=true", "data.root=x", "b"])
    assert found == (["a", "b"], ["data.root=x"], {"dry": True, "publish": False})


@pytest.fixture
def predictions(monkeypatch):
    """What a memory table predicts, and where: a function that sets them."""

    def predict(saved: int, commit: str) -> None:
        monkeypatch.setattr(table_rows, "predicted_memory", lambda *_: {"saved_bytes": saved})
        here = provenance.environment("cpu") | {
            "commit": commit,
            "dirty": False,
            "date": f"2026-01-01T00:00:{saved % 60}",
        }
        monkeypatch.setattr(provenance, "environment", lambda device: here)

    return predict


def test_the_same_prediction_leaves_files_as_they_are_another_makes_all_pages_anew(project, predictions):
    root = project("memory")
    predictions(4 * 2**20, "a" * 40)
    reproduce_table.main(["memory"])
    before = files(root)
    predictions(4 * 2**20, "b" * 40)
    reproduce_table.main(["memory"])
    assert files(root) == before and report.check() == []
    predictions(3 * 2**20, "c" * 40)
    reproduce_table.main(["memory"])
    page = (root / "results" / "tables" / "memory.md").read_text()
    assert "| 3.0 | 4 | -25.0% | **no** |" in page and "commit cccccccccc" in page
    assert report.check() == []
    assert "not run (needs method actnn)" in page


@pytest.mark.parametrize("change", ["- labels: {method: none}", "[method=none]", "| 4.0 |"])
def test_a_page_that_does_not_fit_is_named(project, predictions, change):
    root = project("memory")
    predictions(4 * 2**20, "a" * 40)
    reproduce_table.main(["memory"])
    markdown = root / "results" / "tables" / "memory.md"
    if change == "| 4.0 |":
        markdown.write_text(markdown.read_text().replace("| 4.0 |", "| 3.9 |"))
        assert report.check() == ["memory: memory.md is not what the records give; make report"]
        assert report.main([]) == 0 and report.check() == []
        return
    project("memory", **{change: change.replace("none", "division")})
    assert report.check()[0].startswith("memory: ") and "today's configuration has no record" in report.check()[0]


def test_pages_over_all_tables_are_checked(project, predictions):
    root = project("memory")
    predictions(4 * 2**20, "a" * 40)
    reproduce_table.main(["memory"])
    (root / "results" / "LOG.md").write_text("# Log\n\nA finding.\n")
    (root / "results" / "tables" / "gone.md").write_text("of a table that was deleted")
    assert report.check() == [
        "gone: gone.md belongs to no table of configs/tables; delete it",
        "results/report.html is not what the tables and records give; make report",
    ]
    (root / "results" / "tables" / "memory.json").unlink()
    assert report.check()[0] == "memory: no page; make reproduce-table TABLE=memory"


def write_runs(root: Path, accuracy: float) -> None:
    """Records of runs for the rows of the table `training`."""
    for row in table_rows.rows_of(load(root, "training")):
        name = record.run_id(table_rows.compose(row.cell, row.seed))
        epoch = {"epoch": 1, "test_accuracy": accuracy + row.seed, "train_seconds": 30.0, "test_seconds": 5.0}
        found = {"run_id": name, "status": "ok", "history": [epoch], "environment": provenance.environment("cpu")}
        metrics = dict.fromkeys(record.RUN["metrics"]) | {"top1_last": accuracy + row.seed}
        record.write(root / "results" / "runs" / f"{name}.json", found | {"metrics": metrics})


def test_trained_rows_come_from_their_records_and_an_older_default_is_stale(project, capsys):
    root = project("training")
    write_runs(root, 90.0)
    reproduce_table.main(["training"])
    assert re.search(r"none +90\.50 ± 0\.71 \(n=2\)", capsys.readouterr().out)
    assert report.check() == []
    old = record.run_id(table_rows.compose(load(root, "training").cells[0], 0))
    project("training", **{"recipe=quick]": "recipe=quick, recipe.epochs=7]"})
    found = report.check()
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
    root = project("training", "function")
    write_runs(root, 90.0)
    reproduce_table.main(["training"])
    path = root / "results" / "runs" / f"{record.run_id(table_rows.compose(load(root, 'training').cells[0], 0))}.json"
    damage(path)
    capsys.readouterr()
    for called in (
        lambda: report.main(["--check"]),
        lambda: reproduce_table.main(["function"]),
        *(
            [lambda: reproduce_table.main(["training", "dry=true"])] if path.exists() else []
        ),  # else it is to be measured
    ):
        assert command.main(called) == BAD_INPUT
        err = capsys.readouterr().err
        assert message in err and str(path) in err and len(err.splitlines()) == 1
    assert (root / "results" / "tables" / "function.md").is_file()


@pytest.mark.parametrize(("table", "place"), [("memory", "tables"), ("function", "tables"), ("function", "function")])
@pytest.mark.parametrize("text", ["", "{}", '{"values": 3}'])
def test_a_damaged_page_or_record_of_any_table_is_named(project, predictions, capsys, table, place, text):
    root = project(table)
    predictions(4 * 2**20, "a" * 40)
    reproduce_table.main([table])
    path = sorted((root / "results" / place).glob("*.json"))[0]
    path.write_text(text)
    capsys.readouterr()
    assert command.main(lambda: report.main(["--check"])) == BAD_INPUT
    err = capsys.readouterr().err
    assert str(path) in err and len(err.splitlines()) == 1


def test_the_plan_says_what_it_costs_where_that_is_known(project):
    root = project("training")
    write_runs(root, 90.0)
    table = load(root, "training")
    lines = reproduce_table.plan(table, table_rows.RESULTS)
    assert "a record is there" in lines[1] and lines[-1] == "  rows: 4 recorded; to results/tables"
    project("training", **{"seeds: [0, 1]": "seeds: [0]\nreuse: here"})
    lines = reproduce_table.plan(load(root, "training"), table_rows.LOCAL)
    assert "to train, 5 epochs" in lines[1] and ", 0:35 where it was recorded" in lines[1]
    assert lines[-1] == "  rows: 2 to measure, 1:10 where they were recorded; to outputs/reproduced/tables"


def test_a_row_that_no_machine_can_run_takes_no_record_of_another(project):
    root = project("training")
    write_runs(root, 90.0)
    project("training", **{"  - labels: {method: division}\n    overrides: [method=division]": NOT_HERE})
    rows = table_rows.rows_of(load(root, "training"))
    assert [table_rows.stored(row) is None for row in rows] == [False, False, True, True]


NOT_HERE = "  - labels: {method: actnn}\n    requires: method actnn"


def test_training_anew_leaves_records_of_elsewhere_alone(project, monkeypatch):
    root = project("training", **{"seeds: [0, 1]": "seeds: [0]\nreuse: here"})
    monkeypatch.setattr(table_rows, "ROOT", root)
    commands = []
    monkeypatch.setattr(
        table_rows.subprocess,
        "run",
        lambda command, **_: commands.append(command) or subprocess.CompletedProcess([], 1),
    )
    with pytest.raises(ValueError, match=r"training resnet20-digits-stock-s0-.* failed with exit code 1"):
        table_rows.measure(table_rows.rows_of(load(root, "training"), table_rows.LOCAL)[0])
    assert commands[0][-4:] == ["seed=0", "logger=none", "resume=false", "paths.records=outputs/reproduced/runs"]


def test_gradients_come_from_their_records(project, capsys):
    root = project("fidelity")
    figures = {"cosine": 0.9, "cosine_sd": 0.01, "norm_ratio": 1.0, "bias": 0.1, "noise": 0.2, "excess": 1.5, "n": 4}
    for row in table_rows.rows_of(load(root, "fidelity")):
        if not row.cell.requires:
            entry = {"id": table_rows.gradient_id(row), "layers": ["conv.weight"], "saved_share": 0.1}
            entry |= {
                "figures": {"conv.weight": figures, "total": figures},
                "environment": provenance.environment("cpu"),
            }
            record.write(root / "results" / "fidelity" / f"{entry['id']}.json", entry)
    reproduce_table.main(["fidelity"])
    assert report.check() == []
    page = (root / "results" / "tables" / "fidelity.md").read_text()
    assert "not run: few-bit (needs method few_bit_of_another)" in page and "in 1 of 1 layers" in page
    assert "division, 4 bits" in capsys.readouterr().out
    project("fidelity", **{"method.bits=4": "method.bits=3"})
    found = report.check()
    assert len(found) == 2 and "division, 4 bits, init weights is stale: the page shows resnet20-digits-" in found[0]


def test_a_composed_row_is_what_the_command_line_composes():
    cell = tables.Cell({}, ("model=resnet20", "method=division"), {})
    for seed in (0, 3):
        line = cli.compose([*cell.overrides, f"seed={seed}"], ROOT / "configs")
        assert table_rows.compose(cell, seed) == line and record.run_id(table_rows.compose(cell, seed)).count(
            f"-s{seed}-"
        )


def test_progress_says_what_is_left(capsys):
    times = iter([0.0, 0.0, 60.0, 60.0, 60.0, 60.0, 80.0, 80.0])
    known = {"a": None, "b": 30.0, "c": 3600.0}
    work = progress.Progress(["a", "b", "c"], str, str, known.get, lambda: next(times))
    with work.item("a") as said:
        said.append("4 MiB")
    with work.item("b", prints=True) as said:
        said.append("5 MiB")
    first, *second = capsys.readouterr().out.splitlines()
    assert first == "  1/3 a ... 4 MiB (1:00 so far, 2 left: about 1:00:30)"
    assert second == [
        "  2/3 b ... (1:00 so far, 2 left: about 1:00:30)",
        "  2/3 b: 5 MiB (1:20 so far, 1 left: about 1:00:00)",
    ]


@pytest.mark.parametrize(
    "left,expected",
    [
        (["ab"], "1 left: about 0:10"),  # as the finished one
        (["ac"], "1 left: about 0:10"),  # as what it resembles
        (["zz", "b"], "2 left: 1 of them about 0:30"),  # unknown; known from elsewhere
        (["zz"], "1 left)"),
    ],
)
def test_time_left_is_that_of_items_alike_or_of_what_is_known(capsys, left, expected):
    times = iter([0.0, 0.0, 10.0, 10.0])
    work = progress.Progress(["ab", *left], str, str, {"b": 30.0}.get, lambda: next(times))
    with work.item("ab"):
        pass
    assert f"(0:10 so far, {expected}" in capsys.readouterr().out


def columns(*widths: int) -> list[terminal.Column]:
    return [terminal.Column("h", ["x" * width, ""]) for width in widths]


@pytest.mark.parametrize("width,blocks", [(80, 2), (100, 2), (140, 1), (300, 1)])
def test_metrics_stand_side_by_side_while_there_is_room(width, blocks):
    labels = terminal.Group("", [terminal.Column("method", ["a", "b"], left=True)])
    groups = [terminal.Group("first", columns(20, 20)), terminal.Group("second", columns(30, 30))]
    text = terminal.layout(labels, groups, width)
    assert text.count("method") == blocks and "\nb" in text
    assert max(map(len, text.splitlines())) <= min(max(width, 100), 140)


def test_further_blocks_leave_out_rows_without_numbers():
    labels = terminal.Group("", [terminal.Column("method", ["a", "b"], left=True)])
    groups = [terminal.Group("first", columns(60)), terminal.Group("second", columns(70))]
    first, second = terminal.layout(labels, groups, 100).split("\n\n")
    assert "\nb" in first and "\nb" not in second
