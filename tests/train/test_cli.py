"""Bad input ends in one line that names the value and what is allowed; good input is let through."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from actpress.train import cli, run, usage
from actpress.train.config import device
from actpress.train.errors import InputError
from actpress.train.files import WriteError
from training import CONFIGS, SMALL, config, interrupt, train_command

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
    "+method.colour=red": "method.colour: Division has no option 'colour', allowed: align, bits, block, lfc, relu_mask",
    "recipe.optimizer.weight_decay=inf": "recipe.optimizer.weight_decay=inf must be a finite number >= 0",
    "recipe.optimizer.lr=nan": "recipe.optimizer.lr=nan must be a finite number >= 0",
    "data.root=${oc.env:NOT_SET_ANYWHERE}": "NOT_SET_ANYWHERE",
    "recipe.optimizer=null": "recipe.optimizer=null must be a group of keys: name, lr, weight_decay",
    "recipe.schedule=null": "recipe.schedule=null must be a group of keys: name",
    "recipe.augment=null": "recipe.augment=null must be a group of keys",
    "+recipe.warmup=3": "recipe key=warmup must be one of epochs, batch_size, optimizer",
    "model.num_classes=5": "model.num_classes=5 must be data.num_classes=10",
    "model.image_size=32": "model.image_size=32 must be data.image_size=16",
    "model.pretrained=abc": "model.pretrained=abc must be one of true, false",
    "model._target_=5": "model._target_=5 must be the dotted name of a class or function",
    "+model.foo=3": "model.foo: create has no option 'foo', allowed: geometry, image_size, name, num_classes, pretrained",
    "recipe.schedule.decay_epochs=0": "recipe.schedule.decay_epochs=0 must be a number > 0 or null",
    "recipe.schedule.decay_epochs=abc": "recipe.schedule.decay_epochs=abc must be a number > 0 or null",
    "recipe.schedule.decay_rate=abc": "recipe.schedule.decay_rate=abc must be a number >= 0",
    "+recipe.schedule.decay_milestones=3": "recipe.schedule.decay_milestones=3 must be a list of numbers",
    "+recipe.schedule.noise=[a]": "recipe.schedule.noise=a must be a number >= 0",
    "+recipe.schedule.step_on_epochs=1": "recipe.schedule.step_on_epochs=1 must be one of true, false",
    "+recipe.schedule.decay_fn=steep": "recipe.schedule.decay_fn=steep must be one of linear, 1-sqrt",
    "recipe.optimizer.name=adahessian": "recipe.optimizer.name=adahessian needs second derivatives, which training does not compute",
    "recipe.optimizer.momentum=abc": "recipe.optimizer.momentum=abc must be a number >= 0",
    "+recipe.optimizer.foo=3": "recipe.optimizer key=foo must be one of dampening, differentiable",
    "+recipe.optimizer.nesterov=2": "recipe.optimizer.nesterov=2 must be one of true, false",
    "+recipe.optimizer.foreach=abc": "recipe.optimizer.foreach=abc must be one of true, false, null",
    "+recipe.optimizer.dampening=abc": "recipe.optimizer.dampening=abc must be a number",
    "recipe.augment.crop_padding=17": "augment.crop_padding is 17; allowed with zero: up to 16",
    "recipe.augment.crop_pct=abc": "augment.crop_pct is abc; allowed: above 0 and up to 1, or null",
    "recipe.augment.auto_augment=5": "augment.auto_augment is 5; allowed: strings that start with rand",
    "data.mean=null": "data.mean is None; allowed: 3 numbers, one for each channel",
    "data.mean=[a,b,c]": "data.mean is ['a', 'b', 'c']; allowed: finite numbers",
    "data.mean=[nan,0,0]": "data.mean is [nan, 0, 0]; allowed: finite numbers",
    "data.std=[nan,1,1]": "data.std is [nan, 1, 1]; allowed: finite numbers",
    "data.image_size=true": "data.image_size=true must be a whole number >= 1",
    "~seed": "seed is missing; it has no default, so it cannot be deleted",
    "~recipe.smoothing": "recipe.smoothing is missing",
    "~method": "method is missing",
    "name=5": "name=5 must be a text of 1 to 128 characters, or null (a number in quotes: '\"5\"')",
    "name=[a]": "name=['a'] must be a text of 1 to 128 characters, or null",
    "tags=abc": "tags=abc must be a list of texts, such as [a,b]",
    "tags=5": "tags=5 must be a list of texts",
    "tags=null": "tags=null must be a list of texts",
    "tags=[a,5]": "tags=5 must be a text of 1 to 64 characters",
}


@pytest.mark.quick(20)
@pytest.mark.parametrize("override", BAD_SETTINGS)
def test_a_bad_setting_is_named_on_one_line(tmp_path, override):
    method = () if "~method" in override else ("method=division",)
    cfg = config(tmp_path, *method, override)
    with pytest.raises(InputError) as caught:
        run.train(cfg)
    assert BAD_SETTINGS[override] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_batches_of_odd_size_cannot_be_mixed(tmp_path):
    with pytest.raises(InputError, match="must be even with"):
        run.train(config(tmp_path, "recipe.mixup=0.2", "recipe.batch_size=15"))


def test_missing_data_are_named(tmp_path):
    cfg = config(tmp_path, "data=cifar10", "data.source=folder", f"data.root={tmp_path}/nowhere", "data.image_size=32")
    with pytest.raises(InputError, match="nowhere") as caught:
        run.train(cfg)
    assert "\n" not in str(caught.value)


def nothing_to_replace(name: str) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LogSoftmax(dim=1))


def test_a_model_without_a_layer_for_the_method_is_named(tmp_path):
    cfg = config(tmp_path, "method=division")
    cfg.model = {"_target_": f"{__name__}.nothing_to_replace", "name": "flat"}
    with pytest.raises(InputError, match="matches nothing"):
        run.train(cfg)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_named():
    with pytest.raises(ValueError, match="no CUDA device here"):
        device("cuda")


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
        (["=5"], "'=5' is malformed (there is no key)"),
        (["~recipe.ema"], "recipe.ema is null, which Hydra cannot delete; set it instead, recipe.ema=..."),
        (["~model.nothing"], "there is no key 'model.nothing'"),
        (["hydra/launcher=nothing"], "hydra/launcher/nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_overrides_are_named_on_one_line(overrides, message):
    with pytest.raises(InputError) as caught:
        cli.check_overrides(overrides, CONFIGS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=resnet20,resnet19"], "model=resnet19 is unknown"),
        (
            ["seed=range(0,3)", "method=none,division", "method.bit=2,4"],
            "there is no key 'method.bit'; allowed under method: align",
        ),
        (["method=division", "method.bit=2,4"], "override 'method.bit=2,4': there is no key 'method.bit'"),
        (["method=none,division", "recipe.epohs=3"], "there is no key 'recipe.epohs'"),
        (["method=none,division", "~method.bits"], "there is no key 'method.bits'"),
        (["model=glob(zzz*)"], "matches no choice"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_choice_of_a_sweep_is_checked(overrides, message):
    with pytest.raises(InputError, match=re.escape(message)):
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


def test_choices_that_lack_a_key_refuse_their_own_jobs_alone():
    overrides = ["seed=0,1", "method=none,division,quantize", "method.block=4,8", "method.bits=4"]
    plan = cli.check_overrides(overrides, CONFIGS, multirun=True)
    assert plan.sweep
    assert plan.renamed == {"method.block=4,8": "++method.block=4,8", "method.bits=4": "++method.bits=4"}
    assert plan.refused.keys() == {("method", "none"), ("method", "quantize")}
    wrong = plan.refused["method", "quantize"]
    assert wrong.startswith("method=quantize has no key 'method.block'; allowed under method: bits, grouping")
    assert "block" not in wrong.partition("allowed")[2]
    assert cli.check_overrides(["method=none,division"], CONFIGS, multirun=True)[:2] == ({}, {})


FAILING = """
import os, sys
from pathlib import Path
from actpress.train import cli, engine
stock = engine.Trainer.train_step
def step(self, x, y):
    if torch.initial_seed() == 8:
        os.kill(os.getpid(), 9)
    if torch.initial_seed() == 7:
        raise KeyError("a bug")
    return stock(self, x, y)
