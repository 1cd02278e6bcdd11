"""The first thing to do with a model of one's own: what does a method save in it, and how good are the gradients?

    print(actpress.check(model, actpress.methods.Division(), (x, y)))

Runs a few training steps on copies of the model, stock and under the method, at the same weights on the same batch with the same
randomness of dropout. The model itself, its gradients and buffers, and PyTorch's random generators are left alone.
"""

import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from actpress import measure, swap
from actpress.kernels.common.check import is_integer
from actpress.swap import first_pass, saving
from actpress.swap.saving import Dense, Inputs, readable

LEAST_COSINE, LARGEST_SIZE = 0.5, 1.5  # beyond these a warning is issued; sizes below 1 / 1.5 too
NEGLIGIBLE = (
    1e-5  # parameters whose exact gradient is this small a part of the whole are not listed: a bias before a norm, say
)
WORST, LEAST_SHARE = 3, 0.01  # parameters in the table; dense types have a line from this share on


class Gradient(NamedTuple):
    """One parameter's gradient under the method beside the exact one; means over draws."""

    name: str
    cosine: float
    norm_ratio: float  # |method's| / |exact|


@dataclass(frozen=True)
class Check:
    """What `check` measured. Bytes are those kept for backward on the device by one training forward pass, the loss included."""

    model: str
    method: str
    loss: str  # which loss was used
    saved_before: int
    saved_after: int
    cosine: float  # of the gradient of all parameters together; mean over draws
    norm_ratio: float
    step_ratio: float  # time of a training step (forward, backward) over that of the stock model; medians
    draws: int
    gradients: Sequence[Gradient]  # of each parameter that is not negligible, the lowest cosine first
    dense: Sequence[Dense]  # (type, bytes, share of what is kept under the method), the largest first
    untouched: Mapping[str, str]  # Report.untouched
    peak_before: int | None = None  # bytes, on CUDA
    peak_after: int | None = None

    @property
    def ratio(self) -> float:
        """How many times less is kept for backward."""
        return self.saved_before / self.saved_after if self.saved_after else float("inf")

    @property
    def is_faithful(self) -> bool:
        """Cosine of at least .5, and a size within 1.5 of exact."""
        return self.cosine >= LEAST_COSINE and 1 / LARGEST_SIZE <= self.norm_ratio <= LARGEST_SIZE

    def __str__(self) -> str:
        rows = [
            ["kept for backward", readable(self.saved_before), readable(self.saved_after), f"{self.ratio:.2f}x less"]
        ]
        if self.peak_before is not None:
            peaks = self.peak_before, self.peak_after
            rows.append(["peak of a step", *map(readable, peaks), f"{peaks[0] / peaks[1]:.2f}x less"])
        rows.append(["step time", "1", f"{self.step_ratio:.2f}", ""])
        verdict = "" if self.is_faithful else "FAR FROM EXACT"
        rows.append(["gradient: cosine", "1", f"{self.cosine:.4f}", verdict])
        rows.append(["gradient: size", "1", f"{self.norm_ratio:.3f}", verdict])
        rows += [
            [f"lowest cosine: {found.name}", "1", f"{found.cosine:.4f}", f"size {found.norm_ratio:.3f}"]
            for found in self.gradients[:WORST]
        ]
        rows += [
            [f"stayed dense: {item.type}", "", readable(item.bytes), f"{item.share:.0%}"]
            for item in self.dense
            if item.share >= LEAST_SHARE
        ]
        unread = [name for name, why in self.untouched.items() if "no source" in why]
        rows += [[f"source not available: {name}", "", "", "its functions stay dense"] for name in unread]
        title = f"{self.model}, {self.loss}, mean of {self.draws} draws"
        align = ("left", "right", "right", "left")
        table = tabulate(rows, ["", "stock", self.method, ""], disable_numparse=True, colalign=align)
        return f"{title}\n{table}"


