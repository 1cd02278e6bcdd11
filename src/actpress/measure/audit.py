"""What holds my activations, and what would each method save?

Runs the model once with fake tensors (no memory, seconds at any size), names for every module the tensors its graph keeps for
backward, and does the same under each method. A tensor kept by several modules counts for the first; the others are named beside it,
since it stays alive until all of them let go: that is why memory may not drop when one layer is compressed.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from tabulate import tabulate
from torch import nn

from actpress import measure, swap
from actpress.swap import first_pass
from actpress.swap.saving import Owners

MIB = 2**20


@dataclass(frozen=True)
class Kept:
    """What one module keeps for backward."""

    bytes: int
    also_kept_by: tuple[str, ...] = ()  # modules that keep one of these very tensors too


@dataclass(frozen=True)
class Audit:
    """stock and methods: module name -> Kept, "" being what is kept outside of all modules but the model itself."""

    types: dict[str, str]  # module name -> its stock type
    stock: dict[str, Kept]
    methods: dict[str, dict[str, Kept]]  # label of the method -> the same under it
    unmatched: tuple[str, ...] = ()  # labels of methods that match nothing in the model, which keeps what stock keeps

    def total(self, method: str | None = None) -> int:
        """Bytes kept for backward by the whole model, under `method` or stock."""
        kept = self.stock if method is None else self.methods[method]
        return sum(item.bytes for item in kept.values())

    def table(self, top: int | None = None) -> str:
        """Text: a line for each module, largest first (the `top` first ones), and the total."""
        names = sorted(
            {*self.stock, *(name for kept in self.methods.values() for name in kept)}, key=self._size, reverse=True
        )
        columns = [self.stock, *self.methods.values()]
        rows = [
            [name or "(model)", self.types[name], *(_mib(c.get(name)) for c in columns), self._shared(name)]
            for name in names
        ]
        rest = len(rows) - len(rows[:top])
        rows = rows[:top] + ([[f"{rest} more"]] if rest else [])
        totals = [self.total(), *(self.total(label) for label in self.methods)]
        rows.append(["total", "", *(f"{total / MIB:.2f}" for total in totals)])
        rows.append(["compression", "", *(_ratio(totals[0], total) for total in totals)])
        if self.unmatched:
            said = ["matches nothing" if label in self.unmatched else "" for label in self.methods]
            rows.append(["", "", "", *said])
        head = ["module", "type", "stock MiB", *(f"{name} MiB" for name in self.methods), "stock tensor also kept by"]
        return tabulate(rows, head, disable_numparse=True, colalign=("left", "left", *["right"] * len(columns), "left"))

    def __str__(self) -> str:
        return self.table()

    def _size(self, name: str) -> int:
        return max(kept[name].bytes for kept in (self.stock, *self.methods.values()) if name in kept)

    def _shared(self, name: str) -> str:
        return ", ".join(self.stock[name].also_kept_by) if name in self.stock else ""


def audit(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    methods: Sequence[swap.Method] = (),
) -> Audit:
    """What each module of `model` keeps for backward, and under each of `methods`. `model` itself is left alone.

    input_shape includes the batch, e.g. (64, 3, 224, 224). dtype: float32, or bfloat16 or float16 for autocast. The model must
    return a tensor, or a tuple or dict of tensors. The column of a method that matches nothing in the model says so. Raises ValueError
    for other dtypes.
    """
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        raise ValueError(f"audit: dtype={dtype}, allowed: {', '.join(map(str, allowed))}")
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    stock = _kept(model, input_shape, dtype, None)
    columns, unmatched = {}, []
    for label, method in zip(labels(methods), methods, strict=True):
        try:
            columns[label] = _kept(model, input_shape, dtype, method)
        except swap.NothingMatches:
            columns[label] = stock
            unmatched.append(label)
    return Audit(types, stock, columns, tuple(unmatched))


def labels(methods: Sequence[swap.Method]) -> list[str]:
    """A label of its own for each method: options that differ from their defaults or between methods of one class; equal methods
    are numbered."""
    found = []
    for method in methods:
        same = [other for other in methods if type(other) is type(method)]
        options = [field.name for field in fields(method)] if is_dataclass(method) else []
        differ = [name for name in options if any(getattr(o, name) != getattr(method, name) for o in same)]
        found.append(swap.label(method, differ if not isinstance(method, swap.Composition) else ()))
    counts = Counter(found)
    numbers: dict[str, int] = defaultdict(int)
    for i, label in enumerate(found):
        if counts[label] > 1:
            numbers[label] += 1
            found[i] = f"{label} #{numbers[label]}"
    return found


def _kept(model: nn.Module, shape: Sequence[int], dtype: torch.dtype, method: swap.Method | None) -> dict[str, Kept]:
    with measure.fake_model(lambda: copy.deepcopy(model).to("meta")) as fake:
        if method is not None:
            swap.apply(fake, method)
        first_pass.remove_all(fake)  # the table is the answer, no warning is needed
        with Owners(fake) as owners, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = fake(torch.empty(tuple(shape)))
        sizes: dict[str, int] = defaultdict(int)
        others: dict[str, dict[str, None]] = defaultdict(dict)
        for piece in owners.pieces():
            sizes[piece.owner] += piece.tensor.untyped_storage().nbytes()
            others[piece.owner].update(dict.fromkeys(piece.others))
        del out
    return {name: Kept(size, tuple(others[name])) for name, size in sizes.items()}


def _mib(kept: Kept | None) -> str:
    return "" if kept is None else f"{kept.bytes / MIB:.2f}"


def _ratio(stock: int, other: int) -> str:
    return f"{stock / other:.2f}x" if other else "all"
