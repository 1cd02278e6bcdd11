"""The installation files agree with each other, and what README.md and `make help` promise exists."""

import ast
import copy
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import actpress
import actpress.kernels
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
DOCUMENTS = ("README.md", "CONTRIBUTING.md")


def requirements() -> list[Requirement]:
    project = PROJECT["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name: Version(version) for name, version in pairs}


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))


def code_of(document: str) -> str:
    """What a reader would type: the fenced blocks and inline code of a document."""
    text = (ROOT / document).read_text()
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return "\n".join(blocks + inline)


def test_every_requirement_is_pinned_inside_its_range():
    wrong = {
        str(requirement): str(pins().get(canonicalize_name(requirement.name), "no pin"))
        for requirement in requirements()
        if canonicalize_name(requirement.name) not in pins()
        or not requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])
    }
    assert not wrong


def test_every_import_is_declared():
    """Third-party packages that the code imports, tests included, are direct requirements, not someone else's."""
    module_of = {"scikit-learn": "sklearn", "hydra-core": "hydra", "pillow": "PIL", "pyyaml": "yaml"}
    module_of["markdown-it-py"] = "markdown_it"
    declared = {module_of.get(r.name, r.name.replace("-", "_")) for r in requirements()}
    files = [file for folder in ("src", "kernels", "scripts", "tests") for file in (ROOT / folder).rglob("*.py")]
    trees = [ast.parse(file.read_text()) for file in files]
    absolute = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.name for node in absolute if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in absolute if isinstance(node, ast.ImportFrom) and node.level == 0}
    own = {"actpress", "conftest", *(file.stem for file in files if file.parent.name in ("scripts", "dev", "tests"))}
    assert {name.partition(".")[0] for name in imported} - declared - own - sys.stdlib_module_names == set()


def test_constraints_are_sorted_exact_and_free_of_urls():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines == sorted(lines, key=lambda line: line.split("==")[0])
    assert len({line.split("==")[0] for line in lines}) == len(lines)
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+", line)] == []


def test_conda_environment_defers_to_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, last = environment["dependencies"]
    assert last == {"pip": ["-c constraints.txt", "-e .[dev,text]"]}
    versions = dict(entry.split("=") for entry in conda)
    assert set(versions) == {"python", "pip"}
    assert Version(versions["python"]) in SpecifierSet(PROJECT["project"]["requires-python"])


def test_pre_commit_uses_the_pinned_ruff():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    used = {pin for repo in config["repos"] for hook in repo["hooks"] for pin in hook["additional_dependencies"]}
    assert used == {f"ruff=={pins()['ruff']}"}


def test_every_package_folder_is_installed():
    """setuptools is given an explicit list, since kernels/ is mapped: a folder missing from it would not be shipped."""
    found = {"actpress"}
    for folder, prefix in ((ROOT / "src" / "actpress", "actpress"), (ROOT / "kernels", "actpress.kernels")):
        for file in folder.rglob("*.py"):
            found.add(".".join((prefix, *file.parent.relative_to(folder).parts)))
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_kernels_import_as_a_subpackage():
    assert Path(actpress.kernels.__file__).parent == ROOT / "kernels"


def test_make_help_lists_every_target():
    alone = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}  # not a sub-make
    help_text = subprocess.run(["make", "help"], cwd=ROOT, env=alone, capture_output=True, text=True, check=True)
    shown = help_text.stdout
    listed = {line.split()[0] for line in shown.splitlines()}
    assert listed == make_targets()
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert set(phony.group(1).split()) == make_targets()
    assert [line for line in shown.splitlines() if len(line.split()) < 2] == []