def check(
    model: nn.Module,
    method: swap.Method,
    batch: Any,
    loss: Callable[..., Tensor] | None = None,
    draws: int = 3,
    steps: int = 5,
) -> Check:
    """Compare training steps of `model` under `method` with stock ones.

    batch: x; (x, y); or a dict of keyword arguments.
    loss: called as loss(output, y) for (x, y), else as loss(output). Without it: the model's own loss where the output has one (`.loss`,
        or a dict of scalars, whose sum is taken); for (x, y) cross-entropy where y holds integers, mean squared error where y is of the
        output's shape; else the mean of squares of the output.
    draws: gradients are means over as many draws of a stochastic method's noise.
    steps: timed steps of each, alternating.
    The copies are in training mode; a model that has a method already is compared as it is without. Issues a UserWarning where the
    cosine of the whole gradient is under .5 or its size is not within 1.5 of exact. Raises ValueError for another batch, a target that
    fits no loss, draws or steps below 1, a model without trained parameters, an exact gradient that is zero or not finite, and if the
    method matches nothing.
    """
    swap.check_model(model)
    for name, value in (("draws", draws), ("steps", steps)):
        if not is_integer(value, 1):
            raise ValueError(f"check: {name}={value!r}, allowed: integers from 1")
    if torch.is_inference_mode_enabled():
        raise RuntimeError("check: inference mode is on, in which nothing has a gradient; call it outside")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("check: no parameter of the model requires a gradient, so there is none to compare")
    task = _Task.of(batch, loss)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    stock = copy.deepcopy(model).train()
    first_pass.remove_all(stock)
    swap.restore(stock)
    ours = copy.deepcopy(stock)
    report = swap.apply(ours, method)
    first_pass.remove_all(ours)
    swap.set_epoch(ours, max((m.late_codec[0] for m in ours.modules() if hasattr(m, "late_codec")), default=0))
    with torch.random.fork_rng(), torch.enable_grad():
        before, after = (saving.kept_by(net, lambda net=net: task.loss(net)) for net in (stock, ours))
        exact = _gradients(stock, task)
        found = [_compare(_gradients(ours, task), exact) for _ in range(draws)]
        step_ratio = _step_ratio(stock, ours, task, steps, device)
        peaks = [_peak(net, task, device) for net in (stock, ours)] if device.type == "cuda" else [None, None]
    means = {
        name: [statistics.fmean(values) for values in zip(*(f[name] for f in found), strict=True)] for name in found[0]
    }
    total = means.pop("")
    gradients = sorted((Gradient(name, *values) for name, values in means.items()), key=lambda item: item.cosine)
    result = Check(
        type(model).__name__, swap.label(method), task.used, sum(before.bytes.values()), sum(after.bytes.values()), *total,
        step_ratio, draws, gradients, saving.dense_items(after), report.untouched, *peaks,
    )  # fmt: skip
    if not result.is_faithful:
        closer = f"; closer with {method.closer}" if method.closer else ""
        warnings.warn(
            f"actpress: under {result.method} the gradient of {result.model} has cosine {result.cosine:.3f} and "
            f"{result.norm_ratio:.3f} times the size of the exact one; lowest: {gradients[0].name} ({gradients[0].cosine:.3f}){closer}",
            stacklevel=2,
        )
    return result


