"""actpress.check: saved bytes, gradient fidelity and step time of a method on one's own model.

    print(actpress.check(model, actpress.methods.Division(), (x, y)))

A few training steps run on copies of the model, stock and under the method, with the same weights, the same batch and the same dropout
masks. The model, its gradients and buffers, and the state of PyTorch's random generators do not change.
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

from actpress import swap
from actpress.kernels.common.check import is_integer
from actpress.measure import memory
from actpress.swap import first_pass, saving
from actpress.swap.saving import Dense, Inputs, readable, times_less

# A warning is issued below this cosine, and where the norm ratio is outside [1 / LARGEST_SIZE, LARGEST_SIZE].
LEAST_COSINE, LARGEST_SIZE = 0.5, 1.5
# Parameters with an exact gradient below this part of the whole norm, such as a bias before a batch norm, are not listed.
NEGLIGIBLE = 1e-5
# The table lists so many parameters, and the dense types with at least this share of the saved bytes.
WORST, LEAST_SHARE = 3, 0.01


class Gradient(NamedTuple):
    """One parameter's gradient under the method compared with the exact one; means over draws."""

    name: str
    cosine: float
    norm_ratio: float  # |method's| / |exact|


@dataclass(frozen=True)
class Check:
    """Result of `check`. Saved bytes are on the device, of one training forward pass including the loss."""

    model: str
    method: str
    loss: str  # name of the loss that was used
    saved_before: int
    saved_after: int
    cosine: float  # of the gradient of all parameters together; mean over draws
    norm_ratio: float
    step_ratio: float  # median time of forward and backward, divided by that of the stock model
    draws: int
    gradients: Sequence[Gradient]  # of each parameter that is not negligible, by ascending cosine
    dense: Sequence[Dense]  # (type, bytes, share of the bytes saved under the method), the largest first
    untouched: Mapping[str, str]  # Report.untouched
    peak_before: int | None = None  # bytes, on CUDA
    peak_after: int | None = None

    @property
    def ratio(self) -> float:
        """Saved bytes of the stock model over those under the method."""
        return self.saved_before / self.saved_after if self.saved_after else float("inf")

    @property
    def is_faithful(self) -> bool:
        """Whether the cosine is at least LEAST_COSINE and the norm ratio is within a factor of LARGEST_SIZE."""
        return self.cosine >= LEAST_COSINE and 1 / LARGEST_SIZE <= self.norm_ratio <= LARGEST_SIZE

    def __str__(self) -> str:
        rows = [["kept for backward", readable(self.saved_before), readable(self.saved_after), times_less(self.ratio)]]
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
    loss: called as loss(output, y) for (x, y), otherwise as loss(output). Default: for (x, y), cross-entropy where y holds class indices
        and mean squared error where y holds floats of the output's shape; otherwise the model's own loss (`output.loss`, or the sum of
        a dict of scalars), or the mean of squares of an output without one.
    draws: number of backward passes under the method; cosines and norm ratios are means over them, because methods may be stochastic.
    steps: number of timed steps of each model; stock and method alternate.
    The copies are in training mode. A model that already has a method is compared as if it had none. Issues a UserWarning where the
    cosine of the whole gradient is below .5 or its norm ratio is not within a factor of 1.5. Raises ValueError for another batch, a target
    that fits no loss, draws or steps below 1, a model without trained parameters, an exact gradient that is zero or not finite, and a
    method that matches nothing in the model; RuntimeError in inference mode.
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
    if swap.is_compiled(ours):
        raise ValueError(f"check: {swap.label(method)} compiles the model; its bytes are not counted here")
    first_pass.remove_all(ours)
    swap.set_epoch(ours, swap.start_epoch(ours))
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
    """Inputs and loss of a training step. `used` names the loss once it has been computed."""

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
        torch.manual_seed(0)  # random layers draw the same numbers in every step
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
    """The tensor to compute a loss from: the output's logits, or its first floating-point tensor with a gradient."""
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
    """Parameter name -> (cosine, norm ratio), with "" for all parameters together. A missing approximate gradient counts as zero."""
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
    peak = memory.peak_bytes(lambda: task.loss(net).backward(), device)
    net.zero_grad(set_to_none=True)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
