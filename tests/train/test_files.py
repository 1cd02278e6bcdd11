"""Files: names, and writes that are complete or did not happen."""

import os
import pickle
import signal

import pytest
import torch

from actpress.train import files, record, resume
from training import files_up_to


def test_names_of_devices_become_file_names_and_labels_words_of_ids():
    assert files.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert files.slug("kernels bf16") == "kernels-bf16" and files.slug(" (x) ") == "x"
    assert files.id_word("vit b/16, 2.5") == "vit_b_16_2.5" and files.id_word(3) == "3"


@pytest.mark.parametrize("writer", ["record", "checkpoint", "many small writes"])
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, writer):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(files.WriteError) as caught, files_up_to(100_000):
        if writer == "record":
            record.write(path, {"history": ["x" * 100] * 2000})
        elif writer == "checkpoint":
            resume.save(path, {"model": torch.rand(100_000)})  # torch.save says: unexpected pos
        else:
            with files.atomic_write(path) as file:
                for _ in range(20_000):
                    file.write(b"a few bytes")
    assert str(caught.value) == f"{path} could not be written: File too large"
    assert isinstance(caught.value, OSError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_an_error_of_the_block_is_not_taken_for_one_of_the_file(tmp_path):
    with pytest.raises(FileNotFoundError), files.atomic_write(tmp_path / "file") as file:
        file.write(b"begun")
        (tmp_path / "missing").read_bytes()
    assert os.listdir(tmp_path) == []


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(files.WriteError, match=r"runs/a\.json could not be written: File exists"):
        record.write(tmp_path / "runs" / "a.json", {})


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    """The new bytes are in the temporary file, on their way to the disk, when SIGKILL comes."""
    path = tmp_path / "run.json"
    path.write_text('{"run_id": "old"}')
    child = os.fork()
    if child == 0:
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        record.write(path, {"run_id": "new"})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert record.read(path) == {"run_id": "old"}
    record.write(path, {"run_id": "new"})
    assert os.listdir(tmp_path) == ["run.json"]
