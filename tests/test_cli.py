"""Bad input ends in one line that names the value and what is allowed; good input is let through."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from actpress import cli, run, settings
from training import CONFIGS, command, config

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
