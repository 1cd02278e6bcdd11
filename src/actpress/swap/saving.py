"""What a method saves in one model, measured: bytes saved for backward before and after, and what stayed dense.

    with a sample input      a training forward pass of a copy before, and one after: exact, module by module
    without                  the first training forward pass of the model itself is watched, once. What is saved is then exact; what
                             stock layers would have kept is estimated from the inputs and outputs that the replaced ones saw

The watch says nothing about passes whose tensors other hooks keep (checkpointing, offloading), see first_pass.py for when it waits.
"""

import copy
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from actpress.layers import Extended, applied
from actpress.measure.saved import SavedBytes, active_hooks, pieces, storage_key
from actpress.swap import first_pass
from actpress.swap.state import has_started, is_compiled, set_epoch, start_epoch

MIB = 2**20
NAMED = 4  # dense types that a warning names

PRODUCTS = (nn.Linear, _ConvNd)  # save their input, in autocast's dtype, where the weight is trained
KEEP_OUTPUT = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh, nn.Softmax)
MAX_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)  # save their input and an int64 for each output


class Inputs(NamedTuple):
    """How a model is called."""

    args: tuple
    kwargs: Mapping[str, Any]

    @classmethod
    def of(cls, sample: Any) -> "Inputs":
        """A tensor, a tuple of arguments, or a dict of keyword arguments. Raises ValueError for others."""
        if isinstance(sample, Tensor):
            return cls((sample,), {})
        if isinstance(sample, tuple):
            return cls(sample, {})
        if isinstance(sample, Mapping):
            return cls((), sample)
        raise ValueError(
            f"sample is a {type(sample).__name__}, allowed: a tensor, a tuple of arguments, a dict of keywords"
        )

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


class Piece(NamedTuple):
    """One storage that is saved for backward."""

    owner: str  # the module that was running when it was saved first, "" for the model itself
    others: tuple[str, ...]  # modules that saved it later
    tensor: Tensor


class Owners(SavedBytes):
    """SavedBytes that knows which module was running when a tensor was saved."""

    def __init__(self, model: nn.Module, casts: bool = True):
        super().__init__(casts)
        self._names = {module: name for name, module in model.named_modules()}
        self._running = [""]
        self._owner: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()

    def __enter__(self) -> "Owners":
        super().__enter__()
        self._stack.callback(register_module_forward_hook(self._leave, always_call=True).remove)
        return self

    def _see_module(self, module: nn.Module, args: Any) -> None:
        super()._see_module(module, args)
        self._running.append(self._names.get(module, self._running[-1]))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if len(self._running) > 1:  # the model itself may have been entered before
            self._running.pop()

    def _note(self, saved: Any) -> None:
        super()._note(saved)
        self._owner[saved] = self._running[-1]

    def pieces(self) -> list[Piece]:
        """What is saved on the device; a storage belongs to the first module that saved it."""
        readers: dict[int, list[str]] = defaultdict(list)
        for saved, name in self._owner.items():
            for tensor in saved.device_tensors():
                readers[storage_key(tensor)].append(name)
        found = []
        for key, tensor in self.storages().items():
            first, *rest = readers[key]
            found.append(Piece(first, tuple(dict.fromkeys(name for name in rest if name != first)), tensor))
        return found


class Dense(NamedTuple):
    """What stayed as stock PyTorch saves it, of one type of module."""

    type: str
    bytes: int
    share: float  # of all bytes that are saved under the method


@dataclass(frozen=True)
class Saving:
    """Bytes saved for backward by the modules of a model, "" being the model itself, stock and under a method."""

    method: str
    before: Mapping[str, int]
    after: Mapping[str, int]
    types: Mapping[str, str]  # name -> stock type
    dense: Sequence[Dense]  # the largest first
    estimated: bool = False  # `before` is an estimate

    @property
    def saved_before(self) -> int:
        return sum(self.before.values())

    @property
    def saved_after(self) -> int:
        return sum(self.after.values())

    @property
    def ratio(self) -> float:
        """How many times less is saved; inf where nothing is."""
        return self.saved_before / self.saved_after if self.saved_after else float("inf")

    def table(self, groups: Mapping[str, str], counts: Mapping[str, int]) -> str:
        """Text: a line for each group of modules with bytes before and after. groups: name -> group."""
        sizes: dict[str, list[int]] = {group: [0, 0] for group in counts}
        for column, kept in enumerate((self.before, self.after)):
            for name, size in kept.items():
                group = groups.get(name, f"functions and operations in {self.types[name]}")
                sizes.setdefault(group, [0, 0])[column] += size
        rows = [
            [counts.get(group, ""), group, *(_mib(size) for size in pair)]
            for group, pair in sorted(sizes.items(), key=lambda item: -max(item[1]))
        ]
        rows.append(["", "total", _mib(self.saved_before), _mib(self.saved_after)])
        head = ["", "", "kept before, MiB", "after, MiB"]
        text = tabulate(rows, head, disable_numparse=True, colalign=("right", "left", "right", "right"))
        return f"{text}\n{self.summary()}"

    def summary(self) -> str:
        """One or two lines: what the method saves, and what stayed dense."""
        saved = 1 - self.saved_after / self.saved_before if self.saved_before else 0.0
        share = f"{'about ' if self.estimated else ''}{saved:.0%}" if saved > 0 else "none"
        text = (
            f"{self.method} saves {share} of the bytes kept for backward: "
            f"{readable(self.saved_before)} -> {readable(self.saved_after)}, {times_less(self.ratio)}"
        )
        largest = ", ".join(f"{item.type} {readable(item.bytes)} ({item.share:.0%})" for item in self.dense[:NAMED])
        return text + (f"\nstayed dense, share of what is kept: {largest}" if largest else "")

    def warn_below(self, worth: float) -> None:
        """A UserWarning where stock PyTorch would save fewer than `worth` times the method's bytes."""
        if self.ratio < worth:
            warnings.warn(f"actpress: {self.summary()}", stacklevel=3)


