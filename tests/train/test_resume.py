"""Resume, bit for bit: after exceptions, after SIGKILL, with every option; and checkpoints that cannot be used."""

import copy
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from actpress import measure
from actpress.train import engine, logger, record, resume, run
from actpress.train.errors import InputError
from actpress.train.files import WriteError
from training import (
    CPU,
    config,
    differences,
    files_up_to,
    final_state,
    interrupt,
    train_command,
    trainer_for,
    trajectory,
)

RECIPES = {
    "plain": (),
    "method": ("method=division",),
    "all options": (
        "method=division",
        "runtime.precision=bf16",
        "runtime.channels_last=true",
        "recipe.optimizer.name=adamw",
        "recipe.optimizer.lr=0.001",
        "recipe.mixup=0.2",
        "recipe.cutmix=1.0",
        "recipe.smoothing=0.1",
        "recipe.clip_grad=1.0",
        "recipe.ema=0.9",
        "recipe.schedule.warmup_epochs=1",
    ),
    "streamed data, fp16": (
        "model=resmlp_tiny",
        "data.pipeline=stream",
        "runtime.workers=0",
        "runtime.precision=fp16",
        "data.train_size=32",
        "recipe.batch_size=8",
        "+recipe.schedule.step_on_epochs=true",
        "recipe.schedule.warmup_epochs=1",
    ),
}


@pytest.mark.quick(1, "method")
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, recipe):
    """Interrupted in the middle of the first epoch (nothing to resume from), of the second and of the third."""
    whole, broken = config(tmp_path / "whole", *recipe), config(tmp_path / "broken", *recipe)
    assert run.train(whole)["resumes"] == 0
    for step in (2, 6, 10):
        with interrupt(step, KeyError("power cut")), pytest.raises(KeyError):
            run.train(broken)
        assert record.read(run.files_of(broken).record)["status"] == "failed"
    assert run.train(broken)["resumes"] == 2
    assert differences(trajectory(final_state(whole)), trajectory(final_state(broken))) == []
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "train/images_per_s"}
            for line in file.read_text().splitlines()
        ]
        for file in (run.files_of(whole).log, run.files_of(broken).log)
    ]
    assert logs[0] == logs[1]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [RECIPES["method"], RECIPES["all options"]], ids=["method", "all options"])
def test_a_resumed_run_on_a_gpu_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, recipe):
    recipe = (*recipe, "runtime.device=cuda")
    whole, broken = config(tmp_path / "whole", *recipe), config(tmp_path / "broken", *recipe)
    metrics = run.train(whole)["metrics"]
    assert metrics["peak_reserved_bytes"] >= metrics["peak_bytes"] > metrics["saved_bytes"] > 0
    assert metrics["train_images_per_s"]["median"] > 0
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.train(broken)
    run.train(broken)
    states = [trajectory(final_state(cfg)) for cfg in (whole, broken)]
    for state in states:
        del state["measured"]  # what the allocator holds depends on what ran before in this process
    assert differences(*states) == []