class _Task:
    """Inputs and loss of a step."""

    def __init__(self, inputs: Inputs, target: Any, loss: Callable[..., Tensor] | None):
        self.inputs, self.target, self.given, self.used = inputs, target, loss, "no loss"

    @classmethod
    def of(cls, batch: Any, loss: Callable[..., Tensor] | None) -> "_Task":
        if isinstance(batch, Tensor | Mapping):
            return cls(Inputs.of(batch), None, loss)
        if isinstance(batch, tuple | list) and len(batch) == 2:
            return cls(Inputs.of(batch[0] if isinstance(batch[0], Mapping) else (batch[0],)), batch[1], loss)
        raise ValueError(
            f"check: batch is a {type(batch).__name__}{f' of {len(batch)}' if isinstance(batch, tuple | list) else ''}, "
            "allowed: a tensor, (inputs, targets), a dict of keywords"
        )

    def loss(self, model: nn.Module) -> Tensor:
        torch.manual_seed(0)  # random layers draw the same in every step
        output = self.inputs.call(model)
        self.used, value = self._loss_of(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError(f"check: the loss must be a scalar tensor, got {getattr(value, 'shape', value)!r}")
        return value

    def _loss_of(self, output: Any) -> tuple[str, Tensor]:
        if self.given is not None:
            name = getattr(self.given, "__name__", type(self.given).__name__)
            return name, self.given(output) if self.target is None else self.given(output, self.target)
        if self.target is not None:
            return _target_loss(_first(output), self.target)
        own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if own is not None:
            return "the model's loss", own
        leaves = tree_leaves(dict(output)) if isinstance(output, Mapping) else []
        if leaves and all(isinstance(leaf, Tensor) and leaf.numel() == 1 for leaf in leaves):
            return "sum of the model's losses", torch.stack([leaf.reshape(()) for leaf in leaves]).sum()
        return "mean of squares of the output", _first(output).float().square().mean()


def _target_loss(output: Tensor, target: Any) -> tuple[str, Tensor]:
    if isinstance(target, Tensor) and target.is_floating_point() and target.shape == output.shape:
        return "mean squared error", F.mse_loss(output.float(), target.float())
    if isinstance(target, Tensor) and target.dtype == torch.long and output.dim() > 1:
        return "cross-entropy", F.cross_entropy(output.float(), target)
    got = f"{target.dtype} {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
    raise ValueError(
        f"check: targets are {got} for outputs {tuple(output.shape)}, allowed: int64 class indices, floats of the "
        "output's shape; or give a loss"
    )


def _first(output: Any) -> Tensor:
    """The tensor that a loss is made of: the output, its logits, or its first floating-point tensor."""
    if isinstance(getattr(output, "logits", None), Tensor):
        return output.logits
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    found = next((x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.requires_grad), None)
    if found is None:
        raise ValueError(
            f"check: the model returned {type(output).__name__} without a tensor that has a gradient; give a loss"
        )
    return found


def _gradients(model: nn.Module, task: _Task) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    task.loss(model).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _compare(approximate: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Name -> (cosine, size), "" for all parameters together; a gradient that is missing counts as zero."""
    sums = {}
    for name, g in exact.items():
        a, g = approximate.get(name, torch.zeros_like(g)).double(), g.double()
        sums[name] = torch.stack([(a * g).sum(), a.square().sum(), g.square().sum()]).cpu()
    total = torch.stack(list(sums.values())).sum(0)
    if total[2] == 0:
        raise ValueError("check: the exact gradient is zero; give another batch or loss")
    if not total[2].isfinite():
        wrong = next(name for name, s in sums.items() if not s[2].isfinite())
        raise ValueError(f"check: the exact gradient is not finite, of {wrong!r} for one; give another batch or loss")
    found = {"": total} | {name: s for name, s in sums.items() if s[2] > NEGLIGIBLE**2 * total[2]}
    return {name: _cosine_and_size(*s.tolist()) for name, s in found.items()}


def _cosine_and_size(product: float, approximate: float, exact: float) -> tuple[float, float]:
    cosine = 0.0 if approximate == 0 else product / (approximate * exact) ** 0.5
    return cosine, (approximate / exact) ** 0.5


def _step_ratio(stock: nn.Module, ours: nn.Module, task: _Task, steps: int, device: torch.device) -> float:
    seconds: dict[nn.Module, list[float]] = {stock: [], ours: []}
    for _ in range(steps):
        for net, times in seconds.items():
            _wait(device)
            begin = time.perf_counter()
            task.loss(net).backward()
            _wait(device)
            times.append(time.perf_counter() - begin)
            net.zero_grad(set_to_none=True)
    return statistics.median(seconds[ours]) / statistics.median(seconds[stock])


def _peak(net: nn.Module, task: _Task, device: torch.device) -> int:
    peak = measure.peak_bytes(lambda: task.loss(net).backward(), device)
    net.zero_grad(set_to_none=True)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
