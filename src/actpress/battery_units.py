"""The units of a battery, from its profile: configs/battery/<profile>.yaml.

A profile is a list of stages; each makes units, of the same least and longest time, in its own way:

tests      pytest on one test file each
kernels    scripts/bench_kernels.py, one dtype each
steps      scripts/bench_training.py, one model, precision and mode each
largest    scripts/largest_batch.py, one model and method each
tables     the rows of a training table that need nothing but a GPU, a training each
training   scripts/train.py, one method each
"""

import os
import re
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torchvision.datasets import CIFAR10

from actpress import cli, record, tables, workload
from actpress.battery import SECONDS, Unit

ON_DEVICES = re.compile(
    r"\bmark\.gpu\b|^from devices import|^import devices", re.MULTILINE
)  # a test file with GPU tests
NO_TESTS = 5  # pytest's exit code where a file has none of the wanted


@dataclass(frozen=True)
class Place:
    """Where the battery runs. root: of the repository. device: auto or cpu. cifar: an archive of CIFAR-10 as image files, if given."""

    root: Path
    out: Path
    source: str
    device: str
    cifar: Path | None = None

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    def script(self, name: str, *arguments: str) -> tuple[str, ...]:
        return (sys.executable, str(self.root / "scripts" / f"{name}.py"), *arguments)


Stage = Mapping[str, Any]


def profiles(root: Path) -> list[str]:
    """Names of the profiles."""
    return sorted(path.stem for path in (root / "configs" / "battery").glob("*.yaml"))


def load(root: Path, name: str) -> dict[str, Any]:
    """A profile: the device it is for and its stages. Raises ValueError if there is none of that name, or for an unknown kind of stage."""
    if name not in profiles(root):
        raise ValueError(f"profile={name}, allowed: {', '.join(profiles(root))}")
    profile = OmegaConf.to_container(OmegaConf.load(root / "configs" / "battery" / f"{name}.yaml"), resolve=True)
    for stage in profile["stages"]:
        if stage["kind"] not in KINDS:
            raise ValueError(f"profile {name}: kind {stage['kind']!r}, allowed: {', '.join(KINDS)}")
    return profile


def units(profile: Mapping[str, Any], place: Place, only: tuple[str, ...] = ()) -> list[Unit]:
    """All units in order; of those only the ones whose names start with one of `only`, if there are any, and what these wait for.

    Raises ValueError where a prefix fits no unit.
    """
    stages = [stage for stage in profile["stages"] if wanted(stage, only)]
    made = [unit for stage in stages for unit in KINDS[stage["kind"]](stage, place)]
    if not only:
        return made
    if unknown := [prefix for prefix in only if not any(unit.name.startswith(prefix) for unit in made)]:
        names = [stage.get("name", stage["kind"]) for stage in profile["stages"]]
        raise ValueError(
            f"only={','.join(unknown)} fits no unit; their names begin with {', '.join(dict.fromkeys(names))}"
        )
    chosen = [unit for unit in made if unit.name.startswith(only)]
    return [unit for unit in made if unit in chosen or unit.name in {other.after for other in chosen}]


def wanted(stage: Stage, only: tuple[str, ...]) -> bool:
    """Whether the stage may have a unit that is asked for; saves the time to make its units."""
    name = stage.get("name", stage["kind"])
    return not only or any(prefix.startswith(name) or name.startswith(prefix) for prefix in only)


def times(stage: Stage) -> dict[str, float]:
    return {"minimum": float(stage["minimum"]), "limit": float(stage["limit"])}


def tests(stage: Stage, place: Place) -> Iterator[Unit]:
    """files: names below tests/, else all with tests for a GPU. marker: pytest's -m. interpreter: Triton's, which needs no GPU."""
    found = sorted((place.root / "tests").glob("test_*.py"))
    chosen = stage.get("files") or [path.name for path in found if ON_DEVICES.search(path.read_text())]
    for name in chosen:
        stem = name.removesuffix(".py")
        junit = place.out / "units" / f"tests-{stem}.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-m", stage["marker"]]
        yield Unit(
            f"tests/{stem}",
            (*command, f"--junitxml={junit}", f"tests/{name}"),
            writes=(f"units/tests-{stem}.json",),
            environment={"TRITON_INTERPRET": str(int(stage["interpreter"]))},
            ended=(0, NO_TESTS),
            junit=junit,
            **times(stage),
        )


def kernels(stage: Stage, place: Place) -> Iterator[Unit]:
    """options: of bench_kernels.py. It goes on by itself, and its own budget ends it before the unit's limit does."""
    options = given(stage["options"])
    for dtype in stage["dtypes"]:
        arguments = (*options, f"dtypes={dtype}", f"out={place.out / 'kernels'}", f"budget={SECONDS}")
        yield Unit(
            f"kernels/{dtype}",
            place.script("bench_kernels", *arguments),
            environment={"TRITON_INTERPRET": str(int("profile=tiny" in options))},
            writes=("kernels/<device>.csv", "kernels/<device>.md", "kernels/<device>.png"),
            announces=True,
            resumes=True,
            **times(stage),
        )


def steps(stage: Stage, place: Place) -> Iterator[Unit]:
    """options: of bench_training.py, for all runs; runs: the options of each."""
    for run in stage["runs"]:
        options = {**stage.get("options", {}), **run}
        mode = "compile" if options.get("compile") else "eager"
        name = f"{stage['name']}/{options['model']}-{options['precision']}-{mode}-b{options['batch']}"
        path = f"units/{name.replace('/', '-')}.json"
        yield Unit(
            name,
            place.script("bench_training", *given(options), f"device={place.device}", f"out={place.out / path}"),
            writes=(path,),
            announces=True,
            resumes=True,
            **times(stage),
        )