class Kept(NamedTuple):
    """What one forward pass keeps."""

    bytes: dict[str, int]  # module name -> bytes
    dense: dict[str, int]  # stock type -> bytes that no method touched


def kept(model: nn.Module, inputs: Inputs) -> Kept:
    """Of a training forward pass of a copy of the model; the model and the state of random generators are left alone."""
    if is_compiled(model):
        raise ValueError("what a compiled model saves is not measured with a sample: its copies are not compiled")
    twin = copy.deepcopy(model).train()
    first_pass.remove_all(twin)
    set_epoch(twin, start_epoch(twin))  # as it is once all of it has started
    with torch.random.fork_rng(), torch.enable_grad():
        return kept_by(twin, lambda: inputs.call(twin))


def kept_by(model: nn.Module, forward: Callable[[], Any]) -> Kept:
    """Of forward(), which runs the model."""
    with Owners(model) as owners:
        output = forward()
    found = _kept(owners.pieces(), dict(model.named_modules()))
    del output
    return found


def compare(model: nn.Module, inputs: Inputs, method: str, before: Kept) -> Saving:
    """before: of the model without the method; `model` has it now."""
    after = kept(model, inputs)
    return Saving(method, before.bytes, after.bytes, _types(model), dense_items(after))


def dense_items(found: Kept) -> list[Dense]:
    total = sum(found.bytes.values())
    ordered = sorted(found.dense.items(), key=lambda item: -item[1])
    return [Dense(name, size, size / total) for name, size in ordered]


def watch(model: nn.Module, method: str, worth: float) -> None:
    """Warn once, after the first training forward pass, where stock PyTorch would save fewer than `worth` times the method's bytes.

    Of several methods applied to one model before that pass, the sum is watched.
    """
    earlier = [found for found in first_pass.watches(model) if isinstance(found, _Watch)]
    first_pass.remove(model, _Watch)
    method = " + ".join([*(found.method for found in earlier), method])
    _Watch(method, max([worth, *(found.worth for found in earlier)])).attach(model)


class _Watch(first_pass.FirstPass):
    def __init__(self, method: str, worth: float):
        super().__init__()
        self.method, self.worth = method, worth
        self.owners: _Estimate | None = None

    def wants(self, model: nn.Module) -> bool:
        hooks = active_hooks()
        free = hooks is None or isinstance(_measuring(hooks[0]), SavedBytes)
        whole = all(len(pieces(p)) == 1 and pieces(p)[0] is p for p in model.parameters())  # no shards
        plain = whole and not any(is_lazy(p) for p in model.parameters())
        return free and has_started(model) and plain and torch._C._autograd._saved_tensors_hooks_is_enabled()

    def start(self, model: nn.Module) -> None:
        self.owners = _Estimate(model)
        self.owners.__enter__()

    def finish(self, model: nn.Module, completed: bool) -> None:
        owners, self.owners = self.owners, None
        owners.__exit__()
        if completed and not owners.others:
            found = _kept(owners.pieces(), dict(model.named_modules()))
            if found.bytes:
                before = {"": owners.stock_bytes()}
                Saving(self.method, before, found.bytes, _types(model), dense_items(found), True).warn_below(self.worth)


