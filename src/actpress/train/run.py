"""One training run from a composed config: what is built, where its files are, and the record it writes.

results/runs/<run_id>.json   the record: written when the run ends, however it ends
outputs/<run_id>/            last.pt (resume file, the checkpoint), config.yaml, log.jsonl

A run with a checkpoint resumes from it; one whose checkpoint says it is complete is not repeated. resume=false starts over.
"""

import fcntl
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actpress import measure, swap
from actpress.train import config, data, engine, logger, provenance, record, resume
from actpress.train.errors import InputError, Unreadable
from actpress.train.files import WriteError, atomic_write, check_file, check_folder, make_folder

BAD_INPUT = (ValueError, TypeError, OSError, ImportError, OmegaConfBaseException)


class Files(NamedTuple):
    """The files of a run. folder: outputs/<run_id>. record: its record."""

    folder: Path
    record: Path

    @property
    def resume_file(self) -> Path:
        return self.folder / "last.pt"

    @property
    def log(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"


def files_of(cfg: DictConfig) -> Files:
    """The files of the run that cfg describes."""
    name = record.run_id(cfg)
    return Files(Path(cfg.paths.outputs) / name, Path(cfg.paths.records) / f"{name}.json")


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train what a composed cfg (configs/train.yaml) describes, or resume it, and return its record.

    The last line it prints says how the run ended, where its record is and what W&B holds.

    The record's status is ok, oom (out of memory), diverged (a loss or an output in the test is not finite) or failed (a file could
    not be written, for instance because the disk is full). Any other exception of the training itself is recorded as failed and
    raised again. Raises InputError for bad input, before anything is overwritten.
    """
    with ExitStack() as stack:
        with bad_input():
            config.check(cfg)
            logger.check(cfg)
            check_folder("paths.outputs", cfg.paths.outputs)
            check_folder("paths.records", cfg.paths.records)
            device = config.device(cfg.runtime.device)
            name, files = record.run_id(cfg), files_of(cfg)
            for path in (files.lock, files.config, files.log, files.resume_file, files.record):
                check_file(path)
            stack.enter_context(_alone(files.lock, name))
            state = None
            if cfg.resume and files.resume_file.exists():
                state = resume.load(files.resume_file, name, device)
                if state["record"]:
                    if cfg.data.source == "folder":  # other data are what the config says, wherever they lie
                        _check_data(state["data"], data.open_images(cfg.data).facts)
                    return _complete(cfg, name, files, state)
            trainer, about = _build(cfg, device, state)
            _prepare(cfg, files)
            log = logger.create(cfg, name, files.log, trainer.step, state and state["wandb_id"])
            if state is None:  # otherwise a run stopped before its first save would resume from the one it replaces
                files.resume_file.unlink(missing_ok=True)  # last, so that an error above leaves it unchanged
        print(
            f"run {name} on {about['environment']['device']}: from epoch {trainer.epoch + 1} of {trainer.epochs}",
            flush=True,
        )
        finished = _train(name, files, trainer, about, log)
        print(_last_line(f"run {name} ended {finished['status']}", files, finished, log.whereabouts), flush=True)
        return finished


@contextmanager
def bad_input() -> Iterator[None]:
    """Turn the errors that bad input raises into InputError, on one line."""
    try:
        yield
    except InputError:
        raise
    except InstantiationException as error:
        cause = error.__cause__ or error
        if error.__cause__ and not isinstance(cause, BAD_INPUT):
            raise
        raise InputError(_one_line(cause)) from error
    except BAD_INPUT as error:
        raise InputError(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


@contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """Hold the run's lock, which ends with this process: two processes at once would overwrite each other's checkpoints."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run {name} is being trained by another process, which holds {path}") from None
        yield


def _complete(cfg: DictConfig, name: str, files: Files, state: dict[str, Any]) -> dict[str, Any]:
    """Print that the run is complete. Restores the record from the checkpoint if it is missing."""
    finished = state["record"]
    if not _is_there(finished, files.record):
        record.write(files.record, finished)
    held = logger.whereabouts(cfg.paths.outputs, state["wandb_id"], finished["wandb_url"])
    print(_last_line(f"run {name} is complete (resume=false trains anew)", files, finished, held), flush=True)
    return finished


def _is_there(finished: dict[str, Any], path: Path) -> bool:
    """Whether the file holds this record, or one of the same run measured elsewhere, such as a committed one."""
    try:
        there = record.read(path, record.RUN)
    except Unreadable:
        return False
    same_run = all(there[key] == finished[key] for key in ("run_id", "status"))
    return there == record.as_read(finished) or (same_run and there["environment"] != finished["environment"])


def _last_line(what: str, files: Files, finished: dict[str, Any], held: str) -> str:
    """The last line a run prints: accuracy, record, W&B. held: what W&B holds."""
    accuracy = finished["metrics"]["top1_last"]
    tested = "no test accuracy" if accuracy is None else f"test accuracy {accuracy:.2f}%"
    return f"{what}: {tested} | record {files.record} | {held}"