def largest(stage: Stage, place: Place) -> Iterator[Unit]:
    """options: of largest_batch.py, for all runs; runs: the options of each. methods: names, else all that fit the model."""
    for run in stage["runs"]:
        options = {**stage.get("options", {}), **run}
        setting = workload.Setting(options["model"], image_size=options.get("image_size", 224))
        cfg = setting.config(place.configs, workload.STOCK)
        for method in stage.get("methods") or workload.applicable(cfg, place.configs):
            name = f"largest/{options['model']}-{options['precision']}-{method}"
            path = f"units/{name.replace('/', '-')}.json"
            arguments = given({**options, "method": method})
            yield Unit(
                name,
                place.script("largest_batch", *arguments, f"device={place.device}", f"out={place.out / path}"),
                writes=(path,),
                resumes=True,
                **times(stage),
            )


def given(options: Mapping[str, Any]) -> list[str]:
    """Options as arguments; lists with commas."""
    texts = {
        key: ",".join(map(str, value))
        if isinstance(value, list)
        else str(value).lower()
        if value in (True, False)
        else value
        for key, value in options.items()
    }
    return [f"{key}={value}" for key, value in texts.items()]


def rows(stage: Stage, place: Place) -> Iterator[Unit]:
    """tables: names below configs/tables/."""
    for name in stage["tables"]:
        table = tables.load(place.configs / "tables", name)
        for cell in table.cells:
            if cell.requires == ("gpu",):
                labels = "-".join(str(value) for value in cell.labels.values())
                yield trained(f"tables/{name}/{labels}", (*cell.overrides, f"seed={table.seeds[0]}"), stage, place)


def training(stage: Stage, place: Place) -> Iterator[Unit]:
    """overrides: for all runs. methods: names, else all that fit the model. needs: cifar10, or nothing."""
    more, data, skip = images(stage, place) if stage.get("needs") else ((), None, None)
    if data is not None:
        yield data
    cfg = _compose(place.configs, tuple(stage["overrides"]))
    for method in stage.get("methods") or workload.applicable(cfg, place.configs):
        overrides = (*stage["overrides"], f"method={method}", *more)
        name = f"{stage.get('name', 'training')}/{method}"
        yield trained(name, overrides, stage, place, skip=skip, after=data.name if data else None)


def trained(name: str, overrides: tuple[str, ...], stage: Stage, place: Place, **options: Any) -> Unit:
    """A run of scripts/train.py, which goes on from its checkpoint."""
    if place.device != "auto":
        overrides = (*overrides, f"runtime.device={place.device}")  # part of the run's name
    run_id = record.run_id(_compose(place.configs, overrides))
    checkpoints = place.out / "training" / place.source[:12]  # of another source: trained anew
    paths = (f"paths.outputs='{checkpoints}'", f"paths.records='{place.out / 'runs'}'")
    return Unit(
        name,
        place.script("train", *overrides, *paths, "logger=none", "runtime.progress=false"),
        writes=(f"runs/{run_id}.json",),
        ended=(0, cli.UNHAPPY_END),
        resumes=True,
        facts={"run_id": run_id},
        **times(stage),
        **options,
    )


@cache
def _compose(configs: Path, overrides: tuple[str, ...]) -> Any:
    return cli.compose(list(overrides), configs)


Images = tuple[tuple[str, ...], Unit | None, str | None]


def images(stage: Stage, place: Place, reachable: Callable[[], bool] | None = None) -> Images:
    """Where CIFAR-10 comes from: (overrides, a unit that has to run first, why there is none).

    The archive that was given, unpacked below `out`; else $ACTPRESS_DATA or data/, as image files or torchvision's; else a download.
    """
    if place.cifar:
        folder = place.out / "data" / inside(place.cifar)
        unpack = Unit(
            "data/cifar10",
            (sys.executable, "-m", "tarfile", "--filter", "data", "-e", str(place.cifar), str(place.out / "data")),
            minimum=30,
            limit=180,
            writes=("data/",),
            keeps=folder / "train",
        )
        return ("data.source=folder", f"data.root='{folder.resolve()}'"), unpack, None
    root = Path(os.environ.get("ACTPRESS_DATA") or place.root / "data")
    if all((root / split).is_dir() for split in ("train", "test")):
        return ("data.source=folder", f"data.root='{root.resolve()}'"), None, None
    if any((root / name).exists() for name in (CIFAR10.base_folder, CIFAR10.filename)) or (reachable or online)():
        return (), None, None
    return (
        (),
        None,
        "no CIFAR-10 in $ACTPRESS_DATA or data/, and none can be downloaded; cifar=FILE names an archive of image files",
    )


def inside(archive: Path) -> str:
    """The folder of the archive that holds train/ and test/, "" for its top. Raises ValueError if there is none."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = Path(member.name).parts
                if "train" in parts or "test" in parts:
                    return "/".join(parts[: min(parts.index(name) for name in ("train", "test") if name in parts)])
    except (OSError, tarfile.TarError) as error:
        raise ValueError(
            f"cifar={archive} cannot be read ({error}); allowed: a tar archive of train/ and test/ folders"
        ) from error
    raise ValueError(
        f"cifar={archive} holds no train/ or test/; allowed: a tar archive of {{train,test}}/<class>/*.jpg"
    )


def online() -> bool:
    """Whether CIFAR-10 can be downloaded."""
    try:
        with urllib.request.urlopen(urllib.request.Request(CIFAR10.url, method="HEAD"), timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


KINDS: dict[str, Callable[[Stage, Place], Iterator[Unit]]] = {
    "tests": tests,
    "kernels": kernels,
    "steps": steps,
    "largest": largest,
    "tables": rows,
    "training": training,
}
