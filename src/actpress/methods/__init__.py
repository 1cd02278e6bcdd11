"""Methods: each says which layers keep what. One file a method, one YAML of the same name in configs/method."""

from actpress.methods.division import Division
from actpress.methods.none import Stock
from actpress.methods.pooling import Pooling

__all__ = ["Division", "Pooling", "Stock"]