def _prepare(cfg: DictConfig, files: Files) -> None:
    """Create the folders before training, so that results can be written."""
    make_folder("paths.outputs", files.folder)
    make_folder("paths.records", files.record.parent)
    with atomic_write(files.config) as file:
        file.write(OmegaConf.to_yaml(cfg, resolve=True).encode())


def _build(
    cfg: DictConfig, device: torch.device, state: dict[str, Any] | None
) -> tuple[engine.Trainer, dict[str, Any]]:
    """(the trainer, in the state of the checkpoint if there is one; the entries of the record that are no measurements)."""
    gc.collect()  # the previous run of a sweep, before this one asks for memory
    engine.set_backend(cfg.runtime)
    images = data.create(cfg.data, cfg.recipe, device=device, seed=cfg.seed, workers=cfg.runtime.workers)
    if len(images.test) == 0:
        raise ValueError("the test set is empty; data must hold at least one test image")
    engine.seed_everything(cfg.seed)
    model = hydra.utils.instantiate(cfg.model)
    if hasattr(model, "example_input"):
        raise ValueError(
            f"model={cfg.model.name} does not read images, which data={cfg.data.name} are; choose an image classifier"
        )
    report = swap.apply(model, hydra.utils.instantiate(cfg.method))
    trainer = engine.Trainer(cfg, model.to(device), images, device)
    engine.seed_everything(cfg.seed)  # methods may draw while building; training must draw the same for all
    resumes = 0
    if state is not None:
        _check_data(state["data"], images.facts)
        try:
            trainer.load_state(state)
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint of this run is not one of this version of the code ({_one_line(error)}); "
                "set resume=false to train anew"
            ) from error
        resumes = state["resumes"] + 1
    about = {
        "config": record.portable(cfg),
        "data": images.facts,
        "layers_replaced": len(report.replaced),
        "environment": provenance.environment(device),
        "resumes": resumes,
    }
    return trainer, about


def _check_data(trained: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raise ValueError unless the data have the facts that the checkpoint holds; older checkpoints hold no fingerprint."""
    if trained != {key: facts.get(key) for key in trained}:
        raise ValueError(
            f"the checkpoint of this run was trained on {trained}, but the data are {facts}; "
            "restore those data, set another paths.outputs and paths.records, or set resume=false to train anew"
        )


def _train(name: str, files: Files, trainer: engine.Trainer, about: dict[str, Any], log: logger.Log) -> dict[str, Any]:
    """Train until the run ends, well or not, and write the record."""

    def save(finished: dict[str, Any] | None = None) -> None:
        extra = {key: about[key] for key in ("data", "resumes")}
        extra |= {"run_id": name, "device": trainer.device.type, "wandb_id": log.id, "record": finished}
        resume.save(files.resume_file, trainer.state() | extra)

    def on_epoch(row: dict[str, float]) -> None:
        _report(trainer, row, log)
        if trainer.epoch < trainer.epochs:
            save()

    def ended(status: str, message: str | None = None) -> dict[str, Any]:
        finished = {"run_id": name, "status": status, "message": message, **about}
        finished |= {"metrics": trainer.metrics(), "history": trainer.history, "wandb_url": log.url}
        record.write(files.record, finished)
        return finished

    finished = None
    try:
        trainer.fit(on_epoch, log.log)
        finished = ended("ok")
        save(finished)  # after the record: a run killed in between repeats its last epoch
    except engine.Diverged as error:
        finished = ended("diverged", str(error))
    except WriteError as error:
        there = files.resume_file.exists()
        advice = "resume=true resumes from the last checkpoint" if there else "there is no checkpoint to resume from"
        finished = ended("failed", f"{error}; {advice}")
    except Exception as error:
        if measure.is_out_of_memory(error):
            finished = ended("oom", _one_line(error))
        else:
            try:
                finished = ended("failed", f"{type(error).__name__}: {_one_line(error)}")
            except WriteError as unwritten:
                error.add_note(str(unwritten))
            raise
    finally:
        log.finish(*((finished["status"], finished["metrics"]) if finished else ("interrupted", {})))
    return finished


def _report(trainer: engine.Trainer, row: dict[str, float], log: logger.Log) -> None:
    """Log an epoch, and print it on one line."""
    metrics = trainer.metrics()
    speed, peak, saved = metrics["train_images_per_s"], metrics["peak_bytes"], metrics["saved_bytes"]
    log.log(
        trainer.step,
        {
            "test/loss": row["test_loss"],
            "test/accuracy": row["test_accuracy"],
            "memory/peak_bytes": peak,
            "memory/saved_bytes": saved,
            "epoch": row["epoch"],
        },
    )
    parts = [
        f"epoch {row['epoch']}/{trainer.epochs}",
        f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2f}%",
        f"test loss {row['test_loss']:.4f} accuracy {row['test_accuracy']:.2f}% (best {metrics['top1_best']:.2f}%)",
        *([f"{speed['median']:.0f} images/s"] if speed else []),
        *([f"peak {peak / 2**20:.1f} MiB"] if peak else []),
        *([f"saved {saved / 2**20:.1f} MiB"] if saved else []),
    ]
    print(" | ".join(parts), flush=True)