def test_a_state_keeps_all_random_generators():

    engine.seed_everything(5)
    torch.rand(3), np.random.randn(), random.random()  # noqa: NPY002 - the global state is what is tested
    kept = copy.deepcopy(resume.random_state(CPU))
    draws = [(torch.rand(4).tolist(), np.random.randn(3).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
    resume.set_random_state(kept, CPU)
    again = [(torch.rand(4).tolist(), np.random.randn(3).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
    assert draws == again
    assert draws[0] != draws[1]


def test_a_complete_run_is_left_as_it_is(tmp_path, capsys):
    cfg = config(tmp_path)
    files = run.files_of(cfg)
    finished = run.train(cfg)
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (files.record, files.resume_file, files.log)
    }
    capsys.readouterr()
    assert run.train(cfg) == finished
    assert "is complete" in capsys.readouterr().out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}

    files.record.unlink()
    run.train(cfg)
    assert record.read(files.record) == finished

    files.resume_file.unlink()  # a record alone, as it is committed, blocks nothing
    assert run.train(cfg)["history"][0]["train_seconds"] != finished["history"][0]["train_seconds"]

    cfg.resume = False
    with interrupt(3, KeyError("power cut")), pytest.raises(KeyError):
        run.train(cfg)
    capsys.readouterr()
    cfg.resume = True  # the old run is gone: nothing is complete any more
    assert run.train(cfg)["status"] == "ok"
    assert "is complete" not in capsys.readouterr().out


def folder_of_images(root, shade: int):
    """Two classes of CIFAR-10's layout, 8 training images and 4 test images each."""
    for split, count in (("train", 8), ("test", 4)):
        for name in ("cat", "dog"):
            for index in range(count):
                path = root / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(index).integers(shade, size=(16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
    return root


FOLDER = ("data=cifar10", "data.source=folder", "data.num_classes=2", "data.train_size=16", "data.test_size=8")


@pytest.mark.quick(1)
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "unfinished"])
def test_a_run_on_a_folder_is_not_taken_for_one_on_another(tmp_path, complete):
    """The same names and counts: the images alone differ."""
    first, other = (folder_of_images(tmp_path / name, shade) for name, shade in (("a", 9), ("b", 200)))
    cfg, with_other = (config(tmp_path, *FOLDER, "recipe.batch_size=8", f"data.root={root}") for root in (first, other))
    assert record.run_id(cfg) == record.run_id(with_other)
    with nullcontext() if complete else interrupt(3, KeyError("power cut")), suppress(KeyError):
        run.train(cfg)
    files = run.files_of(cfg)
    before = files.record.read_bytes(), files.resume_file.read_bytes()
    with pytest.raises(InputError, match=r"was trained on .*, but the data are .*; restore those data") as caught:
        run.train(with_other)
    assert "\n" not in str(caught.value)
    shutil.rmtree(other)
    with pytest.raises(InputError, match=f"data.root {re.escape(str(other))} is not a directory"):
        run.train(with_other)
    assert before == (files.record.read_bytes(), files.resume_file.read_bytes())
    first.rename(other)
    assert run.train(with_other)["status"] == "ok"  # the same images elsewhere


def test_a_checkpoint_without_a_fingerprint_is_gone_on_from(tmp_path):
    cfg = config(tmp_path, *FOLDER, "recipe.batch_size=8", f"data.root={folder_of_images(tmp_path / 'a', 9)}")
    with interrupt(3, KeyError("power cut")), suppress(KeyError):
        run.train(cfg)
    path = run.files_of(cfg).resume_file
    state = torch.load(path, weights_only=True)
    assert len(state["data"].pop("fingerprint")) == 16
    torch.save(state, path)
    assert run.train(cfg)["resumes"] == 1


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:100],
        lambda text: "",
        lambda text: "{}",
        lambda text: '{"status": "ok"}',
        lambda text: text.replace("-s0-", "-s1-"),
        lambda text: text.replace('"top1_last": ', '"top1_last": 1'),
    ],
    ids=["cut short", "empty", "an empty object", "a status alone", "of another run", "another accuracy"],
)
def test_a_complete_run_says_what_it_reached_and_restores_a_damaged_record(tmp_path, capsys, damage):
    cfg = config(tmp_path, "recipe.epochs=1")
    files, finished = run.files_of(cfg), run.train(cfg)
    files.record.write_text(damage(files.record.read_text()))
    capsys.readouterr()
    assert run.train(cfg) == finished == record.read(files.record)
    (line,) = capsys.readouterr().out.splitlines()
    accuracy = f"test accuracy {finished['metrics']['top1_last']:.2f}%"
    what = f"run {finished['run_id']} is complete (resume=false trains anew)"
    assert line == f"{what}: {accuracy} | record {files.record} | W&B off"


def test_a_complete_run_leaves_a_record_of_itself_from_elsewhere(tmp_path):
    cfg = config(tmp_path, "recipe.epochs=1")
    files, finished = run.files_of(cfg), run.train(cfg)
    elsewhere = finished | {"environment": finished["environment"] | {"device": "another processor"}}
    record.write(files.record, elsewhere)
    run.train(cfg)
    assert record.read(files.record) == elsewhere


