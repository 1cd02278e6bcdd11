"""Where a number was measured: device, versions, commit."""

import re
import subprocess

import torch

from actpress.train import provenance


def test_the_environment_names_device_versions_and_commit():
    found = provenance.environment("cpu")
    assert found["device"]
    assert found["torch"] == torch.__version__.partition("+")[0]
    assert found["cpu_threads"] == torch.get_num_threads()
    assert {"python", "torchvision", "timm", "triton", "date"} <= set(found)
    assert found["commit"] is None or re.fullmatch("[0-9a-f]{40}", found["commit"])


def test_a_changed_source_is_dirty_and_changed_results_are_not(tmp_path, monkeypatch):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *author, *arguments], check=True, capture_output=True)

    for name in ("src/provenance.py", "results/runs/a.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("1")
    git("init")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "src/provenance.py"))
    assert provenance.commit() == {"commit": None, "dirty": None}
    git("add", ".")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit()["commit"])
    assert provenance.commit()["dirty"] is False
    (tmp_path / "results/runs/a.json").write_text("2")
    assert provenance.commit()["dirty"] is False
    (tmp_path / "src/new.py").write_text("2")
    assert provenance.commit()["dirty"] is True


def test_a_copy_is_of_the_commit_it_is_said_to_be(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "git", lambda *arguments: None)
        assert provenance.commit() == {"commit": None, "dirty": None}
    monkeypatch.setenv("ACTPRESS_COMMIT", "abc")
    assert provenance.commit() == {"commit": "abc", "dirty": False}