def install(folder: Path, pip: str) -> subprocess.CompletedProcess:
    """`make install` into a folder whose pip is the given shell script."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "pip").write_text(f"#!/bin/sh\n{pip}\n")
    (folder / "bin" / "pip").chmod(0o755)
    alone = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "install", f"VENV={folder}", f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)


def test_installing_says_how_much_and_how_long_before_it_starts(tmp_path):
    done = install(tmp_path / "venv", "echo pip starts")
    assert done.returncode == 0, done.stderr
    assert re.search(r"GiB once unpacked.*minutes.*pip starts.*installed in \d+ s", done.stdout, flags=re.DOTALL)
    failed = install(tmp_path / "other", "echo no space >&2; exit 1")
    assert failed.returncode and not list((tmp_path / "other").glob(".actpress-installed"))


def test_ci_checks_pages_before_anything_writes_to_results():
    steps = re.findall(r"^make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert steps[:2] == ["install", "check-pages"]
    assert steps.index("test-all") == steps.index("reproduce-table") + 1  # the README's commands, one after the other


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_make_targets_exist(document):
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", code_of(document)))
    assert named
    assert named <= make_targets()


@pytest.fixture
def reproduce(tmp_path):
    """`make reproduce-table` where the script only says what it is called with, and everything counts as installed."""
    stamp = tmp_path / "installed"
    stamp.touch()
    return lambda *settings: _reproduce(stamp, *settings)


def _reproduce(stamp: Path, *settings: str) -> subprocess.CompletedProcess:
    alone = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "reproduce-table", "RUN=printf '<%s>'", f"STAMP={stamp}", *settings]
    return subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["DRY", "PUBLISH"])
@pytest.mark.parametrize("value", ["2", "TRUE", "y", "on", "1,"])
def test_a_switch_of_the_makefile_that_is_neither_on_nor_off_is_refused(reproduce, name, value):
    result = reproduce(f"{name}={value}")
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{name}={value}, allowed: 1, true, yes, 0, false, no" in result.stderr


@pytest.mark.parametrize(
    ("settings", "called"),
    [
        (["DRY=1"], ["dry=true"]),
        (["DRY=0", "PUBLISH=yes"], ["publish=true"]),
        (["TABLE=a b", "DRY=true"], ["a", "b", "dry=true"]),
        (["TABLE=a;'x`id`", "DRY=yes"], ["a;'x`id`", "dry=true"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_the_makefile_hands_on_what_it_is_given(reproduce, settings, called):
    result = reproduce(*settings)
    assert result.stdout == "".join(f"<{word}>" for word in ("scripts/reproduce_table.py", *called)), result.stderr


def test_scripts_of_the_makefile_exist():
    named = set(re.findall(r"\bscripts/\w+\.py", MAKEFILE))
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_the_readme_lists_no_method_that_does_not_exist():
    available = re.findall(r"^\| `(\w+)` \|.*\| available \|$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(available) > 1 and set(available) <= {file.stem for file in (ROOT / "configs" / "method").glob("*.yaml")}


def blocks(document: str, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), flags=re.MULTILINE | re.DOTALL)


def test_the_library_examples_of_the_readme_run(capsys):
    names = {}
    for block in blocks("README.md"):
        exec(compile(block, "README.md", "exec"), names)
    before, after = map(float, re.search(r"([\d.]+) MiB -> ([\d.]+) MiB", capsys.readouterr().out).groups())
    assert after < before / 5


def run_block(source: str, name: str, monkeypatch) -> dict:
    """A python block of the guide as the module `name` -> what it defines."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, "CONTRIBUTING.md", "exec"), vars(module))
    return vars(module)


def test_the_method_example_of_the_contributing_guide_works(monkeypatch):
    """Saved in bf16: a gradient close to the exact one, in half the bytes, and the same output."""
    kernel, method, *_ = blocks("CONTRIBUTING.md")
    run_block(kernel, "actpress.kernels.half", monkeypatch)
    half_method = run_block(method, "actpress.methods.half", monkeypatch)["Half"]()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5))
    x = torch.randn(7, 3, 8, 8)
    twin = copy.deepcopy(model)
    actpress.apply(twin, half_method)
    assert torch.equal(model(x), twin(x))
    stock, half = (actpress.measure.saved_bytes(lambda net=net: net(x).sum()) for net in (model, twin))
    assert half == stock // 2
    model(x).sum().backward()
    twin(x).sum().backward()
    for name, exact in model.named_parameters():
        error = (twin.get_parameter(name).grad - exact.grad).norm() / exact.grad.norm()
        assert error < 2**-8, f"{name}: relative error {error:.1e}"  # bf16 rounds by at most 2^-8


