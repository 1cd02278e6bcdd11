"""Training: the loop against its arithmetic, resume bit for bit, how runs end, and bad input on one line.

Small on purpose: ResNet-20 on a few 16-pixel digits, one thread.
"""

import copy
import fcntl
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from actpress import checkpoint, cli, engine, logger, measure, meters, record, run, settings

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
CPU = torch.device("cpu")
SMALL = (
    "data.train_size=64",
    "data.test_size=32",
    "data.image_size=16",
    "recipe.batch_size=16",  # 4 steps an epoch
    "recipe.epochs=3",
    "runtime.device=cpu",
    "runtime.threads=1",
    "runtime.progress=false",
    "logger=none",
)
TIMES = ("train_seconds", "test_seconds")


def config(folder: Path, *overrides: str):
    paths = (f"paths.outputs={folder}/outputs", f"paths.records={folder}/runs")
    return cli.compose([*SMALL, *paths, *overrides], CONFIGS)


def trainer_for(folder: Path, *overrides: str) -> engine.Trainer:
    return run._build(config(folder, *overrides), CPU, None)[0]


def final_state(cfg) -> dict:
    return torch.load(run.files_of(cfg).checkpoint, weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Where two nests of tensors and plain Python differ, by a bit."""
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, dict):
        wrong = [f"{path}: keys {a.keys() ^ b.keys()}"] if a.keys() != b.keys() else []
        return wrong + [d for key in a.keys() & b.keys() for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, (list, tuple)):
        wrong = [f"{path}: lengths {len(a)}, {len(b)}"] if len(a) != len(b) else []
        return wrong + [d for i, pair in enumerate(zip(a, b, strict=False)) for d in differences(*pair, f"{path}.{i}")]
    return [] if a == b else [path]


def trajectory(state: dict) -> dict:
    """What of a checkpoint must be the same whatever the machine's speed and however often the run was interrupted."""
    kept = {key: state[key] for key in ("epoch", "step", "model", "optimizer", "scheduler", "scaler", "ema")}
    kept |= {key: state[key] for key in ("method", "random", "measured")}
    kept["history"] = [{key: row[key] for key in row if key not in TIMES} for row in state["history"]]
    return kept


def interrupt(step: int, error: Exception):
    """train_step, but for step `step` of the run, counted from 0, which raises `error`. Not for step 0, which measures."""
    original = engine.Trainer.train_step

    def train_step(self, x, y):
        if self.step == step:
            raise error
        return original(self, x, y)

    return mock.patch.object(engine.Trainer, "train_step", train_step)


# A whole run


def test_a_run_learns_and_leaves_a_record(tmp_path, capsys):
    cfg = config(tmp_path, "recipe.epochs=5", "data.train_size=256", "recipe.optimizer.lr=0.02")
    finished = run.run(cfg)
    files = run.files_of(cfg)
    assert record.read(files.record) == finished
    assert finished["status"] == "ok"
    assert finished["run_id"] == record.run_id(cfg)
    assert finished["data"] == {"label": "digits", "train_images": 256, "test_images": 32}
    metrics, history = finished["metrics"], finished["history"]
    assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5]
    assert metrics["top1_last"] == history[-1]["test_accuracy"]
    assert metrics["top1_best"] == max(row["test_accuracy"] for row in history)
    assert metrics["steps"] == 80
    assert metrics["train_images_per_s"]["n"] == 80 - 2 - 10  # two steps measure memory, ten warm up
    assert metrics["train_images_per_s"]["median"] > 0
    assert metrics["peak_bytes"] > metrics["saved_bytes"] > 0
    assert sorted(os.listdir(files.folder)) == ["config.yaml", "last.pt", "lock", "log.jsonl"]
    rows = [json.loads(line) for line in files.log.read_text().splitlines()]
    assert [row["step"] for row in rows if "test/accuracy" in row] == [16, 32, 48, 64, 80]
    assert [row["step"] for row in rows if "train/loss" in row] == [20, 40, 60, 80]
    assert capsys.readouterr().out.count("epoch ") == 5 + 1


