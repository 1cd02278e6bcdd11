"""Saved bytes: memory of the tensors that autograd keeps for the backward pass, on the device and offloaded to the host.

The count is exact, does not depend on the device, and works on fake tensors (measure.fake_model), where it is a prediction. It says
nothing of peak memory.

A saved_tensors_hook receives every tensor that autograd saves. Where hooks are nested, only the innermost pair receives the tensor.
Therefore hooks that are entered inside the measured code (save_on_cpu, a user's own) are wrapped when they are entered, and the value
that their pack function returns is searched for tensors:

    value returned by the innermost pack                         counted as
    a tensor on the device of the saved one                      device bytes
    save_on_cpu's copy; a tensor, array or bytes on the host     host bytes
    a checkpoint's placeholder                                   nothing: the tensor is computed again
    neither a tensor nor an object that holds one (a file name)  nothing; a warning names the hook

Host bytes are the same on every machine: on a CPU save_on_cpu copies nothing, and the bytes that it would copy from a GPU are counted.
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

OFFLOAD, CHECKPOINT = "save_on_cpu", "_checkpoint_hook"  # hooks of PyTorch that are recognized
PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    **dict.fromkeys((torch.sparse_csr, torch.sparse_bsr), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys((torch.sparse_csc, torch.sparse_bsc), ("ccol_indices", "row_indices", "values")),
}
SEARCH_DEPTH = 3  # levels of containers and objects that are searched for tensors in a hook's result


class _Saved:
    """Stands in the graph for a tensor that no other hook packs. It is freed with the graph."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor):
        # A reference to a node's own output would leak the node. detach shares the version counter.
        self.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        self.version = _version(tensor)

    def unpack(self) -> Tensor:
        if _version(self.tensor) != self.version:  # PyTorch's own check is off where hooks are active
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
    """Stands in the graph for a tensor that another hook packs."""

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
    """Context manager around a forward pass that counts the tensors its graph saves for backward.

    Each storage counts once and as a whole. Parameters and buffers of the modules that ran are not counted, nor are copies of parameters
    in another dtype, which autocast makes. Read `bytes` (on the device), `host_bytes` (offloaded) or `storages()` while the graph is
    alive. A non-reentrant checkpoint counts with its inputs alone, because it saves nothing else. A UserWarning names hooks whose result
    contains no tensor. `casts=False` also counts the dtype copies of parameters: finding them needs a dispatch mode, under which
    torch.compile does not compile. `modules=False` counts parameters and buffers too: finding them needs hooks on modules, with which
    code that nn.Module.compile made before does not run.
    """

    def __init__(self, casts: bool = True, modules: bool = True):
        self._casts, self._modules = casts, modules
        self._saved: weakref.WeakSet[_Saved | _Packed] = weakref.WeakSet()
        self._model_storages: dict[int, Any] = {}  # key -> storage; the reference keeps the key from being reused
        self._hidden: dict[str, list[int]] = defaultdict(list)  # hook -> bytes of each tensor that it hides
        self._named: set[str] = set()  # hooks that a warning has already named

    def __enter__(self) -> "SavedBytes":
        self._stack = ExitStack()
        if self._modules:
            self._stack.callback(register_module_forward_pre_hook(self._see_module).remove)
        self._stack.enter_context(saved_tensors_hooks(*self._around(active_hooks())))
        self._stack.enter_context(_each_entered_hook(self._around))
        if self._casts:
            torch.clear_autocast_cache()  # a cached copy would not be recognized
            self._stack.enter_context(_ParameterCasts(self._model_storages))
        return self

    def __exit__(self, *exception) -> None:
        self._stack.close()

    def _see_module(self, module: nn.Module, args: Any) -> None:
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"saved bytes: {type(module).__name__} was compiled in place, and its compiled code does not run under hooks on modules; "
                "allowed: SavedBytes(casts=False, modules=False), after a first step, which also counts parameters"
            )
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if is_lazy(tensor):  # no memory yet
                continue
            self._model_storages.update((storage_key(piece), piece.untyped_storage()) for piece in pieces(tensor))

    def _around(self, hooks: Hooks | None) -> Hooks:
        """Hooks that record what `hooks` return, or the tensor itself where `hooks` is None."""

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
        """Saved bytes on the device."""
        return self.count()

    @property
    def host_bytes(self) -> int:
        """Saved bytes that hooks such as save_on_cpu offload to the host."""
        self._warn_of_hidden()
        return sum(dict(size for saved in self._saved for size in saved.host_sizes()).values())

    @property
    def hidden_bytes(self) -> Mapping[str, int]:
        """Hook name -> bytes, before packing, of the tensors whose packed form contains no tensor, array or bytes."""
        return {hook: sum(sizes) for hook, sizes in self._hidden.items()}

    def count(self, also: Iterable[Tensor] = (), less: Iterable[Tensor] = ()) -> int:
        """Bytes of `storages()` on the device, plus the storages of `also`, minus those of `less`; each storage counts once."""
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
    """Adds copies of known storages in another dtype to the known ones."""

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
    """Bytes on the device that fn() saves for backward, with real or fake tensors. See SavedBytes for what counts.

    fn runs a forward pass and returns a scalar tensor; ValueError otherwise. Bytes offloaded to the host are not counted; a UserWarning
    gives their number.
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
    """Identity of a tensor's storage: equal for tensors that share memory. It may be reused after the storage is freed."""
    return tensor.untyped_storage()._cdata


def pieces(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that a tensor consists of: itself, a sparse tensor's indices and values, or the tensors that a subclass wraps."""
    if is_traceable_wrapper_subclass(tensor):
        inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        # A DTensor lists its mesh as well, which is no tensor.
        return [piece for part in inner if isinstance(part, Tensor) for piece in pieces(part)]
    if tensor.layout == torch.strided:
        return [tensor]
    return [getattr(tensor, name)() for name in PARTS.get(tensor.layout, ())]


def active_hooks() -> Hooks | None:
    """The innermost hooks on saved tensors that are active now, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def hook_name(pack: Callable) -> str:
    """Display name of the hook that `pack` belongs to: OFFLOAD or CHECKPOINT for PyTorch's own, otherwise the function's qualified name,
    such as "make_hooks.<locals>.pack". Where a SavedBytes wraps a hook, the name of the wrapped one."""
    while (around := getattr(pack, "around", None)) is not None:
        pack = around[0]
    name = getattr(pack, "__qualname__", type(pack).__qualname__)
    known = {"torch.autograd.graph": OFFLOAD, "torch.utils.checkpoint": CHECKPOINT}.get(
        getattr(pack, "__module__", None) or ""
    )
    return known if known and name.startswith(f"{known}.") else name


@contextmanager
def _each_entered_hook(around: Callable[[Hooks], Hooks]) -> Iterator[None]:
    """Inside this context, hooks on saved tensors that any code enters are replaced by around(hooks)."""
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
    """Tensors, arrays and bytes in a hook's result: the value itself, or members of a container, an object or a closure."""
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