import torch
engine.Trainer.train_step = step
if __name__ == "__main__":
    sys.exit(cli.train(Path(sys.argv.pop(1))))
"""
LAUNCHER = """
import os
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, run_job
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict

class Forking(Launcher):
    # Each job in a process of its own; what became of it is not handed back.
    def setup(self, *, hydra_context, task_function, config):
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides, initial_job_idx):
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            if (child := os.fork()) == 0:
                config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
                with open_dict(config):
                    config.hydra.job.id = config.hydra.job.num = number
                run_job(self.task, config, "hydra.sweep.dir", "hydra.sweep.subdir", self.context)
                os._exit(0)
            os.waitpid(child, 0)
        return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

@dataclass
class Conf:
    _target_: str = "hydra_plugins.forking.Forking"

ConfigStore.instance().store(group="hydra/launcher", name="forking", node=Conf, provider="test")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "seeds"), [("basic", (0, 7)), ("forking", (0, 7, 8))], ids=["basic", "forking"])
def test_a_sweep_runs_what_it_can_and_lists_what_failed(tmp_path, launcher, seeds):
    """Jobs that lack the option, have a bad value, a bug (seed 7), or are killed (8) where they have their own processes."""
    (tmp_path / "failing.py").write_text(FAILING)
    (tmp_path / "plugins" / "hydra_plugins").mkdir(parents=True)
    (tmp_path / "plugins" / "hydra_plugins" / "forking.py").write_text(LAUNCHER)
    swept = [f"seed={','.join(map(str, seeds))}", "method=none,division", "method.bits=2,3"]
    python, _, *rest = train_command(
        tmp_path, "recipe.epochs=1", "data.train_size=32", *swept, f"hydra/launcher={launcher}", "-m"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path / "plugins"), os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [python, "failing.py", str(CONFIGS), *rest],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 2, result.stderr
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*.json")]
    assert sorted(record["status"] for record in records) == ["failed", "ok"]
    lacks = "method=none has no key 'method.bits'; allowed under method: nothing"
    expected = {f"seed={seed} method=none ++method.bits={bits}": lacks for seed in seeds for bits in (2, 3)}
    expected |= {
        f"seed={seed} method=division ++method.bits=3": "Division: bits=3, allowed: 1, 2, 4, 8" for seed in seeds
    }
    expected |= {"seed=7 method=division ++method.bits=2": "KeyError: 'a bug'"}
    if 8 in seeds:
        expected |= {"seed=8 method=division ++method.bits=2": "ended without a word: was it killed?"}
    head, *last = result.stderr[
        result.stderr.rindex("\n", 0, result.stderr.index(" jobs failed:\n")) + 1 :
    ].splitlines()
    assert head == f"{len(expected)} of {4 * len(seeds)} jobs failed:"
    assert dict(re.fullmatch(r"  job \d+ \((.*?)\): (.*)", line).groups() for line in last) == expected
    assert list((tmp_path / "outputs" / "hydra").glob("jobs-*")) == []