def test_saved_bytes_of_the_run_are_those_of_the_ruler(tmp_path):
    trainer = trainer_for(tmp_path)
    x, y = next(iter(trainer.data.train))
    twin = copy.deepcopy(trainer.model)
    trainer._next_step(x, y)
    assert trainer.measured["saved_bytes"] == measure.saved_bytes(lambda: nn.functional.cross_entropy(twin(x), y))


def test_measuring_changes_no_weight(tmp_path):
    ruled, plain = trainer_for(tmp_path, "method=division"), trainer_for(tmp_path, "method=division")
    plain.measured = {"saved_bytes": 0, "peak_bytes": 0}
    for trainer in (ruled, plain):
        engine.seed_everything(0)
        trainer.fit(on_epoch=lambda row: None, log=lambda step, values: None)
    assert ruled.measured["peak_bytes"] > ruled.measured["saved_bytes"] > 0
    assert differences(ruled.model.state_dict(), plain.model.state_dict()) == []


def test_a_run_of_one_step_has_no_peak_and_no_speed(tmp_path):
    metrics = run.run(config(tmp_path, "recipe.epochs=1", "data.train_size=16"))["metrics"]
    assert (metrics["steps"], metrics["peak_bytes"], metrics["train_images_per_s"]) == (1, None, None)
    assert metrics["saved_bytes"] > 0


def test_every_seed_is_its_own_trajectory_and_repeats(tmp_path):
    results = [run.run(config(tmp_path / str(i), f"seed={seed}")) for i, seed in enumerate((0, 0, 1))]
    losses = [[row["train_loss"] for row in result["history"]] for result in results]
    assert losses[0] == losses[1] != losses[2]


# Resume

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


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, recipe):
    """Interrupted in the middle of the first epoch (nothing to resume from), of the second and of the third."""
    whole, broken = config(tmp_path / "whole", *recipe), config(tmp_path / "broken", *recipe)
    assert run.run(whole)["resumes"] == 0
    for step in (2, 6, 10):
        with interrupt(step, KeyError("power cut")), pytest.raises(KeyError):
            run.run(broken)
        assert record.read(run.files_of(broken).record)["status"] == "failed"
    assert run.run(broken)["resumes"] == 2
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
    metrics = run.run(whole)["metrics"]
    assert metrics["peak_reserved_bytes"] >= metrics["peak_bytes"] > metrics["saved_bytes"] > 0
    assert metrics["train_images_per_s"]["median"] > 0
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.run(broken)
    run.run(broken)
    states = [trajectory(final_state(cfg)) for cfg in (whole, broken)]
    for state in states:
        del state["measured"]  # what the allocator holds depends on what ran before in this process
    assert differences(*states) == []