class _Estimate(Owners):
    """Owners that also estimates what the replaced modules would keep if they were stock."""

    def __init__(self, model: nn.Module):
        super().__init__(model, casts=False)
        self.others = False  # do hooks inside the model keep tensors?
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._lost = 0  # bytes of storages that are gone, as they would not be in the stock model

    def __enter__(self) -> "_Estimate":
        super().__enter__()
        self._stack.callback(register_module_forward_hook(self._see_output).remove)
        return self

    def _around(self, hooks: Any) -> Any:
        self.others |= hooks is not None and not isinstance(_measuring(hooks[0]), SavedBytes)
        return super()._around(hooks)

    def _see_module(self, module: nn.Module, args: Any) -> None:
        super()._see_module(module, args)
        note = applied.of(module)
        if note is None or note.swap is None or issubclass(note.stock, (*KEEP_OUTPUT, _DropoutNd)):
            return
        product = issubclass(note.stock, PRODUCTS)
        for x in tree_leaves(args):
            if isinstance(x, Tensor) and x.is_floating_point():
                weight = module._parameters.get("weight")  # not one that a parametrization computes, each time anew
                trained = not product or weight is None or weight.requires_grad
                if trained and (x.requires_grad or any(p.requires_grad for p in module.parameters(recurse=False))):
                    self._see(x, _autocast_itemsize(x) if product else x.itemsize)

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        note = applied.of(module)
        if note is None or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if issubclass(note.stock, KEEP_OUTPUT):
            self._see(output, output.itemsize)
        elif issubclass(note.stock, _DropoutNd) and module.training and module.p > 0:
            self._lost += output.numel() * (1 if output.is_cuda else output.itemsize)  # the mask
        elif issubclass(note.stock, MAX_POOLS):
            self._lost += output.numel() * 8

    def _see(self, x: Tensor, itemsize: int) -> None:
        for piece in pieces(x):
            key, storage = storage_key(piece), piece.untyped_storage()
            known = self._seen.get(key)
            if known is not None:
                if not known[0].expired():
                    continue
                self._lost += known[1]
            size = storage.nbytes() if itemsize == x.itemsize else piece.numel() * itemsize  # autocast keeps a copy
            self._seen[key] = (StorageWeakRef(storage), size)

    def stock_bytes(self) -> int:
        """What is saved dense now, and what the replaced modules read."""
        modules = {name: module for module, name in self._names.items()}
        live = {key for key, (reference, _) in self._seen.items() if not reference.expired()}
        dense = (
            piece.tensor
            for piece in self.pieces()
            if storage_key(piece.tensor) not in live
            and any(_is_dense(piece._replace(owner=name), modules) for name in (piece.owner, *piece.others))
        )
        seen = sum(size for _, size in self._seen.values())
        return self._lost + seen + sum(tensor.untyped_storage().nbytes() for tensor in dense)


def _measuring(pack: Any) -> Any:
    """The SavedBytes whose hook `pack` is, if it is one's."""
    cells = getattr(pack, "__closure__", None) or ()
    return next((c.cell_contents for c in cells if isinstance(c.cell_contents, SavedBytes)), None)


def _is_dense(piece: Piece, modules: Mapping[str, nn.Module]) -> bool:
    """Replaced modules keep codes. Those of which functions were replaced keep codes in integers, and other tensors; a library's layer,
    which keeps its own forward, may compute its weight (weight standardisation), and stock PyTorch saves that too."""
    module, tensor = modules[piece.owner], piece.tensor
    note = applied.of(module)
    if note is None:
        return True
    if isinstance(module, Extended):
        sizes = {p.numel() for p in module.parameters(recurse=False) if p.dim() > 1}
        return tensor.is_floating_point() and tensor.numel() in sizes
    return note.swap is None and tensor.is_floating_point()


def _kept(found: Iterable[Piece], modules: Mapping[str, nn.Module]) -> Kept:
    sizes, dense = defaultdict(int), defaultdict(int)
    for piece in found:
        size = piece.tensor.untyped_storage().nbytes()
        sizes[piece.owner] += size
        if _is_dense(piece, modules):
            dense[_dense_type(modules[piece.owner])] += size
    return Kept(dict(sizes), dict(dense))


def _dense_type(module: nn.Module) -> str:
    if isinstance(module, Extended):
        return f"weights computed by {_stock_type(module)}"
    leaf = next(module.children(), None) is None
    return _stock_type(module) if leaf else f"operations in {_stock_type(module)}"


def _stock_type(module: nn.Module) -> str:
    note = applied.of(module)
    return applied.type_name(type(module) if note is None else note.stock)


def _types(model: nn.Module) -> dict[str, str]:
    return {name: _stock_type(module) for name, module in model.named_modules()}


def _autocast_itemsize(x: Tensor) -> int:
    device = x.device.type
    cast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device).itemsize if cast else x.itemsize


def _mib(size: int) -> str:
    return f"{size / MIB:.2f}"


def times_less(ratio: float) -> str:
    """Text: how many times fewer bytes are saved on the device."""
    return f"{ratio:.2f}x less" if ratio < float("inf") else "nothing on the device"


def readable(size: int) -> str:
    """Bytes in MiB, or in KiB below one."""
    return f"{size / MIB:.2f} MiB" if size >= MIB else f"{size / 1024:.1f} KiB"
