"""Gradient fidelity of methods on one trained network: per parameter, the approximate gradient beside the exact one.

Everything is measured at the same weights and on the same batches; what varies between draws is the noise of stochastic codecs.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from actpress import measure, swap

Figures = dict[str, dict[str, float]]  # parameter -> cosine, cosine_sd, norm_ratio, n


def compare(
    model: nn.Module, methods: Mapping[str, swap.Method], batches: Sequence[tuple[Tensor, Tensor]], draws: int
) -> dict[str, Figures]:
    """Label of each method -> figures of each parameter and of "total": means over batches x draws, spread of the cosine.

    batches: (x [N, C, H, W], y [N]). The model is left alone; its mode decides whether batch norms use batch statistics.
    """
    found = {}
    for label, method in methods.items():
        measured = []
        for draw in range(draws):
            for batch in batches:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(draw)  # seeds the noise of the applied copy
                    measured.append(measure.gradient_fidelity(model, method, batch))
        found[label] = {name: _figures([fidelity[name] for fidelity in measured]) for name in measured[0]}
    return found


def _figures(measured: Sequence[measure.Fidelity]) -> dict[str, float]:
    cosines = [fidelity.cosine for fidelity in measured]
    return {
        "cosine": statistics.fmean(cosines),
        "cosine_sd": statistics.stdev(cosines) if len(cosines) > 1 else 0.0,
        "norm_ratio": statistics.fmean(fidelity.norm_ratio for fidelity in measured),
        "n": len(cosines),
    }


def is_layer_weight(name: str, parameter: Tensor) -> bool:
    """Weights of convolutions and linears: what the papers approximate first."""
    return name.endswith("weight") and parameter.dim() > 1


def render(found: Mapping[str, Figures], layers: Sequence[str], pair: tuple[str, str] | None = None) -> str:
    """Markdown: a line per layer and the total, cosine ± sd and norm ratio of each method; of `pair` (a, b) how often a's mean cosine is
    at least b's."""
    head = ["layer", *(f"{label}: {what}" for label in found for what in ("cosine", "norm ratio"))]
    lines = [_row(head), _row(["---"] * len(head))]
    for name in (*layers, "total"):
        cells = [f(figures[name]) for figures in found.values() for f in (_cosine, _norm)]
        lines.append(_row([name, *cells]))
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