def test_a_state_keeps_all_random_generators():
    import random

    import numpy as np

    engine.seed_everything(5)
    torch.rand(3), np.random.randn(), random.random()  # noqa: NPY002 - the global state is what is tested
    kept = copy.deepcopy(checkpoint.random_state(CPU))
    draws = [(torch.rand(4).tolist(), np.random.randn(3).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
    checkpoint.set_random_state(kept, CPU)
    again = [(torch.rand(4).tolist(), np.random.randn(3).tolist(), random.random()) for _ in range(2)]  # noqa: NPY002
    assert draws == again
    assert draws[0] != draws[1]


def test_a_complete_run_is_left_as_it_is(tmp_path, capsys):
    cfg = config(tmp_path)
    files = run.files_of(cfg)
    finished = run.run(cfg)
    before = {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (files.record, files.checkpoint, files.log)
    }
    capsys.readouterr()
    assert run.run(cfg) == finished
    assert "is complete" in capsys.readouterr().out
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}

    files.record.unlink()
    run.run(cfg)
    assert record.read(files.record) == finished

    files.checkpoint.unlink()  # a record alone, as it is committed, blocks nothing
    assert run.run(cfg)["history"][0]["train_seconds"] != finished["history"][0]["train_seconds"]

    cfg.resume = False
    with interrupt(3, KeyError("power cut")), pytest.raises(KeyError):
        run.run(cfg)
    capsys.readouterr()
    cfg.resume = True  # the old run is gone: nothing is complete any more
    assert run.run(cfg)["status"] == "ok"
    assert "is complete" not in capsys.readouterr().out


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
        with pytest.raises(run.InputError, match="trained by another process"):
            run.run(cfg)
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
        run.run(cfg)
    return folder, run.files_of(cfg).checkpoint.read_bytes()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def saved_again(**changes):
    def change(content: bytes) -> bytes:
        from io import BytesIO

        state = torch.load(BytesIO(content), weights_only=True) | changes
        torch.save(state, file := BytesIO())
        return file.getvalue()

    return change


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
    path = run.files_of(cfg).checkpoint
    path.write_bytes(damage(content))
    damaged, before = path.read_bytes(), run.files_of(cfg).record.read_bytes()
    with pytest.raises(run.InputError, match=re.escape(message)) as caught:
        run.run(cfg)
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
        checkpoint.load(tmp_path / "last.pt", "a", CPU)
    assert not (tmp_path / "ran").exists()


# Other ends


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    cfg = config(tmp_path, "recipe.optimizer.lr=1e30", "recipe.schedule.warmup_epochs=0")
    finished = run.run(cfg)
    assert finished == record.read(run.files_of(cfg).record)
    assert finished["status"] == "diverged"
    assert "not finite: epoch 1" in finished["message"]
    assert finished["metrics"]["top1_last"] is None
    assert finished["history"] == []


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), None],
    ids=["CUDA", "CPU"],
)
def test_running_out_of_memory_is_a_result(tmp_path, error):
    cfg = config(tmp_path)
    if error is None:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**50)
        error = caught.value
    with interrupt(6, error):
        finished = run.run(cfg)
    assert finished == record.read(run.files_of(cfg).record)
    assert (finished["status"], len(finished["history"])) == ("oom", 1)
    assert "\n" not in finished["message"]
    assert finished["metrics"]["peak_bytes"] > 0


def test_a_bug_is_recorded_and_raised(tmp_path):
    cfg = config(tmp_path)
    with interrupt(3, ValueError("a bug")), pytest.raises(ValueError, match="a bug") as caught:
        run.run(cfg)
    assert not isinstance(caught.value, run.InputError)
    finished = record.read(run.files_of(cfg).record)
    assert (finished["status"], finished["message"]) == ("failed", "ValueError: a bug")


# The recipe's options, each against its definition


