"""The report: self-contained, linked to its sources, honest about what was not run.

Whether the committed pages fit the committed records is `make check-pages`, a step of CI: whoever measures something changes both.
"""

import re

import pytest

from actpress.report import pages
from actpress.tables.kind import Project
from actpress.train import record
from paths import ROOT


@pytest.fixture(scope="module")
def page():
    return pages.overviews(Project())[ROOT / "results" / "report.html"]


def test_the_page_stands_alone(page):
    assert not re.search(r'(src|href)="https?:|@import|url\(', page)


def test_every_link_leads_to_a_file(page):
    targets = {target for target in re.findall(r'href="([^"#]+)"', page) if "://" not in target}
    assert targets
    assert [target for target in sorted(targets) if not (ROOT / "results" / target).exists()] == []


def test_every_anchor_exists(page):
    anchors = set(re.findall(r'href="#([^"]+)"', page))
    assert anchors <= set(re.findall(r'id="([^"]+)"', page))


def test_kinds_of_numbers_look_different(page):
    for kind in ("measured", "predicted", "paper", "not-run"):
        assert f'<td class="{kind}"' in page, kind


def test_numbers_are_those_of_the_tables(page):
    stored = record.read(ROOT / "results" / "tables" / "division_memory.json")
    for row in stored["rows"]:
        mean = row["summary"]["saved_bytes"]["mean"]
        if isinstance(mean, float):
            assert f'<td class="predicted">{mean:.3f}' in page
