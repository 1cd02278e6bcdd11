"""Training: the loop against its arithmetic, how runs end, the meters, and what the loop costs."""

import copy
import json
import math
import os
import statistics
import time
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from actpress import measure
from actpress.train import engine, metrics, record, run
from actpress.train.errors import InputError
from training import (
    CPU,
    config,
    differences,
    interrupt,
    trainer_for,
)

# A whole run


def test_a_run_learns_and_leaves_a_record(tmp_path, capsys):
    cfg = config(tmp_path, "recipe.epochs=5", "data.train_size=256", "recipe.optimizer.lr=0.02")
    finished = run.train(cfg)
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
    out = capsys.readouterr().out
    assert out.count("epoch ") == 5 + 1
    accuracy = f"test accuracy {metrics['top1_last']:.2f}%"
    assert out.splitlines()[-1] == f"run {finished['run_id']} ended ok: {accuracy} | record {files.record} | W&B off"


def test_saved_bytes_of_the_run_are_those_of_the_ruler(tmp_path):
    trainer = trainer_for(tmp_path)
    x, y = next(iter(trainer.data.train))
    twin = copy.deepcopy(trainer.model)
    trainer._next_step(x, y)
    assert trainer.measured["saved_bytes"] == measure.saved_bytes(lambda: nn.functional.cross_entropy(twin(x), y))


def test_measuring_changes_no_weight(tmp_path):
    ruled, plain = (trainer_for(tmp_path, "method=division", "recipe.epochs=1") for _ in range(2))
    plain.measured = {"saved_bytes": 0, "peak_bytes": 0}
    for trainer in (ruled, plain):
        engine.seed_everything(0)
        trainer.fit(on_epoch=lambda row: None, log=lambda step, values: None)
    assert ruled.measured["peak_bytes"] > ruled.measured["saved_bytes"] > 0
    assert differences(ruled.model.state_dict(), plain.model.state_dict()) == []


def test_a_run_of_one_step_has_no_peak_and_no_speed(tmp_path):
    metrics = run.train(config(tmp_path, "recipe.epochs=1", "data.train_size=16"))["metrics"]
    assert (metrics["steps"], metrics["peak_bytes"], metrics["train_images_per_s"]) == (1, None, None)
    assert metrics["saved_bytes"] > 0


def test_every_seed_is_its_own_trajectory_and_repeats(tmp_path):
    results = [run.train(config(tmp_path / str(i), f"seed={seed}")) for i, seed in enumerate((0, 0, 1))]
    losses = [[row["train_loss"] for row in result["history"]] for result in results]
    assert losses[0] == losses[1] != losses[2]


# Other ends


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys):
    cfg = config(tmp_path, "recipe.optimizer.lr=1e30", "recipe.schedule.warmup_epochs=0")
    finished = run.train(cfg)
    assert finished == record.read(run.files_of(cfg).record)
    assert finished["status"] == "diverged"
    assert "not finite: epoch 1" in finished["message"]
    assert finished["metrics"]["top1_last"] is None
    assert finished["history"] == []
    assert "ended diverged: no test accuracy | record " in capsys.readouterr().out


NOT_FINITE = {  # what happens to the model -> (outputs of how many of the 32 test images are not finite, test loss)
    "a weight is NaN": (lambda model: model.fc.weight.data.fill_(math.nan), 32, "nan"),
    "a bias is infinite": (lambda model: model.fc.bias.data.fill_(math.inf), 32, "nan"),
    # the loss of the images of other classes stays finite
    "one output is -infinite": (lambda model: model.fc.bias.data.index_fill_(0, torch.tensor(3), -math.inf), 32, "inf"),
    # training reads the batch's statistics, so its loss stays finite
    "a running variance is NaN": (lambda model: model.bn1.running_var.fill_(math.nan), 32, "nan"),
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("ema", [None, 0.5], ids=["last weights", "EMA"])
@pytest.mark.parametrize("damage", NOT_FINITE)
def test_a_test_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, damage, ema):
    break_model, images, loss = NOT_FINITE[damage]
    original = engine.Trainer.train_epoch

    def train_epoch(self, log):
        row = original(self, log)
        if self.epoch == 1:
            break_model(self.ema.module if ema else self.model)
        return row

    monkeypatch.setattr(engine.Trainer, "train_epoch", train_epoch)
    cfg = config(tmp_path, f"recipe.ema={ema or 'null'}")
    finished = run.train(cfg)
    assert finished == record.read(run.files_of(cfg).record)
    assert finished["status"] == "diverged"
    where = " (EMA weights)" if ema else ""
    assert finished["message"] == (
        f"the test is not finite: epoch 2, step 8, test loss {loss}, "
        f"outputs of {images} of 32 images are NaN or infinite{where}"
    )
    assert [row["epoch"] for row in finished["history"]] == [1]
    metrics = finished["metrics"]
    assert metrics["top1_best"] == metrics["top1_last"] == finished["history"][0]["test_accuracy"]