def step_once(trainer: engine.Trainer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, logits, y) of one training step on the first batch."""
    trainer.data.train.set_epoch(0)
    x, y = next(iter(trainer.data.train))
    return (*trainer.train_step(x, y), y)


PLAIN_SGD = ("recipe.optimizer.name=momentum", "recipe.optimizer.momentum=0", "recipe.optimizer.weight_decay=0")
NO_SCHEDULE = ("recipe.schedule.name=none", "recipe.optimizer.lr=1.0")


def test_clipping_bounds_the_gradient(tmp_path):
    trainer = trainer_for(tmp_path, *PLAIN_SGD, *NO_SCHEDULE, "recipe.clip_grad=0.01")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    step_once(trainer)
    moved = math.sqrt(sum(((p - q) ** 2).sum().item() for p, q in zip(trainer.model.parameters(), before, strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-3)  # torch adds 1e-6 to the norm it divides by


def test_ema_is_the_running_mean_and_is_what_is_tested(tmp_path):
    trainer = trainer_for(tmp_path, "recipe.ema=0.75")
    name, weight = next(iter(trainer.model.named_parameters()))
    before = weight.detach().clone()
    step_once(trainer)
    expected = 0.75 * before + 0.25 * weight.detach()
    torch.testing.assert_close(trainer.ema.module.get_parameter(name).detach(), expected)
    tested = trainer.evaluate()
    trainer.ema.module.load_state_dict(trainer.model.state_dict())
    assert tested != trainer.evaluate()
    assert trainer.metrics()["tested_weights"] == "ema"


def test_label_smoothing_mixes_in_the_uniform_distribution(tmp_path):
    loss, logits, y = step_once(trainer_for(tmp_path, "recipe.smoothing=0.1"))
    log_p = logits.log_softmax(1)
    expected = -(0.9 * log_p.gather(1, y[:, None]).squeeze(1) + 0.1 * log_p.mean(1)).mean()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("option", ["recipe.mixup=0.5", "recipe.cutmix=0.5"])
def test_mixup_trains_on_soft_targets(tmp_path, option):
    trainer = trainer_for(tmp_path, option, "recipe.smoothing=0.1")
    seen = []
    trainer.criterion.register_forward_hook(lambda module, args, out: seen.append(args[1]))
    step_once(trainer)
    assert seen[0].shape == (16, 10)
    torch.testing.assert_close(seen[0].sum(1), torch.ones(16))
    assert ((seen[0] > 0.2).sum(1) == 2).any()


def test_evaluation_is_the_accuracy_and_loss_on_the_test_set(tmp_path):
    trainer = trainer_for(tmp_path, "data.test_size=40")  # the last batch holds 8
    batches = list(trainer.data.test)
    x, y = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    trainer.model.eval()
    logits = trainer.model(x)
    loss, accuracy = trainer.evaluate()
    assert len(y) == 40
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-4)  # sums in another order
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == y).double().mean().item())


def learning_rates(folder: Path, *overrides: str) -> list[float]:
    """The learning rate of every step of a run of 4 steps an epoch."""
    trainer = trainer_for(folder, "recipe.optimizer.lr=1.0", *overrides)
    used = []
    for _ in range(trainer.epochs):
        for _ in range(4):
            used.append(trainer.lr)
            trainer.step += 1
            trainer.scheduler.step_update(trainer.step)
        trainer.epoch += 1
        trainer.scheduler.step(trainer.epoch)
    return used


def test_schedules_follow_their_formulas(tmp_path):
    cosine = [0.5 * (1 + math.cos(math.pi * t / 12)) for t in range(12)]
    none = "recipe.schedule.warmup_epochs=0"
    assert learning_rates(tmp_path, none) == pytest.approx(cosine)
    warm = learning_rates(tmp_path, "recipe.schedule.warmup_epochs=1", "recipe.schedule.warmup_lr=0.2")
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, *cosine[4:]])
    cool = learning_rates(tmp_path, none, "recipe.schedule.cooldown_epochs=1", "recipe.schedule.min_lr=0.1")
    assert cool == pytest.approx([0.1 + 0.9 * value for value in cosine] + [0.1] * 4)
    step = learning_rates(tmp_path, none, "recipe.schedule.name=step", "recipe.schedule.decay_epochs=1")
    assert step == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 4)
    epochs = learning_rates(tmp_path, none, "+recipe.schedule.step_on_epochs=true")
    assert epochs == pytest.approx([0.5 * (1 + math.cos(math.pi * (t // 4) / 3)) for t in range(12)])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_keeps_half_and_trains(tmp_path, precision):
    full, half = trainer_for(tmp_path), trainer_for(tmp_path, f"runtime.precision={precision}")
    for trainer in (full, half):
        x, y = next(iter(trainer.data.train))
        loss, logits = trainer._next_step(x, y)
        assert math.isfinite(loss)
        assert logits.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert half.scaler.is_enabled() == (precision == "fp16")
    ratio = half.measured["saved_bytes"] / full.measured["saved_bytes"]
    assert 0.45 < ratio < 0.55  # all but per-channel statistics is kept in 2 bytes instead of 4


def test_channels_last_reaches_the_model(tmp_path):
    trainer = trainer_for(tmp_path, "runtime.channels_last=true")
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    step_once(trainer)
    trainer.evaluate()
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    weight = next(p for p in trainer.model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_weight_decay_covers_all_parameters_unless_asked(tmp_path):
    everything = trainer_for(tmp_path).optimizer.param_groups
    assert {group["weight_decay"] for group in everything} == {5e-4}
    filtered = trainer_for(tmp_path, "+recipe.optimizer.filter_bias_and_bn=true").optimizer.param_groups
    assert {group["weight_decay"] for group in filtered} == {0.0, 5e-4}


@pytest.mark.slow
def test_compiled_training_resumes_bit_for_bit(tmp_path):
    recipe = ("runtime.compile=true", "model=resmlp_tiny", "data.image_size=16", "model.geometry=cifar")
    whole, broken = config(tmp_path / "whole", *recipe), config(tmp_path / "broken", *recipe)
    finished = run.run(whole)
    eager = trainer_for(tmp_path, *recipe[1:])
    x, y = next(iter(eager.data.train))
    in_eager = measure.saved_bytes(lambda: eager._loss(x, y)[0])
    assert 0.9 * in_eager < finished["metrics"]["saved_bytes"] < 1.1 * in_eager  # parameters would be another 20%
    assert finished["metrics"]["peak_bytes"] is None  # the CPU's tracker would switch the compiler off
    with interrupt(6, KeyError("power cut")), pytest.raises(KeyError):
        run.run(broken)
    run.run(broken)
    assert differences(trajectory(final_state(whole)), trajectory(final_state(broken))) == []


# Meters


def test_sums_are_means_over_samples():
    sums = meters.Sums(CPU)
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    sums.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 1]))
    first = sums.read()
    sums.add(torch.tensor(4.0), logits[:1], torch.tensor([1]))
    assert meters.means(sums.read()) == ((3 * 1.0 + 4.0) / 4, 50.0)
    assert meters.means(sums.read(), first) == (4.0, 0.0)


@pytest.mark.parametrize(("steps", "skipped"), [(0, 0), (1, 0), (5, 2), (20, 10), (100, 10)])
def test_the_first_steps_warm_up(steps, skipped):
    timer = meters.StepTimer(CPU)
    for _ in range(steps):
        with timer:
            pass
    assert len(timer.read()) == steps
    times, warmup = timer.steady()
    assert (len(times), warmup) == (steps - skipped, skipped)


# Logger


def test_without_a_logger_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    assert run.run(config(tmp_path, "recipe.epochs=1"))["status"] == "ok"
    with pytest.raises(run.InputError, match="logger=none"):
        run.run(config(tmp_path, "recipe.epochs=1", "logger=wandb"))


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({"WANDB_API_KEY": "k"}, None, "online"),
        ({}, "machine api.wandb.ai login user password k", "online"),
        ({}, "machine elsewhere.org login user password k", "offline"),
        ({"WANDB_BASE_URL": "https://elsewhere.org"}, "machine elsewhere.org login user password k", "online"),
        ({}, "no netrc at all", "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
    ],
    ids=["nothing", "key", "netrc", "netrc of another host", "own server", "broken netrc", "WANDB_MODE"],
)
def test_wandb_goes_online_only_with_an_account(tmp_path, monkeypatch, environment, netrc, mode):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    if netrc:
        (tmp_path / "netrc").write_text(netrc)
    assert logger.wandb_mode("auto") == mode
    assert logger.wandb_mode("online") == "online"


class FakeWandb(types.ModuleType):
    """Records what it is called with."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.started, self.logged, self.summary, self.exits = [], [], {}, []

    def Settings(self, **options):
        return options

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            id=options["id"],
            url=None,
            summary=self.summary,
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda exit_code: self.exits.append(exit_code),
        )


