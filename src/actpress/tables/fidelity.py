"""Gradient fidelity of methods on one network: per parameter, the approximate gradient g~ beside the exact g.

Everything is measured at the same weights and on the same batches; what varies between draws is the noise of stochastic codecs. For each
parameter, over n draws on a batch and then as the mean over batches:

    cosine, norm_ratio    of g~ and g: mean over draws; cosine_sd is the spread over all draws and batches
    bias                  |mean g~ - g| / |g|
    noise                 sqrt(mean |g~ - mean g~|^2 n / (n - 1)) / |g|: the spread of single draws, 0 for a deterministic method
    excess                bias / (noise / sqrt(n)): an unbiased method shows about 1, whatever n; None without noise

A deterministic method is found out by its second draw and is not drawn again.
"""

import copy
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actpress import measure, swap
from actpress.swap import first_pass

Figures = dict[str, dict[str, float]]  # parameter -> cosine, cosine_sd, norm_ratio, bias, noise, excess, n


def compare(
    model: nn.Module, methods: Mapping[str, swap.Method], batches: Sequence[tuple[Tensor, Tensor]], draws: int
) -> dict[str, Figures]:
    """Label of each method -> figures of each parameter and of "total". n: draws x batches. Parameters whose exact gradient is zero, as
    before a head that starts at zero, have none.

    batches: (x [N, C, H, W], y [N]). The model is left alone; its mode decides whether batch norms use batch statistics.
    """
    exact = [measure.gradients(model, batch) for batch in batches]
    found = {}
    for label, method in methods.items():
        parts = [_on_batch(model, method, batch, g, draws) for batch, g in zip(batches, exact, strict=True)]
        names = (name for name in exact[0] if all(g[name].count_nonzero() for g in exact))
        found[label] = {name: _figures([part[name] for part in parts]) for name in names}
    return found


def saved_share(model: nn.Module, method: swap.Method, batch: tuple[Tensor, Tensor]) -> float:
    """Bytes that the method keeps for backward on a batch, over those of the model as it is."""
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


def record_id(network: str, method: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Name of the record of one measurement: <run id of the network>-<weights>-<method's class>-<hash of all that goes into it>."""
    digest = hashlib.sha256(json.dumps([network, method, settings], sort_keys=True).encode()).hexdigest()[:8]
    return f"{network}-{settings['weights']}-{method['_target_'].rpartition('.')[2].lower()}-{digest}"


def is_layer_weight(name: str, parameter: Tensor) -> bool:
    """Weights of convolutions and linears: what the papers approximate first."""
    return name.endswith("weight") and parameter.dim() > 1


HEAD = (
    "saved, of stock",
    "total: cosine",
    "norm ratio",
    "bias",
    "noise",
    "bias / its standard error",
    "layers: lowest cosine",
    "median",
    "n",
)


def cells(figures: Figures, layers: Sequence[str], share: float) -> list[str]:
    """One method in words, under HEAD: its bytes, the total gradient, the layers."""
    total, cosines = figures["total"], sorted(figures[name]["cosine"] for name in layers)
    excess = "deterministic" if total["excess"] is None else f"{total['excess']:.1f}"
    found = [f"{share:.1%}", _cosine(total), _norm(total), f"{total['bias']:.4f}", f"{total['noise']:.4f}", excess]
    return [*found, f"{cosines[0]:.4f}", f"{statistics.median(cosines):.4f}", str(total["n"])]


def summary(found: Mapping[str, Figures], layers: Sequence[str], shares: Mapping[str, float]) -> str:
    """Markdown: a line per method. shares: of each, see `saved_share`."""
    rows = [[label, *cells(figures, layers, shares[label])] for label, figures in found.items()]
    return "\n".join(map(_row, [["method", *HEAD], ["---"] * (1 + len(HEAD)), *rows]))


def render(found: Mapping[str, Figures], layers: Sequence[str], pair: tuple[str, str] | None = None) -> str:
    """Markdown: a line per layer and the total, cosine ± sd and norm ratio of each method; of `pair` (a, b) how often a's mean cosine is
    at least b's."""
    head = ["layer", *(f"{label}: {what}" for label in found for what in ("cosine", "norm ratio"))]
    rows = [
        [name, *(f(figures[name]) for figures in found.values() for f in (_cosine, _norm))]
        for name in (*layers, "total")
    ]
    lines = [*map(_row, [head, ["---"] * len(head), *rows])]
    if pair is not None:
        first, second = (found[label] for label in pair)
        gaps = [second[name]["cosine"] - first[name]["cosine"] for name in layers]
        wins = sum(gap <= 0 for gap in gaps)
        lines += ["", f"{pair[0]} has at least the mean cosine of {pair[1]} in {wins} of {len(layers)} layers."]
        lines[-1] += f" The largest shortfall in the others is {max(gaps):.1e}." if wins < len(layers) else ""
    return "\n".join(lines)


def _cosine(figures: Mapping[str, Any]) -> str:
    return f"{figures['cosine']:.4f} ± {figures['cosine_sd']:.4f}"


def _norm(figures: Mapping[str, Any]) -> str:
    return f"{figures['norm_ratio']:.3f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