@pytest.mark.quick(1)
@pytest.mark.parametrize("where", ["epoch 2", "the last epoch"])
def test_a_full_disk_ends_the_run_and_a_later_one_goes_on(tmp_path, where):
    epochs = {"epoch 2": 3, "the last epoch": 2}[where]
    whole, broken = (config(tmp_path / name, f"recipe.epochs={epochs}") for name in ("whole", "broken"))
    run.train(whole)
    files = run.files_of(broken)
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.train(broken)
    before = files.resume_file.read_bytes()
    with files_up_to(600_000):  # a checkpoint takes 2 MB, a record a few kB
        finished = run.train(broken)
    assert finished == record.read(files.record)
    assert finished["status"] == "failed"
    advice = "resume=true resumes from the last checkpoint"
    assert finished["message"] == f"{files.resume_file} could not be written: File too large; {advice}"
    assert files.resume_file.read_bytes() == before
    assert [path.name for path in files.folder.iterdir() if path.suffix == ".tmp"] == []
    assert run.train(broken)["status"] == "ok"
    assert differences(trajectory(final_state(whole)), trajectory(final_state(broken))) == []


def test_a_full_disk_before_the_first_checkpoint_promises_none(tmp_path):
    with files_up_to(600_000):
        finished = run.train(cfg := config(tmp_path))
    none = "could not be written: File too large; there is no checkpoint to resume from"
    assert finished["message"] == f"{run.files_of(cfg).resume_file} {none}"


def test_a_full_disk_without_room_for_the_record_is_named(tmp_path):
    cfg = config(tmp_path)
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.train(cfg)
    files = run.files_of(cfg)
    before = files.record.read_bytes()
    with pytest.raises(WriteError) as caught, files_up_to(2_500):  # config.yaml and the log are smaller
        run.train(cfg)
    assert str(caught.value) == f"{files.record} could not be written: File too large"
    assert files.record.read_bytes() == before
    assert run.train(cfg)["status"] == "ok"


DAMAGED = {
    "NULs": b"\0" * 40 + b"\n",
    "two lines run together": b'{"step": 5, "lr{"step": 6}\n',
    "no step": b'{"epoch": 1}\n',
    "step null": b'{"step": null}\n',
    "step true": b'{"step": true}\n',
    "step a float": b'{"step": 1e400}\n',
    "not UTF-8": b"\xff\xfe\n",
    "an empty line": b"\n",
    "a number": b"7\n",
    "brackets without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("end", [b"", b'{"step": 9, "tra'], ids=["", "last line cut short"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_line_of_the_log_is_dropped_and_said(tmp_path, capsys, damage, end):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 4, "a": 1}\n' + DAMAGED[damage] + b'{"step": 8}\n{"step": 12}\n' + end)
    assert logger._keep_until(path, 8) == [{"step": 4, "a": 1}, {"step": 8}]
    assert path.read_text() == '{"step": 4, "a": 1}\n{"step": 8}\n'
    said = "1 damaged line(s) dropped; the curves have a gap, the record has none"
    assert capsys.readouterr().err == f"{path}: {said}\n"
    assert logger._keep_until(path, 8) == [{"step": 4, "a": 1}, {"step": 8}]
    assert capsys.readouterr().err == ""


def test_a_log_of_rubbish_stops_no_resume(tmp_path):
    whole, broken = config(tmp_path / "whole"), config(tmp_path / "broken")
    run.train(whole)
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.train(broken)
    with run.files_of(broken).log.open("ab") as file:
        file.write(b"".join(DAMAGED.values()) + b'{"step": 4')
    assert run.train(broken)["status"] == "ok"
    assert differences(trajectory(final_state(whole)), trajectory(final_state(broken))) == []
    steps = [json.loads(line)["step"] for line in run.files_of(broken).log.read_text().splitlines()]
    assert steps == [4, 8, 12]