def test_wandb_gets_config_curves_and_summary_and_is_resumed(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = config(tmp_path, "logger=wandb", "logger.mode=offline", "tags=[mine]", "seed=4", "data.train_size=160")
    with interrupt(16, KeyError("power cut")), pytest.raises(KeyError):
        run.run(cfg)
    finished = run.run(cfg)
    first, second = wandb.started
    assert first["id"].startswith(finished["run_id"])
    assert (second["id"], first["resume"], second["resume"]) == (first["id"], None, "allow")
    assert (first["group"], first["mode"]) == ("resnet20-digits-stock", "offline")
    assert first["tags"] == ["resnet20", "digits", "stock", "seed4", "mine"]
    assert first["config"]["recipe"]["batch_size"] == 16
    assert Path(first["dir"]) == tmp_path / "outputs"
    assert wandb.exits == [1, 0]
    assert wandb.summary["top1_last"] == finished["metrics"]["top1_last"]
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps) == [10, 20, 20, 30]
    assert {key for _, values in wandb.logged for key in values} == {
        *("train/loss", "train/accuracy", "train/images_per_s", "lr", "epoch"),
        *("test/loss", "test/accuracy", "memory/peak_bytes", "memory/saved_bytes"),
    }


def test_wandb_offline_for_real(tmp_path, capfd):
    cfg = config(tmp_path, "recipe.epochs=1", "logger=wandb", "logger.mode=offline")
    run.run(cfg)
    captured = capfd.readouterr()
    assert captured.err == ""
    assert len(captured.out.splitlines()) == 2
    assert list((tmp_path / "outputs" / "wandb").glob("offline-run-*/*.wandb"))


