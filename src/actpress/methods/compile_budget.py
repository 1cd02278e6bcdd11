"""torch.compile with a budget of memory: the compiler saves a share of what it would save and computes the rest again.

The idea: the min-cut partitioner of AOTAutograd decides what the compiled forward pass saves. Given a budget below 1 it chooses, by a
knapsack over the graph, what is dearest to compute again, and saves that. Gradients are exact. It is PyTorch's own
torch._functorch.config.activation_memory_budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from actpress.kernels.common import check
from actpress.swap import Graph, Method


@dataclass(frozen=True)
class Budgeted:
    """Inductor, with a budget for what a graph saves."""

    budget: float

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        import torch._functorch.config as functorch  # seconds, which other methods do not need
        from torch._inductor.compile_fx import compile_fx

        with functorch.patch(activation_memory_budget=self.budget):
            return compile_fx(graph, inputs)


@dataclass(frozen=True)
class CompileBudget(Method):
    """torch.compile within a budget.

    budget: share of what the compiler would save otherwise, 0 <= budget <= 1; 1 is plain torch.compile.
    Raises ValueError on other values.
    """

    budget: float = 0.5

    def __post_init__(self):
        number = isinstance(self.budget, int | float) and not isinstance(self.budget, bool)
        if not (number and 0 <= self.budget <= 1):
            check.refuse(self, "budget", self.budget, "0 <= budget <= 1")

    def plan(self, model: nn.Module) -> Sequence[Graph]:
        return [Graph("", Budgeted(float(self.budget)))]
