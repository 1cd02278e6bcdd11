"""Methods and their plans: what `apply` does to a model.

edits.py     Swap, Around, Graph          method.py     Method, Replacement, compose: how a plan is made
plan.py      apply, Report, restore       state.py      what is stored with a checkpoint, and the epoch
"""

from actpress.swap.edits import Around, Graph, Swap
from actpress.swap.functional import Functions
from actpress.swap.method import Composition, Method, Replacement, compose, label
from actpress.swap.plan import NothingMatches, Report, apply, check_model, restore, worth
from actpress.swap.state import is_compiled, load_state, set_epoch, start_epoch, state
from actpress.swap.wrapping import module_of

__all__ = [
    "Around",
    "Composition",
    "Functions",
    "Graph",
    "Method",
    "NothingMatches",
    "Replacement",
    "Report",
    "Swap",
    "apply",
    "check_model",
    "compose",
    "is_compiled",
    "label",
    "load_state",
    "module_of",
    "restore",
    "set_epoch",
    "start_epoch",
    "state",
    "worth",
]
