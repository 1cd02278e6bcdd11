"""actpress.audit: the bytes that each module saves for backward, stock and under each method.

The model runs once with fake tensors, which takes seconds and no memory at any size, and once more for each method. A tensor that several
modules save counts for the first of them, and the table names the others. Such a tensor stays alive until every one of them releases it,
so compressing one of the layers may not lower memory.
"""

import copy
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch
from tabulate import tabulate
from torch import nn

from actpress import swap
from actpress.measure.predict import check_predictable, fake_model
from actpress.swap import first_pass
from actpress.swap.saving import Owners

MIB = 2**20


@dataclass(frozen=True)
class Saved:
    """What one module saves for backward."""

    bytes: int
    also_saved_by: tuple[str, ...] = ()  # other modules that save some of the same tensors


@dataclass(frozen=True)
class Audit:
    """Saved bytes by module name. The name "" stands for the model itself: code outside its submodules."""

    types: dict[str, str]  # module name -> its stock type
    stock: dict[str, Saved]
    methods: dict[str, dict[str, Saved]]  # method label -> the same under the method
    unmatched: tuple[str, ...] = ()  # labels of methods that match nothing in the model; their bytes are the stock ones

    def total(self, method: str | None = None) -> int:
        """Bytes that the whole model saves for backward, stock or under the method with the label `method`."""
        saved = self.stock if method is None else self.methods[method]
        return sum(item.bytes for item in saved.values())

    def table(self, top: int | None = None) -> str:
        """Text table: a line for each of the `top` largest modules (None: all), then totals."""
        names = sorted(
            {*self.stock, *(name for saved in self.methods.values() for name in saved)}, key=self._size, reverse=True
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
            notes = ["matches nothing" if label in self.unmatched else "" for label in self.methods]
            rows.append(["", "", "", *notes])
        head = ["module", "type", "stock MiB", *(f"{name} MiB" for name in self.methods), "stock tensor also kept by"]
        return tabulate(rows, head, disable_numparse=True, colalign=("left", "left", *["right"] * len(columns), "left"))

    def __str__(self) -> str:
        return self.table()

    def _size(self, name: str) -> int:
        return max(saved[name].bytes for saved in (self.stock, *self.methods.values()) if name in saved)

    def _shared(self, name: str) -> str:
        return ", ".join(self.stock[name].also_saved_by) if name in self.stock else ""


def audit(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    methods: Sequence[swap.Method] = (),
) -> Audit:
    """Predict the bytes that each module of `model` saves for backward, stock and under each of `methods`.

    input_shape includes the batch, e.g. (64, 3, 224, 224). dtype: float32, or bfloat16 or float16 for autocast; ValueError for others.
    The model must return a tensor, or a tuple or dict of tensors; it is copied and does not change. The column of a method that matches
    nothing in the model says so.
    """
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        raise ValueError(f"audit: dtype={dtype}, allowed: {', '.join(map(str, allowed))}")
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    stock = _saved_by_module(model, input_shape, dtype, None)
    columns, unmatched = {}, []
    for label, method in zip(labels(methods), methods, strict=True):
        try:
            columns[label] = _saved_by_module(model, input_shape, dtype, method)
        except swap.NothingMatches:
            columns[label] = stock
            unmatched.append(label)
    return Audit(types, stock, columns, tuple(unmatched))


def labels(methods: Sequence[swap.Method]) -> list[str]:
    """A unique label for each method. It shows the options that differ from their defaults or between methods of the same class; equal
    methods are numbered."""
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


def _saved_by_module(
    model: nn.Module, shape: Sequence[int], dtype: torch.dtype, method: swap.Method | None
) -> dict[str, Saved]:
    with fake_model(lambda: copy.deepcopy(model).to("meta")) as fake:
        if method is not None:
            swap.apply(fake, method)
            check_predictable(fake, method)
        first_pass.remove_all(fake)  # the table replaces the warning of the first pass
        with Owners(fake) as owners, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = fake(torch.empty(tuple(shape)))
        sizes: dict[str, int] = defaultdict(int)
        others: dict[str, dict[str, None]] = defaultdict(dict)
        for piece in owners.pieces():
            sizes[piece.owner] += piece.tensor.untyped_storage().nbytes()
            others[piece.owner].update(dict.fromkeys(piece.others))
        del out
    return {name: Saved(size, tuple(others[name])) for name, size in sizes.items()}


def _mib(saved: Saved | None) -> str:
    return "" if saved is None else f"{saved.bytes / MIB:.2f}"


def _ratio(stock: int, other: int) -> str:
    return f"{stock / other:.2f}x" if other else "all"
