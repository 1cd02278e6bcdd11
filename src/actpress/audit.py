"""What holds my activations, and what would each method save?

Runs the model once with fake tensors (no memory, seconds at any size), names for every module the tensors its graph keeps for
backward, and does the same under each method. A tensor kept by several modules counts for the first; the others are named beside it,
since it stays alive until all of them let go: that is why memory may not drop when one layer is compressed.
"""

import copy
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from actpress import measure, swap

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
    methods: dict[str, dict[str, Kept]]  # method -> the same under it

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
        rows.append(["total", "", *(f"{sum(item.bytes for item in c.values()) / MIB:.2f}" for c in columns)])
        rows.append(["compression", "", *(_ratio(self.total(), sum(i.bytes for i in c.values())) for c in columns)])
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
    return a tensor, or a tuple or dict of tensors. Raises ValueError for other dtypes, and if a method matches no module.
    """
    allowed = (torch.float32, torch.bfloat16, torch.float16)
    if dtype not in allowed:
        raise ValueError(f"audit: dtype={dtype}, allowed: {', '.join(map(str, allowed))}")
    types = {name: type(module).__name__ for name, module in model.named_modules()}
    stock = _kept(model, input_shape, dtype, None)
    return Audit(types, stock, {_label(method): _kept(model, input_shape, dtype, method) for method in methods})


def _kept(model: nn.Module, shape: Sequence[int], dtype: torch.dtype, method: swap.Method | None) -> dict[str, Kept]:
    with measure.fake_model(lambda: copy.deepcopy(model).to("meta")) as fake:
        if method is not None:
            swap.apply(fake, method)
        with _Owners(fake) as owners, torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = fake(torch.empty(tuple(shape)))
        result = owners.kept()
        del out
    return result


class _Owners(measure.SavedBytes):
    """SavedBytes that knows which module was running when a tensor was saved."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._running = [""]
        self._owner: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    def __enter__(self) -> "_Owners":
        super().__enter__()
        self._stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
        return self

    def _see_module(self, module: nn.Module, args: Any) -> None:
        super()._see_module(module, args)
        self._running.append(self._names.get(module, self._running[-1]))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _pack(self, tensor: Tensor) -> Any:
        saved = super()._pack(tensor)
        self._owner[saved] = self._running[-1]
        return saved

    def kept(self) -> dict[str, Kept]:
        """Module name -> what it keeps; a storage goes to the first module that saved it."""
        readers: dict[int, list[str]] = defaultdict(list)
        for saved, name in self._owner.items():
            readers[measure.storage_key(saved.tensor)].append(name)
        sizes: dict[str, int] = defaultdict(int)
        others: dict[str, dict[str, None]] = defaultdict(dict)
        for key, tensor in self.storages().items():
            first, *rest = readers[key]
            sizes[first] += tensor.untyped_storage().nbytes()
            others[first].update(dict.fromkeys(name for name in rest if name != first))
        return {name: Kept(size, tuple(others[name])) for name, size in sizes.items()}


def _label(method: swap.Method) -> str:
    return type(method).__name__


def _mib(kept: Kept | None) -> str:
    return "" if kept is None else f"{kept.bytes / MIB:.2f}"


def _ratio(stock: int, other: int) -> str:
    return f"{stock / other:.2f}x" if other else "all"