def test_an_output_that_is_infinite_is_not_hidden_by_a_finite_loss(tmp_path):
    trainer = trainer_for(tmp_path)
    batches = [(x, torch.zeros_like(y)) for x, y in trainer.data.test]
    trainer.data = types.SimpleNamespace(test=batches)
    trainer.model.fc.bias.data[3] = -math.inf
    with pytest.raises(engine.Diverged, match=r"test loss \d.*, outputs of 32 of 32 images"):
        trainer.evaluate()


def test_a_loss_that_is_not_finite_in_the_last_step_ends_the_run(tmp_path, monkeypatch):
    original = engine.Trainer._loss

    def _loss(self, x, y):
        loss, logits = original(self, x, y)
        return (loss * math.nan if self.step == 11 else loss), logits

    monkeypatch.setattr(engine.Trainer, "_loss", _loss)
    finished = run.train(config(tmp_path))  # 12 steps
    assert (finished["status"], len(finished["history"])) == ("diverged", 2)
    assert finished["message"] == "the training loss is not finite: epoch 3, at most 12 steps done"


def test_an_empty_test_set_is_named(tmp_path, monkeypatch):
    images = types.SimpleNamespace(train=[0], test=[], num_classes=10)
    monkeypatch.setattr(run.data, "create", lambda *args, **kwargs: images)
    with pytest.raises(ValueError, match="test set is empty"):
        run.train(config(tmp_path))


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
        finished = run.train(cfg)
    assert finished == record.read(run.files_of(cfg).record)
    assert (finished["status"], len(finished["history"])) == ("oom", 1)
    assert "\n" not in finished["message"]
    assert finished["metrics"]["peak_bytes"] > 0


def test_a_bug_is_recorded_and_raised(tmp_path):
    cfg = config(tmp_path)
    with interrupt(3, ValueError("a bug")), pytest.raises(ValueError, match="a bug") as caught:
        run.train(cfg)
    assert not isinstance(caught.value, InputError)
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


@pytest.mark.quick(1)
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


@pytest.mark.quick(1)
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


# Meters


def test_sums_are_means_over_samples():
    sums = metrics.Sums(CPU)
    logits = torch.tensor([[2.0, 1.0], [2.0, 1.0], [1.0, 2.0]])
    sums.add(torch.tensor(1.0), logits, torch.tensor([0, 1, 1]))
    first = sums.read()
    sums.add(torch.tensor(4.0), logits[:1], torch.tensor([1]))
    assert metrics.means(sums.read()) == ((3 * 1.0 + 4.0) / 4, 50.0)
    assert metrics.means(sums.read(), first) == (4.0, 0.0)


@pytest.mark.parametrize(("steps", "skipped"), [(0, 0), (1, 0), (5, 2), (20, 10), (100, 10)])
def test_the_first_steps_warm_up(steps, skipped):
    timer = metrics.StepTimer(CPU)
    for _ in range(steps):
        with timer:
            pass
    assert len(timer.read()) == steps
    times, warmup = timer.steady()
    assert (len(times), warmup) == (steps - skipped, skipped)


class Event:
    """A CUDA event of a device whose clock `now` is set by hand, in ms. What is recorded is done at once unless the device is `busy`."""

    now, busy = 0.0, False

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def query(self):
        return not Event.busy

    def synchronize(self):
        Event.busy = False

    def elapsed_time(self, end):
        return end.at - self.at


def test_the_host_is_timed_where_the_device_was_idle(monkeypatch):
    host = iter([0.0, 0.003, 10.0, 20.0, 20.004, 30.0, 30.001])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(host))
    timer = metrics.StepTimer(torch.device("cuda"))
    for busy in (False, True, False):
        monkeypatch.setattr(Event, "busy", busy)
        with timer:
            Event.now += 5.0
    monkeypatch.setattr(Event, "busy", True)
    timer.read()  # waits
    with timer:
        Event.now += 5.0
    assert timer.read() == pytest.approx([0.005] * 4)
    assert timer.host == [pytest.approx(0.003), None, pytest.approx(0.004), pytest.approx(0.001)]
    assert timer.steady_host() == [pytest.approx(0.004), pytest.approx(0.001)]  # two of four steps warm up
    found = metrics.milliseconds(timer.steady_host())
    assert found == {"median": pytest.approx(2.5), "iqr": pytest.approx(1.5), "n": 2}
    assert metrics.milliseconds([]) is None and metrics.milliseconds([0.002])["iqr"] == 0


# What the loop costs


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


def test_schedule_options_that_are_null_are_left_to_timm(tmp_path, monkeypatch):
    """Older versions compute with each option, whatever the schedule."""
    given = {}
    monkeypatch.setattr(engine, "create_scheduler_v2", lambda *_, **options: given.update(options) or (None, 1))
    cfg = config(tmp_path, "recipe=division_cifar10")
    engine.create_schedule(None, cfg.recipe.schedule, 3, 10)
    assert "num_epochs" in given and None not in given.values()


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
    sums = metrics.Sums(CPU)

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