def test_the_example_of_another_kind_of_edit_works(monkeypatch):
    """Computed again: the very gradients of stock, and only the inputs of what is computed again are saved."""
    recompute = run_block(blocks("CONTRIBUTING.md")[3], "actpress.methods.recompute", monkeypatch)["Recompute"]()
    block = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    model, x = torch.nn.Sequential(block, copy.deepcopy(block)), torch.randn(16, 8)
    twin = copy.deepcopy(model)
    assert list(actpress.apply(twin, recompute).replaced) == ["0.forward()", "1.forward()"]
    assert actpress.measure.saved_bytes(lambda: twin(x).sum()) == 2 * x.nbytes
    for net in (model, twin):
        net(x).sum().backward()
    assert all(torch.equal(p.grad, twin.get_parameter(name).grad) for name, p in model.named_parameters())
    assert actpress.restore(twin) == ["0", "1"]


LAYER = """
import torch, actpress
from torch import nn
from torch.nn import functional as F
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shrink = nn.Linear(64, 64), nn.Hardshrink()
    def forward(self, x):
        return F.hardshrink(self.shrink(self.first(x)), 0.7)
net, x = Net(), torch.randn(256, 64)
exact = torch.autograd.grad(net(x).square().sum(), net.first.bias)[0]
before = actpress.measure.saved_bytes(lambda: net(x).sum())
report = actpress.apply(net, actpress.methods.Division())
assert {"first", "shrink", "hardshrink()"} <= set(report.replaced), report.replaced
got = torch.autograd.grad(net(x).square().sum(), net.first.bias)[0]
assert torch.equal(exact, got)
assert actpress.measure.saved_bytes(lambda: net(x).sum()) < before / 4
print("layer found")
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the source with the files of the guide's three examples, and nothing else changed."""
    copied = tmp_path_factory.mktemp("extended")
    for folder in ("configs", "scripts", "src", "tests"):
        shutil.copytree(ROOT / folder, copied / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copied)
    package = copied / "src" / "actpress"
    shutil.copytree(ROOT / "kernels", package / "kernels", dirs_exist_ok=True)  # where an installed package has it
    kernel, method, layer, around = blocks("CONTRIBUTING.md")
    half, recompute = blocks("CONTRIBUTING.md", "yaml")
    for path, text in {
        package / "kernels" / "half" / "__init__.py": kernel,
        package / "methods" / "half.py": method,
        package / "layers" / "hardshrink.py": layer,
        package / "methods" / "recompute.py": around,
        copied / "configs" / "method" / "half.yaml": half,
        copied / "configs" / "method" / "recompute.yaml": recompute,
        copied / "try_layer.py": LAYER,
    }.items():
        path.parent.mkdir(exist_ok=True)
        assert not path.exists()
        path.write_text(text)
    return copied


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["-m", "pytest", "-q", "tests/methods/test_contract.py", "-k", "half", "-p", "no:cacheprovider"], " passed"),
        (
            ["-m", "pytest", "-q", "tests/methods/test_contract.py", "-k", "recompute", "-p", "no:cacheprovider"],
            " passed",
        ),
        (["scripts/audit.py", "model=resnet20", "data=cifar10", "method=half", "batch=2", "top=1"], "Half MiB"),
        (["scripts/audit.py", "model=resnet20", "data=cifar10", "method=recompute", "batch=2"], "Recompute MiB"),
        (
            [
                "scripts/train.py",
                "method=half",
                "logger=none",
                "recipe.epochs=1",
                "data.train_size=128",
                "data.test_size=32",
            ],
            "-half-s0-",
        ),
        (["try_layer.py"], "layer found"),
    ],
    ids=["contract of a method", "contract of an edit", "audit a method", "audit an edit", "train", "layer"],
)
def test_the_guides_files_are_all_that_an_extension_takes(extended, command, expected):
    environment = os.environ | {"PYTHONPATH": str(extended / "src")}
    done = subprocess.run([sys.executable, *command], cwd=extended, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and expected in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_files_exist(document):
    """Relative links, and paths in code into the folders that are committed; `<name>` stands for any."""
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / document).read_text())
    paths = re.findall(r"\b(?:src|configs|kernels|tests|results|scripts)/(?>[\w./-]*)(?!<)", code_of(document))
    assert [path for path in (*links, *paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documented_overrides_name_existing_configs(document):
    """`model=resnet20` in a command names configs/model/resnet20.yaml, and so for every group."""
    groups = "model|data|recipe|method|logger|runtime"
    named = re.findall(rf"(?<![\w.])({groups})=([\w,-]+)", code_of(document))
    missing = [
        f"{group}={choice}"
        for group, choices in named
        for choice in choices.split(",")
        if not (ROOT / "configs" / group / f"{choice}.yaml").is_file()
    ]
    assert missing == []