# Bad input

BAD_SETTINGS = {
    "recipe.epochs=-1": "recipe.epochs=-1 must be a whole number >= 1",
    "recipe.epochs=1.5": "recipe.epochs=1.5 must be a whole number >= 1",
    "recipe.batch_size=many": "recipe.batch_size=many must be a whole number >= 1",
    "recipe.smoothing=1": "recipe.smoothing=1 must be a number >= 0 and < 1",
    "recipe.ema=1": "recipe.ema=1 must be a number > 0 and < 1 or null",
    "recipe.optimizer.lr=.nan": "recipe.optimizer.lr=.nan must be a number >= 0",
    "recipe.optimizer.name=sdg": "such as sgd",
    "recipe.schedule.name=linear": "must be one of constant, cosine, multistep",
    "+recipe.schedule.warmup=1": "recipe.schedule key=warmup must be one of cooldown_epochs",
    "runtime.precision=foo": "runtime.precision=foo must be one of fp32, bf16, fp16",
    "runtime.compile=maybe": "runtime.compile=maybe must be one of true, false",
    "runtime.device=tpu": "runtime.device=tpu must be one of auto, cpu, cuda, cuda:N",
    "runtime.threads=0": "runtime.threads=0 must be a whole number >= 1 or null",
    "seed=-1": "seed=-1 must be a whole number >= 0",
    "logger.name=tensorboard": "logger.name=tensorboard must be one of wandb, none",
    "model.name=resnet21": "resnet21",
    "data.name=mnist": "mnist",
    "data.train_size=10": "recipe.batch_size is 16",
    "method.bits=3": "bits",
    "method.block=0": "block",
    "+method.colour=red": "colour",
    "data.root=${oc.env:NOT_SET_ANYWHERE}": "NOT_SET_ANYWHERE",
}


@pytest.mark.parametrize("override", BAD_SETTINGS)
def test_a_bad_setting_is_named_on_one_line(tmp_path, override):
    cfg = config(tmp_path, "method=division", override)
    with pytest.raises(run.InputError) as caught:
        run.run(cfg)
    assert BAD_SETTINGS[override] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_batches_of_odd_size_cannot_be_mixed(tmp_path):
    with pytest.raises(run.InputError, match="must be even with"):
        run.run(config(tmp_path, "recipe.mixup=0.2", "recipe.batch_size=15"))


