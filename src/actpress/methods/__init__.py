"""Methods: each says which layers keep what. One file a method, one YAML of the same name in configs/method."""

from actpress.methods.checkpoint import Checkpoint
from actpress.methods.compile_budget import CompileBudget
from actpress.methods.division import Division
from actpress.methods.few_bit import FewBit
from actpress.methods.frequency import Frequency
from actpress.methods.inverted import Inverted
from actpress.methods.none import Stock
from actpress.methods.offload import Offload
from actpress.methods.pooling import Pooling
from actpress.methods.pruning import BlockPruning
from actpress.methods.quantize import Quantize

__all__ = [
    "BlockPruning",
    "Checkpoint",
    "CompileBudget",
    "Division",
    "FewBit",
    "Frequency",
    "Inverted",
    "Offload",
    "Pooling",
    "Quantize",
    "Stock",
]
