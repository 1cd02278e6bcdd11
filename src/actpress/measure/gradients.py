"""Gradient fidelity: how close the gradients under a method are to the exact ones."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from actpress import swap
from actpress.swap import first_pass


class Fidelity(NamedTuple):
    """An approximate gradient g~ compared with the exact gradient g."""

    cosine: float  # of the angle between g~ and g
    norm_ratio: float  # |g~| / |g|


def gradient_fidelity(model: nn.Module, method: swap.Method, batch: tuple[Tensor, Tensor]) -> dict[str, Fidelity]:
    """Compare each parameter's gradient under `method` with the exact one, at the same weights on the same batch.

    batch: (x, y), where y holds class indices [N]; the loss is cross-entropy. The model is copied and the copies run in its mode, so the
    model itself does not change. Random layers (dropout) draw the same numbers in both runs. Returns {parameter name: Fidelity}, with
    "total" for all parameters together. Parameters without a gradient are left out.
    """
    exact, approximate = gradients(model, batch), gradients(model, batch, method)
    return {name: fidelity(approximate[name], g) for name, g in exact.items()}


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor], method: swap.Method | None = None) -> dict[str, Tensor]:
    """Gradients of a copy of the model, under `method` if one is given. The batch is that of gradient_fidelity.

    Returns {parameter name: flat fp64 gradient}, with "total" for the concatenation of all. Random layers draw the same numbers in every
    call. The noise of stochastic codecs follows `torch.manual_seed`.
    """
    x, y = batch
    twin = copy.deepcopy(model)
    if method is not None:
        swap.apply(twin, method)
        first_pass.remove_all(twin)
    twin.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.functional.cross_entropy(twin(x), y).backward()
    found = {name: p.grad.double().flatten() for name, p in twin.named_parameters() if p.grad is not None}
    return found | {"total": torch.cat(list(found.values()))}


def fidelity(approximate: Tensor, exact: Tensor) -> Fidelity:
    """Compare two flat gradients of one parameter. The cosine is 0 where only the approximate gradient is zero."""
    norms = approximate.norm(), exact.norm()
    lost = norms[0] == 0 and norms[1] > 0
    cosine = 0.0 if lost else (approximate @ exact / (norms[0] * norms[1])).item()
    return Fidelity(cosine, (norms[0] / norms[1]).item())