def test_missing_data_are_named(tmp_path):
    cfg = config(tmp_path, "data=cifar10", "data.source=folder", f"data.root={tmp_path}/nowhere", "data.image_size=32")
    with pytest.raises(run.InputError, match="nowhere") as caught:
        run.run(cfg)
    assert "\n" not in str(caught.value)


def nothing_to_replace(name: str) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LogSoftmax(dim=1))


def test_a_model_without_a_layer_for_the_method_is_named(tmp_path):
    cfg = config(tmp_path, "method=division")
    cfg.model = {"_target_": f"{__name__}.nothing_to_replace", "name": "flat"}
    with pytest.raises(run.InputError, match="matches nothing"):
        run.run(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_named():
    with pytest.raises(ValueError, match="no CUDA device here"):
        settings.device("cuda")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.epohs=3"], "there is no key 'recipe.epohs'; allowed under recipe: augment, batch_size, clip_grad"),
        (["colour=red"], "there is no key 'colour'; allowed at the top level: data, logger, method, model"),
        (["recipe.augment.flips=true"], "allowed under recipe.augment: auto_augment"),
        (["model=resnet19"], "model=resnet19 is unknown; choose one of densenet121"),
        (["method=divison"], "method=divison is unknown; choose one of "),
        (["model=resnet20", "method=[a"], "'method=[a' is malformed"),
        (["epochs"], "'epochs' is malformed"),
        (["seed=0,1"], "lists several values; add -m"),
        (["data.root=${nothing"], "is malformed"),
        (["+seed=3"], "seed"),
        (["~model.nothing"], "there is no key 'model.nothing'"),
        (["hydra/launcher=nothing"], "hydra/launcher/nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_overrides_are_named_on_one_line(overrides, message):
    with pytest.raises(run.InputError) as caught:
        cli.check_overrides(overrides, CONFIGS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=resnet20,resnet19"], "model=resnet19 is unknown"),
        (["seed=range(0,3)", "method=none,division", "method.bits=2"], "there is no key 'method.bits'"),
        (["model=glob(zzz*)"], "matches no choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_choice_of_a_sweep_is_checked(overrides, message):
    with pytest.raises(run.InputError, match=re.escape(message)):
        cli.check_overrides(overrides, CONFIGS, multirun=True)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=glob(resnet*)", "seed=range(0,3)", "recipe.optimizer.lr=0.1,0.2", "hydra.sweep.dir=x"],
        ["+data.note=text", "~logger", "data.mean=[0,0,0]", "name='a, b'", "+recipe.schedule.k_decay=1.0"],
    ],
    ids=["none", "sweep", "add, delete, quote"],
)
def test_good_overrides_pass(overrides):
    cli.check_overrides(overrides, CONFIGS, multirun=True)


def command(folder: Path, *overrides: str) -> list[str]:
    paths = (f"paths.outputs={folder}/outputs", f"paths.records={folder}/runs")
    return [sys.executable, str(ROOT / "scripts" / "train.py"), *SMALL, *paths, *overrides]


def test_the_command_line_sweeps_and_reports_bad_input_on_one_line(tmp_path):
    """One sweep, whose last run is bad: the others are trained, the code is 2, stderr holds one line."""
    sweep = [*command(tmp_path, "recipe.epochs=1", "method=division", "method.bits=2,4,3"), "-m"]
    result = subprocess.run(sweep, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert re.fullmatch(r"error: [^\n]*bits[^\n]*3[^\n]*\n", result.stderr)
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    assert sorted(os.listdir(tmp_path)) == ["outputs", "runs"]


def test_the_command_line_ends_with_the_code_of_its_worst_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    endings = iter(
        [{"run_id": "a", "status": "oom", "message": "m", "metrics": {"top1_last": None}}, run.InputError("bad")]
    )

    def ending(cfg):
        result = next(endings)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(cli, "train_run", ending)
    monkeypatch.setattr(sys, "argv", ["train.py", f"paths.outputs={tmp_path}/outputs"])
    assert cli.train(CONFIGS) == 3
    assert capsys.readouterr().err == "run a ended: oom, m\n"
    assert cli.train(CONFIGS) == 2
    assert capsys.readouterr().err == "error: bad\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "modle=x"])
    assert cli.train(CONFIGS) == 2
    assert "there is no key 'modle'" in capsys.readouterr().err


# Slow: the whole command line under SIGKILL, and what the loop costs


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "division"])
def test_a_killed_command_goes_on_to_the_same_weights(tmp_path, method):
    options = ("data.train_size=600", "recipe.batch_size=8", f"method={method}")  # 75 steps an epoch

    def loaded(folder):
        (path,) = folder.glob("outputs/resnet20-*/last.pt")
        return torch.load(path, weights_only=True)

    run.run(config(tmp_path / "whole", *options))
    killed = subprocess.Popen(command(tmp_path / "killed", *options), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any('"step": 100' in log.read_text() for log in tmp_path.glob("killed/outputs/resnet20-*/log.jsonl")):
        assert killed.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert loaded(tmp_path / "killed")["epoch"] == 1  # of 3: killed in the middle of the second
    again = subprocess.run(command(tmp_path / "killed", *options), capture_output=True, text=True)
    assert "from epoch 2 of 3" in again.stdout
    assert differences(trajectory(loaded(tmp_path / "whole")), trajectory(loaded(tmp_path / "killed"))) == []


def by_hand(model, optimizer, scheduler):
    """The same training step, written as one would by hand: (x, y) -> loss."""
    criterion, count = nn.CrossEntropyLoss(), 0

    def step(x, y):
        nonlocal count
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        count += 1
        scheduler.step_update(count)
        return loss.detach()

    return step


def overhead(ours, theirs, batches, rounds: int = 150) -> float:
    """Median over rounds of ours/theirs, timed next to each other, in turns the one first and the other.

    CPU time on one thread: it leaves out what other processes take from a shared machine.
    """
    ratios = []
    for i in range(rounds):
        x, y = batches[i % len(batches)]
        seconds = {}
        for function in (ours, theirs) if i % 2 else (theirs, ours):
            begin = time.process_time()
            function(x, y)
            seconds[function] = time.process_time() - begin
        ratios.append(seconds[ours] / seconds[theirs])
    return statistics.median(ratios)


@pytest.mark.slow
def test_the_loop_costs_at_most_two_percent(tmp_path):
    """All that the loop does in a step but its report every 20 steps, with no method applied, against a loop by hand."""
    cfg = config(tmp_path, "recipe.batch_size=64", "data.train_size=256")
    trainer = run._build(cfg, CPU, None)[0]
    twin = copy.deepcopy(trainer.model)
    optimizer = engine.create_optimizer(twin, cfg.recipe.optimizer)
    scheduler, _ = engine.create_schedule(optimizer, cfg.recipe.schedule, 3, len(trainer.data.train))
    hand = by_hand(twin, optimizer, scheduler)
    batches = list(trainer.data.train)
    sums = meters.Sums(CPU)

    def ours(x, y):
        loss, logits = trainer._next_step(x, y)
        sums.add(loss, logits, y)
        trainer.step += 1

    def slower(x, y):
        hand(x, y)
        with torch.no_grad():
            twin(x[:2])  # a few percent of a step, which the comparison must see

    for x, y in batches * 2:
        ours(x, y)
        hand(x, y)
    assert trainer.measured["peak_bytes"] > 0  # the steps that measure are over
    assert overhead(ours, hand, batches) < 1.02
    assert overhead(slower, hand, batches) > 1.02