def test_an_interrupted_sweep_says_which_job_it_stopped_in(tmp_path, monkeypatch, capsys):
    def train_run(cfg):
        if cfg.seed == 1:
            raise KeyboardInterrupt
        if cfg.method["_target_"].endswith("Division"):
            raise InputError("no such thing")
        return {"status": "ok", "metrics": {"top1_last": None}}

    monkeypatch.setattr(run, "train", train_run)
    options = [f"paths.outputs={tmp_path}", "seed=0,1,2", "method=none,division"]
    code, _, err = ended(["-m", *options], monkeypatch, capsys)
    assert code == 130
    assert err.splitlines()[-4:] == [
        "1 of 6 jobs done, stopped in job 2 (seed=1 method=none)",
        "1 of 6 jobs failed:",
        "  job 1 (seed=0 method=division): no such thing",
        "interrupted; the same command resumes where it stopped",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["a pipe", "a full disk"])
@pytest.mark.parametrize("overrides", [[], ["-m", "seed=0,1"]], ids=["one run", "a sweep"])
def test_output_that_cannot_be_written_stops_no_training(tmp_path, where, overrides):
    reader, writer = os.pipe()
    if where == "a pipe":
        os.close(reader)
    out = writer if where == "a pipe" else os.open("/dev/full", os.O_WRONLY)
    line = train_command(tmp_path, "recipe.epochs=1", "data.train_size=32", *overrides)
    result = subprocess.run(line, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True, timeout=240)
    lost = "standard output could not be written: No space left on device\n"
    assert (result.returncode, result.stderr) == (0, "" if where == "a pipe" else lost)
    records = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*.json")]
    assert [record["status"] for record in records] == ["ok"] * (len(overrides) or 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_launchers_that_are_published_end_with_the_code_of_the_worst_job(tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    options = ["recipe.epochs=1", "method=division", "method.bits=2,3", f"hydra/launcher={launcher}", "-m"]
    result = subprocess.run(
        train_command(tmp_path, *options), cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 2
    assert "1 of 2 jobs failed:\n  job 1 (method.bits=3): Division: bits=3" in result.stderr
    assert len(list((tmp_path / "runs").glob("*.json"))) == 1


def ended(overrides: list[str], monkeypatch, capsys) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    code = cli.train(CONFIGS)
    return code, *capsys.readouterr()


@pytest.mark.quick(3)
@pytest.mark.parametrize("key", ["outputs", "records"])
@pytest.mark.parametrize("way", ["a file", "below a file", "a broken link", "read-only"])
def test_results_that_cannot_be_written_are_named_before_training(tmp_path, monkeypatch, capsys, key, way):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "place"
    if way == "a broken link":
        place.symlink_to(tmp_path / "nowhere" / "else")
    elif way == "read-only":
        place.mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: path != place)  # for root every folder is writable
    else:
        place.write_text("")
    value = place / "deep" if way == "below a file" else place
    others = {"outputs": "o", "records": "r"} | {key: value}
    overrides = [*SMALL, *(f"paths.{name}={folder}" for name, folder in others.items())]
    for flags in ([], ["-m"]):
        code, out, err = ended([*flags, *overrides], monkeypatch, capsys)
        assert (code, out) == (2, "")
        assert re.fullmatch(rf"error: paths.{key}={value} must be [^\n]* {place} is [^\n]*\n", err)
    assert sorted(os.listdir(tmp_path)) == ["place"]


@pytest.mark.parametrize("value", ["null", "5", "''"])
@pytest.mark.parametrize("key", ["paths.outputs", "paths.records"])
def test_what_is_no_path_is_named(tmp_path, monkeypatch, capsys, key, value):
    monkeypatch.chdir(tmp_path)
    code, _, err = ended([f"{key}={value}"], monkeypatch, capsys)
    assert code == 2
    assert re.fullmatch(rf"error: {key}=(None|5|) must be the path of a folder\n", err)


@pytest.mark.quick(4)
@pytest.mark.parametrize("suffix", ["", ".tmp"])
@pytest.mark.parametrize("file", ["lock", "config", "log", "resume_file", "record"])
def test_folders_in_place_of_files_are_named_before_training(tmp_path, file, suffix):
    cfg = config(tmp_path)
    path = getattr(run.files_of(cfg), file)
    path = path.with_name(path.name + suffix)
    path.mkdir(parents=True)
    said = f"{path} must be a file, but it is a folder; move it away"
    with pytest.raises(InputError, match=re.escape(said)), interrupt(2, AssertionError("trained")):
        run.train(cfg)


def test_a_full_disk_ends_the_command_on_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def full(cfg):
        raise WriteError("runs/a.json", OSError(28, "No space left on device"))

    monkeypatch.setattr(run, "train", full)
    code, _, err = ended([f"paths.outputs={tmp_path}/outputs"], monkeypatch, capsys)
    assert (code, err) == (3, "error: runs/a.json could not be written: No space left on device\n")


# Help


def test_help_lists_what_training_reads_and_the_options_of_the_chosen_method(monkeypatch, capsys):
    code, out, err = ended(["--help", "method=division", "method.bits=4"], monkeypatch, capsys)
    assert (code, err) == (0, "")
    for group in ("model", "data", "recipe", "method", "logger", "runtime"):
        assert re.search(rf"^  {group} .*\[\w+\]", out, re.MULTILINE | re.DOTALL)
    assert not re.search("battery|gradient_fidelity|_target_", out)
    assert re.search(r"^  method.block=8 +side of the averaged blocks, at least 1", out, re.MULTILINE)
    assert re.search(r"^  method.bits=4 +Q, bits per element", out, re.MULTILINE)
    assert re.search(r"^  recipe.schedule.warmup_epochs=0.5$", out, re.MULTILINE)
    assert re.search(r"^  runtime.compile=false +torch.compile for the training step$", out, re.MULTILINE)
    assert "[none]" in ended(["--help", "-m", "method=none,division"], monkeypatch, capsys)[1]
    code, _, err = ended(["--help", "method=divison"], monkeypatch, capsys)
    assert (code, "method=divison is unknown" in err) == (2, True)


@pytest.mark.parametrize("method", sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml")))
def test_help_explains_every_option_of_a_method(method):
    with cli._configs(CONFIGS, "train") as configs:
        cfg = cli._composed([f"method={method}"], configs, "train", hydra_too=True)
        out = usage.text(cfg, configs, "train")
    section = out.partition(f"\nmethod={method}\n")[2].partition("\n\n")[0]
    options = [key for key, _ in usage._leaves(cfg.method)]
    for option in options:
        line = re.search(rf"^  method\.{re.escape(option)}=.*(\n {{40}}\S.*)*", section, re.MULTILINE)
        assert line, option
        assert re.search(r"  \S", line[0].strip()), f"{option} is not explained"
    assert options or "no options" in section
    assert max(map(len, section.splitlines())) <= usage.WIDTH or "skip" in section


@pytest.mark.quick(1, "audit.py batch=abc*")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("audit.py batch=abc", "batch=abc, allowed: whole numbers from 1"),
        ("audit.py batch=0", "batch=0, allowed: whole numbers from 1"),
        ("audit.py top=-1", "top=-1, allowed: whole numbers from 0"),
        ("audit.py data.image_size=abc", "data.image_size=abc must be a whole number >= 1"),
        ("audit.py seed=-1", "seed=-1 must be a whole number >= 0 and < 4294967296"),
        ("kernel_report.py foo", "'foo', allowed: the path of one table that scripts/bench_kernels.py wrote"),
        (
            "kernel_report.py README.md",
            "README.md is not a table of this version of scripts/bench_kernels.py; move it away",
        ),
    ],
)
def test_scripts_name_bad_input_on_one_line(line, message):
    script, *arguments = line.split()
    root = CONFIGS.parent
    command = [sys.executable, str(root / "scripts" / script), *arguments]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (2, f"error: {message}\n")


@pytest.mark.slow
def test_audit_has_a_help():
    audit = [sys.executable, str(CONFIGS.parent / "scripts" / "audit.py"), "--help"]
    result = subprocess.run(audit, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: " in result.stdout
    assert "model=resnet50 method=division batch=256" in result.stdout


def test_the_command_line_ends_with_the_code_of_its_worst_run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    endings = iter(
        [{"run_id": "a", "status": "oom", "message": "m", "metrics": {"top1_last": None}}, InputError("bad")]
    )

    def ending(cfg):
        result = next(endings)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(run, "train", ending)
    monkeypatch.setattr(sys, "argv", ["train.py", f"paths.outputs={tmp_path}/outputs"])
    assert cli.train(CONFIGS) == 3
    assert capsys.readouterr().err == "run a ended: oom, m\n"
    assert cli.train(CONFIGS) == 2
    assert capsys.readouterr().err == "error: bad\n"
    monkeypatch.setattr(sys, "argv", ["train.py", "modle=x"])
    assert cli.train(CONFIGS) == 2
    assert "there is no key 'modle'" in capsys.readouterr().err
