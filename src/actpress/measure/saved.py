"""Saved bytes: what a graph keeps for the backward pass, on the device and offloaded to the host.

A saved_tensors_hook sees every tensor that autograd saves. Of nested hooks only the innermost pair sees a tensor, so hooks that are
entered inside the measured code (save_on_cpu, a user's own) are wrapped as they are entered, and what they return is searched for tensors.

    what the innermost hook returns                              counted as
    a tensor on the device of the saved one                      device bytes
    save_on_cpu's copy; a tensor, array or bytes on the host     host bytes
    a checkpoint's placeholder                                   nothing: the tensor is computed again
    neither a tensor nor an object that holds one (a file name)  nothing, and a warning names the hook

Host bytes do not depend on the machine: where the tensors are on the CPU already, save_on_cpu copies nothing, and what it would copy
from a GPU is counted.
"""

import types
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

Hooks = tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]  # pack, unpack

OFFLOAD, CHECKPOINT = "save_on_cpu", "_checkpoint_hook"  # PyTorch's own hooks that are known here
PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
SEARCH_DEPTH = 3  # levels of containers and objects in which a hook's result is searched for tensors


class _Saved:
    """What the graph holds in place of a saved tensor; it dies with the graph."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor):
        # holding a node's output would leak the node; detach shares the version counter
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = _version(tensor)

    def unpack(self) -> Tensor:
        if _version(self.tensor) != self.version:  # hooks switch PyTorch's own check off
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tuple(self.tensor.shape)}, version {_version(self.tensor)}, expected version {self.version}"
            )
        return self.tensor

    def device_tensors(self) -> list[Tensor]:
        return pieces(self.tensor)

    def host_sizes(self) -> Iterator[tuple[Any, int]]:
        return iter(())


class _Packed:
    """What the graph holds where another hook packed the tensor."""

    __slots__ = ("__weakref__", "hook", "hook_unpack", "on_device", "on_host", "packed", "shared")

    def __init__(self, tensor: Tensor, hooks: Hooks):
        pack, self.hook_unpack = hooks
        self.hook, self.packed = hook_name(pack), pack(tensor)
        held = () if self.hook == CHECKPOINT else _held(self.packed, SEARCH_DEPTH)
        found = [piece for part in held for piece in (pieces(part) if isinstance(part, Tensor) else [part])]
        device = tensor.device.type
        moved = [self.hook == OFFLOAD or not isinstance(part, Tensor) or part.device.type != device for part in found]
        self.on_device = [part for part, is_moved in zip(found, moved, strict=True) if not is_moved]
        self.on_host = [part for part, is_moved in zip(found, moved, strict=True) if is_moved]
        keys = set(map(storage_key, pieces(tensor)))
        self.shared = self.hook == OFFLOAD and any(storage_key(part) in keys for part in self.on_host)

    def unpack(self) -> Tensor:
        return self.hook_unpack(self.packed)

    def device_tensors(self) -> list[Tensor]:
        return self.on_device

    def host_sizes(self) -> Iterator[tuple[Any, int]]:
        """(identity, bytes) of each piece of host memory."""
        for part in self.on_host:
            if self.shared:
                yield id(self), part.nbytes
            elif isinstance(part, Tensor):
                yield storage_key(part), part.untyped_storage().nbytes()
            else:
                yield id(part), part.nbytes if isinstance(part, np.ndarray) else len(part)


class SavedBytes:
    """Context manager around a forward pass: the tensors its graph keeps for backward.

    Unique storages, whole; parameters and buffers of the modules that ran, and copies of parameters in another dtype (autocast's),
    are left out. Read `bytes` (on the device), `host_bytes` (offloaded) or `storages()` while the graph is alive. Counts nothing
    inside non-reentrant checkpoints but their inputs, as nothing else is kept. A UserWarning names hooks whose result shows no tensor.
    `casts=False` leaves out the search for cast parameters, which needs a dispatch mode; torch.compile does not compile under one.
    """

    def __init__(self, casts: bool = True):
        self._casts = casts
        self._saved: weakref.WeakSet[_Saved | _Packed] = weakref.WeakSet()
        self._model_storages: dict[int, Any] = {}  # key -> storage, held so that keys are not reused
        self._hidden: dict[str, list[int]] = defaultdict(list)  # hook -> bytes of each tensor that it hides
        self._named: set[str] = set()  # hooks that a warning has named

    def __enter__(self) -> "SavedBytes":
        self._stack = ExitStack()
        self._stack.callback(register_module_forward_pre_hook(self._see_module).remove)
        self._stack.enter_context(saved_tensors_hooks(*self._around(active_hooks())))
        self._stack.enter_context(_each_entered_hook(self._around))
        if self._casts:
            torch.clear_autocast_cache()  # a copy made earlier would go unseen
            self._stack.enter_context(_ParameterCasts(self._model_storages))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _see_module(self, module: nn.Module, args: Any) -> None:
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if is_lazy(tensor):  # no memory yet
                continue
            self._model_storages.update((storage_key(piece), piece.untyped_storage()) for piece in pieces(tensor))

    def _around(self, hooks: Hooks | None) -> Hooks:
        """Hooks that note what `hooks` keep, or what the graph keeps where there are none."""

        def pack(tensor: Tensor) -> _Saved | _Packed:
            if hooks is None:
                saved = _Saved(tensor)
            else:
                saved = _Packed(tensor, hooks)
                if any(storage_key(piece) in self._model_storages for piece in pieces(tensor)):  # a copy of a parameter
                    return saved
                if not (saved.on_device or saved.on_host or saved.hook == CHECKPOINT or tensor.numel() == 0):
                    self._hidden[saved.hook].append(tensor.nbytes)
            self._note(saved)
            return saved

        pack.around = hooks
        return pack, lambda saved: saved.unpack()

    def _note(self, saved: "_Saved | _Packed") -> None:
        self._saved.add(saved)

    def storages(self) -> dict[int, Tensor]:
        """One saved tensor for each unique storage on the device."""
        self._warn_of_hidden()
        kept = {storage_key(tensor): tensor for saved in self._saved for tensor in saved.device_tensors()}
        return {key: tensor for key, tensor in kept.items() if key not in self._model_storages}

    @property
    def bytes(self) -> int:
        """On the device."""
        return self.count()

    @property
    def host_bytes(self) -> int:
        """Offloaded to the host by hooks, as save_on_cpu does."""
        self._warn_of_hidden()
        return sum(dict(size for saved in self._saved for size in saved.host_sizes()).values())

    @property
    def hidden_bytes(self) -> Mapping[str, int]:
        """Hook -> bytes of the tensors, before packing, that it keeps where the ruler cannot see them."""
        return {hook: sum(sizes) for hook, sizes in self._hidden.items()}

    def count(self, also: Iterable[Tensor] = (), less: Iterable[Tensor] = ()) -> int:
        """Bytes of the storages, with those of `also` (each once) and without those of `less`."""
        counted = self.storages() | {storage_key(tensor): tensor for tensor in also}
        left_out = {storage_key(tensor) for tensor in less}
        return sum(tensor.untyped_storage().nbytes() for key, tensor in counted.items() if key not in left_out)

    def _warn_of_hidden(self) -> None:
        named, self._named = self._named, set(self._hidden)
        for hook, sizes in self._hidden.items():
            if hook in named:
                continue
            warnings.warn(
                f"{hook} hides what it keeps of {len(sizes)} saved tensors, {sum(sizes)} bytes before packing: not counted",
                stacklevel=4,
            )


class _ParameterCasts(TorchDispatchMode):
    """Marks copies of known storages in another dtype as known too."""

    def __init__(self, known: dict[int, Any]):
        super().__init__()
        self._known = known

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            known = any(storage_key(piece) in self._known for piece in pieces(args[0]))
            self._known.update((storage_key(piece), piece.untyped_storage()) for piece in pieces(out) if known)
        return out


def saved_bytes(fn: Callable[[], Tensor]) -> int:
    """Bytes kept on the device for backward by fn, a forward pass that returns a scalar; real or fake tensors. See SavedBytes.

    A UserWarning names what is offloaded to the host: it is not counted.
    """
    with SavedBytes() as saved:
        loss = fn()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"fn must return a scalar tensor, got {got}")
    if saved.host_bytes:
        warnings.warn(
            f"saved_bytes counts the device; {saved.host_bytes} bytes more are offloaded to the host "
            "(SavedBytes has both: bytes, host_bytes)",
            stacklevel=2,
        )
    return saved.bytes


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share their memory; reused once the memory is gone."""
    return tensor.untyped_storage()._cdata


def pieces(tensor: Tensor) -> list[Tensor]:
    """The tensors with memory of their own that a tensor consists of: itself; indices and values; what a subclass wraps."""
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [
            piece for part in inner if isinstance(part, Tensor) for piece in pieces(part)
        ]  # a DTensor names its mesh too
    if tensor.layout == torch.strided:
        return [tensor]
    return [getattr(tensor, name)() for name in PARTS.get(tensor.layout, ())]


def active_hooks() -> Hooks | None:
    """The hooks on saved tensors that PyTorch would use now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def hook_name(pack: Callable) -> str:
    """The name of PyTorch's own context where `pack` is from one, else the function's: "make_hooks.<locals>.pack"; of the hook that
    a SavedBytes measures, where `pack` is a SavedBytes's."""
    while (around := getattr(pack, "around", None)) is not None:
        pack = around[0]
    name = getattr(pack, "__qualname__", type(pack).__qualname__)
    known = {"torch.autograd.graph": OFFLOAD, "torch.utils.checkpoint": CHECKPOINT}.get(
        getattr(pack, "__module__", None) or ""
    )
    return known if known and name.startswith(f"{known}.") else name


@contextmanager
def _each_entered_hook(around: Callable[[Hooks], Hooks]) -> Iterator[None]:
    """While open, hooks on saved tensors that any code enters are replaced by around(hooks)."""
    enter = saved_tensors_hooks.__enter__

    def enter_wrapped(context: Any) -> Any:
        compiled = isinstance(context.pack_hook, torch.fx.GraphModule)  # inlined by the compiler
        hooks = (context.pack_hook, context.unpack_hook)
        pack, unpack = hooks if compiled else around(hooks)
        return enter(types.SimpleNamespace(pack_hook=pack, unpack_hook=unpack))

    saved_tensors_hooks.__enter__ = enter_wrapped
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter


def _held(value: Any, depth: int) -> Iterator[Any]:
    """Tensors, arrays and bytes in what a hook returned: itself, or held by a container, an object, a closure."""
    if isinstance(value, Tensor | np.ndarray | bytes | bytearray):
        yield value
    elif isinstance(value, _Saved | _Packed):  # of a SavedBytes inside this one
        yield from value.device_tensors() + (value.on_host if isinstance(value, _Packed) else [])
    elif depth and not isinstance(value, type | types.ModuleType):
        for part in _members(value):
            yield from _held(part, depth - 1)


def _members(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, partial):
        return [*value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        return [cell.cell_contents for cell in value.__closure__ or ()]
    slots = (name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()))
    held = [getattr(value, name) for name in slots if not name.startswith("__") and hasattr(value, name)]
    return held + list(getattr(value, "__dict__", {}).values())


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
