"""Kinds of tables, one file each: `kind: <name>` in a table's YAML means KIND of <name>.py in this folder.

memory      bytes of a training step, predicted with fake tensors
error       error of the derivative of an activation, computed for every input
training    accuracy, speed and memory of training runs
fidelity    gradients under a method compared with exact ones
function    whatever a Python function returns for each row

A new kind is a new file that defines KIND, an instance of a subclass of actpress.tables.kind.Kind. No other file changes.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from actpress.tables.kind import Kind


def names() -> list[str]:
    """All kinds, by name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> "Kind":
    """The kind of this name, one of `names()`."""
    return importlib.import_module(f"{__name__}.{name}").KIND
