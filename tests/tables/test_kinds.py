"""The registry of kinds: a file of tables/kinds is a kind, and nothing else has to know it."""

import pytest

import small_tables
from actpress.report import pages, reproduce
from actpress.tables import kinds

DICE = """
from actpress.tables.kind import Kind, Measured
from actpress.train import provenance, record

class Dice(Kind):
    def file(self, m):
        return f"dice/{m.row.overrides[0]}-{m.seed}.json"

    def find(self, m):
        found = m.read(self.file(m), {"pips": int})
        return found and Measured({"pips": found["pips"], "record": self.file(m), "seed": m.seed}, found["environment"])

    def measure(self, m):
        entry = {"pips": 2 + m.seed, "environment": provenance.environment("cpu")}
        record.write(m.folder.root / self.file(m), entry)
        return self.find(m)

    def cost(self, m):
        return "to throw"

KIND = Dice()
"""
TABLE = """
title: A throw
source: no paper
kind: dice
seeds: [0, 1]
metrics:
  pips: {label: pips, unit: x}
rows:
  - labels: {die: red}
    overrides: [sides=6]
"""


@pytest.mark.parametrize("name", kinds.names())
def test_every_kind_says_how_its_rows_are_found_and_measured(name):
    kind = type(kinds.get(name))
    assert {"measure", "cost"} <= vars(kind).keys()
    assert kind.find.__qualname__ != "Kind.find"
    assert kind.__doc__


def test_a_new_kind_is_one_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "dice.py").write_text(DICE)
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(tmp_path)])
    (tmp_path / "project").mkdir()
    project = small_tables.create(tmp_path / "project")
    (project.tables / "throw.yaml").write_text(TABLE)
    reproduce.main(["throw"], project)
    assert "2.50 ± 0.71 (n=2)" in capsys.readouterr().out
    assert pages.check(project) == []
    report = (project.results.root / "report.html").read_text()
    assert 'class="measured">2.50' in report and 'href="dice/sides=6-0.json"' in report
    reproduce.main(["throw"], project)
    assert "0 rows to measure, 2 recorded already" in capsys.readouterr().out
