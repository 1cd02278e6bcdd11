"""Stock PyTorch: nothing is replaced. The baseline of every comparison, through the same code as every method."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from actpress.swap import Method, Replacement


@dataclass(frozen=True)
class Stock(Method):
    """Leaves the model as it is."""

    changes_model = False

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        return {}
