"""Rules about the source text, read with ast.

kernels <- codec <- layers <- swap <- methods, measure <- train <- tables <- bench <- report    each imports only what stands to its left
methods                                  are imported and named by none of these; Hydra joins them
the library (and `import actpress`)      imports nothing of the harness nor of its dependencies
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from paths import ROOT

FOLDERS = {"actpress": ROOT / "src" / "actpress", "actpress.kernels": ROOT / "kernels"}
METHODS = FOLDERS["actpress"] / "methods"
# One rank may import another that stands before it. measure.saved, which counts saved bytes, knows nothing of the package.
RANKS = (
    "measure.saved",
    "kernels",
    "codec",
    "layers",
    "swap",
    "methods",
    "measure",
    "train",
    "tables",
    "bench",
    "report",
)
LIBRARY = {"kernels", "codec", "layers", "swap", "methods", "measure"}
HARNESS_DEPENDENCIES = {"hydra", "omegaconf", "wandb", "timm", "torchvision", "sklearn", "pandas", "matplotlib", "tqdm"}

# Folders of one machine, and where packages come from; in pieces so that this file does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.~}*>-])/(?:home|root|Users|work|workspace|mnt|media|srv|opt|scratch|tmp|var)/[\w.-]+"
)
PACKAGE_INDEX = re.compile(r"index-" + r"url|https?://[^\s)]*(?:pypi|/simple\b)", flags=re.IGNORECASE)


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    found = {}
    for package, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [part for part in file.relative_to(folder).with_suffix("").parts if part != "__init__"]
            found[".".join((package, *parts))] = file
    return found


MODULES = modules()


def part_of(module: str) -> str:
    """The second word of a dotted name, the part of the package: kernels, codec, swap, engine; "" for actpress."""
    return (*module.split("."), "")[1]


def imports(source: str, package: str = "actpress") -> set[str]:
    """Dotted names of all that a file of `package` imports, also inside functions; relative names resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def imports_of(module: str) -> set[str]:
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return imports(file.read_text(), package)


def parts_imported(module: str) -> set[str]:
    """The parts of actpress that a module imports, or is: `from actpress import apply` counts for no part."""
    parts = {part_of(name) for name in MODULES}
    return {part_of(name) for name in imports_of(module) if name.startswith("actpress.")} & parts


def rank_of(name: str) -> str | None:
    """The one of RANKS that a module, or a name imported from it, belongs to; None for actpress itself."""
    found = [rank for rank in RANKS if f"{name}.".startswith(f"actpress.{rank}.")]
    return max(found, key=len, default=None)


def names_in(source: str) -> set[str]:
    """Identifiers, strings as a whole, and what strings call or point to ("methods.X", "X(...)"); no docstrings."""
    tree = ast.parse(source)
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.update(node.name.split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            names.add(node.value)
            names.update(re.findall(r"methods\.(\w+)", node.value))
            names.update(re.findall(r"(\w+)\(", node.value))
    return names


def method_names() -> set[str]:
    """Every public class of methods/, and the names of methods' files and configs. "none" and "rules" are everyday words."""
    files = list(METHODS.glob("*.py"))
    classes = {
        node.name for file in files for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef)
    }
    names = classes | {file.stem for file in files} | config_names("method")
    return {name for name in names if not name.startswith("_")} - {"none", "rules"}


def config_names(group: str) -> set[str]:
    return {file.stem for file in (ROOT / "configs" / group).glob("*.yaml")}


def committed_texts() -> list[tuple[str, str]]:
    """(path, text) of every text file that is, or would be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in sorted(set(listing.stdout.split("\0")) - {""})]
    contents = [(str(file.relative_to(ROOT)), file.read_bytes()) for file in files if file.is_file()]
    return [(name, content.decode()) for name, content in contents if b"\0" not in content]


@pytest.mark.parametrize("module", [name for name in MODULES if rank_of(name)])
def test_imports_go_one_way(module):
    allowed = RANKS[: RANKS.index(rank_of(module)) + 1]
    assert {rank_of(name) for name in imports_of(module)} - {None} <= set(allowed)


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) not in ("methods", "kernels", "")])
def test_only_methods_know_methods(module):
    """A kernel family may be called after its method; that it imports none is tested above."""
    assert "methods" not in parts_imported(module)
    assert names_in(MODULES[module].read_text()) & method_names() == set()


def test_a_reader_finds_the_way():
    """At most ten entries at the package's top, and no file of more than 400 lines."""
    top = {path.relative_to(FOLDERS["actpress"]).parts[0] for path in FOLDERS["actpress"].rglob("*.py")}
    assert len(top) <= 10, sorted(top)
    long = {name: lines for name, file in MODULES.items() if (lines := len(file.read_text().splitlines())) > 400}
    assert {name for name in long if not name.startswith("actpress.kernels.")} == set(), long


def test_the_engine_knows_no_model_and_no_data_set():
    known = names_in(MODULES["actpress.train.engine"].read_text())
    assert known & (config_names("model") | config_names("data")) == set()
    assert parts_imported("actpress.train.engine") & {"models", "data"} == set()


@pytest.mark.parametrize("module", [name for name in MODULES if part_of(name) in {*LIBRARY, ""}])
def test_the_library_does_without_the_harness(module):
    assert {name.partition(".")[0] for name in imports_of(module)} & HARNESS_DEPENDENCIES == set()
    assert parts_imported(module) <= LIBRARY


def test_the_readers_see_what_the_rules_forbid():
    assert {"Division", "Stock", "division"} <= method_names()
    assert imports("from . import methods\nfrom .codec import keep") == {"actpress.methods", "actpress.codec.keep"}
    assert imports("from ..codec import keep", "actpress.methods") == {"actpress.codec.keep"}
    source = '"""About Division."""\ndef f():\n    return make("methods.Stock"), "try Pooling()", kind == "division"\n'
    assert names_in(source) & {"Division", "Stock", "Pooling", "division"} == {"Stock", "Pooling", "division"}


@pytest.mark.parametrize(
    ("rule", "example"),
    [(MACHINE_PATH, "root: /ho" + "me/someone/data"), (PACKAGE_INDEX, "--extra-index-" + "url x")],
    ids=["machine path", "package index"],
)
def test_committed_text_belongs_to_no_machine(rule, example):
    assert rule.search(example)
    found = [f"{name}: {match.group()}" for name, text in committed_texts() for match in rule.finditer(text)]
    assert found == []
