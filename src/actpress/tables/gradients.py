"""Gradients under several methods compared with the exact ones: for each parameter, the approximate gradient g~ and the exact g.

All gradients are taken at the same weights, on the same batches. A draw is one gradient of a method whose rounding is random; draws differ
in that randomness alone. For each parameter, over n draws on a batch and then as the mean over batches:

    cosine, norm_ratio    of g~ and g, mean over draws; cosine_sd is the spread over all draws and batches
    bias                  |mean g~ - g| / |g|
    noise                 sqrt(mean |g~ - mean g~|^2 n / (n - 1)) / |g|: the spread of single draws, 0 for a deterministic method
    excess                bias / (noise / sqrt(n)): about 1 for an unbiased method, whatever n; None without noise

A method whose second draw equals the first is deterministic and is not drawn again.
"""

import copy
import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from actpress import measure, swap
from actpress.swap import first_pass

Figures = dict[str, dict[str, float]]  # parameter -> cosine, cosine_sd, norm_ratio, bias, noise, excess, n


def compare(
    model: nn.Module, methods: Mapping[str, swap.Method], batches: Sequence[tuple[Tensor, Tensor]], draws: int
) -> dict[str, Figures]:
    """Returns {label of a method: {parameter: Figures}}, with "total" for all parameters together; n is draws x batches.

    Parameters whose exact gradient is zero are left out: those before a head whose weights start at zero, for instance.
    batches: (x [N, C, H, W], y [N]). The model does not change; its mode decides whether batch norms use batch statistics.
    """
    exact = [measure.gradients(model, batch) for batch in batches]
    found = {}
    for label, method in methods.items():
        parts = [_on_batch(model, method, batch, g, draws) for batch, g in zip(batches, exact, strict=True)]
        names = (name for name in exact[0] if all(g[name].count_nonzero() for g in exact))
        found[label] = {name: _figures([part[name] for part in parts]) for name in names}
    return found


def saved_share(model: nn.Module, method: swap.Method, batch: tuple[Tensor, Tensor]) -> float:
    """Bytes saved for backward on a batch under the method, divided by those of the stock model."""
    x, y = batch

    def saved(net: nn.Module) -> int:
        return measure.saved_bytes(lambda: nn.functional.cross_entropy(net(x), y))

    stock, applied = copy.deepcopy(model), copy.deepcopy(model)
    swap.apply(applied, method)
    first_pass.remove_all(applied)
    return saved(applied) / saved(stock)


class _Draws:
    """Running sums over the draws of one parameter's gradient on one batch."""

    def __init__(self, exact: Tensor):
        self.exact, self.sum, self.squares, self.fidelities = exact, torch.zeros_like(exact), 0.0, []

    def add(self, approximate: Tensor) -> None:
        self.sum += approximate
        self.squares += approximate.square().sum().item()
        self.fidelities.append(measure.fidelity(approximate, self.exact))

    def bias_and_noise(self) -> tuple[float, float]:
        n, norm = len(self.fidelities), self.exact.norm().item()
        mean = self.sum / n
        variance = (self.squares / n - mean.square().sum().item()) * n / max(n - 1, 1)
        return (mean - self.exact).norm().item() / norm, max(variance, 0.0) ** 0.5 / norm


def _on_batch(
    model: nn.Module, method: swap.Method, batch: tuple[Tensor, Tensor], exact: Mapping[str, Tensor], draws: int
) -> dict[str, _Draws]:
    sums = {name: _Draws(g) for name, g in exact.items()}
    first = None
    for draw in range(draws):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw)  # seeds the noise of the applied copy
            approximate = measure.gradients(model, batch, method)
        if draw == 1 and torch.equal(approximate["total"], first):
            break
        first = approximate["total"] if draw == 0 else first
        for name, g in approximate.items():
            sums[name].add(g)
    return sums


def _figures(batches: Sequence[_Draws]) -> dict[str, float]:
    cosines = [f.cosine for batch in batches for f in batch.fidelities]
    biases, noises = zip(*(batch.bias_and_noise() for batch in batches), strict=True)
    bias, noise, draws = statistics.fmean(biases), statistics.fmean(noises), len(batches[0].fidelities)
    return {
        "cosine": statistics.fmean(cosines),
        "cosine_sd": statistics.stdev(cosines) if len(cosines) > 1 else 0.0,
        "norm_ratio": statistics.fmean(f.norm_ratio for batch in batches for f in batch.fidelities),
        "bias": bias,
        "noise": noise,
        "excess": bias / (noise / draws**0.5) if draws > 1 and noise > 0 else None,
        "n": len(cosines),
    }


def is_layer_weight(name: str, parameter: Tensor) -> bool:
    """Weights of convolutions and linears: what the papers approximate first."""
    return name.endswith("weight") and parameter.dim() > 1