def test_two_processes_do_not_train_one_run(tmp_path):
    cfg = config(tmp_path)
    lock = run.files_of(cfg).folder / "lock"
    lock.parent.mkdir(parents=True)
    holder = (
        "import fcntl, sys\nfile = open(sys.argv[1], 'w')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint('held', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="trained by another process"):
            run.train(cfg)
        process.communicate()
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Checkpoints that cannot be used


@pytest.fixture(scope="module")
def incomplete(tmp_path_factory):
    """(folder, bytes) of the checkpoint of a run that stopped in its second epoch."""
    folder = tmp_path_factory.mktemp("incomplete")
    cfg = config(folder)
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.train(cfg)
    return folder, run.files_of(cfg).resume_file.read_bytes()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def saved_again(**changes):
    def change(content: bytes) -> bytes:

        state = torch.load(BytesIO(content), weights_only=True) | changes
        torch.save(state, file := BytesIO())
        return file.getvalue()

    return change


@pytest.mark.quick(4)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "truncated or damaged"),
        (lambda content: b"", "truncated or damaged"),
        (lambda content: b"no checkpoint", "truncated or damaged"),
        (flipped, "truncated or damaged"),
        (saved_again(run_id="resnet20-digits-other-s0-00000000"), "belongs to run resnet20-digits-other-s0-00000000"),
        (saved_again(device="cuda"), "was written on cuda, this run is on cpu"),
        (saved_again(format=0), "not in this version's format"),
        (saved_again(model={}), "not one of this version of the code"),
        (saved_again(data={"label": "other digits", "train_images": 64, "test_images": 32}), "other digits"),
    ],
    ids=[
        "cut short",
        "empty",
        "text",
        "one bit",
        "other run",
        "other device",
        "other format",
        "other model",
        "other data",
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_named_and_left_alone(incomplete, damage, message):
    folder, content = incomplete
    cfg = config(folder)
    path = run.files_of(cfg).resume_file
    path.write_bytes(damage(content))
    damaged, before = path.read_bytes(), run.files_of(cfg).record.read_bytes()
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        run.train(cfg)
    assert "resume=false" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == damaged
    assert run.files_of(cfg).record.read_bytes() == before


def test_a_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"run_id": Evil()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="truncated or damaged"):
        resume.load(tmp_path / "last.pt", "a", CPU)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_compiled_training_resumes_bit_for_bit(tmp_path):
    recipe = ("runtime.compile=true", "model=resmlp_tiny", "data.image_size=16", "model.geometry=cifar")
    whole, broken = config(tmp_path / "whole", *recipe), config(tmp_path / "broken", *recipe)
    finished = run.train(whole)
    eager = trainer_for(tmp_path, *recipe[1:])
    x, y = next(iter(eager.data.train))
    in_eager = measure.saved_bytes(lambda: eager._loss(x, y)[0])
    assert 0.9 * in_eager < finished["metrics"]["saved_bytes"] < 1.1 * in_eager  # parameters would be another 20%
    assert finished["metrics"]["peak_bytes"] is None  # the CPU's tracker would switch the compiler off
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.train(broken)
    run.train(broken)
    assert differences(trajectory(final_state(whole)), trajectory(final_state(broken))) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "division"])
def test_a_killed_command_goes_on_to_the_same_weights(tmp_path, method):
    options = ("data.train_size=240", "recipe.batch_size=4", f"method={method}")  # 60 steps an epoch

    def loaded(folder):
        (path,) = folder.glob("outputs/resnet20-*/last.pt")
        return torch.load(path, weights_only=True)

    subprocess.run(train_command(tmp_path / "whole", *options), stdout=subprocess.DEVNULL, check=True)
    killed = subprocess.Popen(train_command(tmp_path / "killed", *options), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any('"step": 100' in log.read_text() for log in tmp_path.glob("killed/outputs/resnet20-*/log.jsonl")):
        assert killed.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert loaded(tmp_path / "killed")["epoch"] == 1  # of 3: killed in the middle of the second
    again = subprocess.run(train_command(tmp_path / "killed", *options), capture_output=True, text=True)
    assert "from epoch 2 of 3" in again.stdout
    assert differences(trajectory(loaded(tmp_path / "whole")), trajectory(loaded(tmp_path / "killed"))) == []
