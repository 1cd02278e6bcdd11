"""What tests of pages share: a project of small tables, and what its memory tables predict."""

import pytest

import small_tables
from actpress.tables.kinds import memory
from actpress.train import provenance


@pytest.fixture
def project(tmp_path):
    return small_tables.create(tmp_path)


@pytest.fixture
def predictions(monkeypatch):
    """What a memory table predicts, and where: a function that sets them."""

    def predict(saved: int, commit: str) -> None:
        monkeypatch.setattr(memory, "predicted_memory", lambda *_: {"saved_bytes": saved})
        here = provenance.environment("cpu") | {
            "commit": commit,
            "dirty": False,
            "date": f"2026-01-01T00:00:{saved % 60}",
        }
        monkeypatch.setattr(provenance, "environment", lambda device: here)

    return predict
