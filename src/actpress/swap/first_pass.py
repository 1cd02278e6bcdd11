"""Watching a model once: hooks that run around its first training forward pass in eager mode, and then are gone.

A pass does not count, and the watch waits for the next, in evaluation or without gradients; while torch.compile, torch.jit or torch.func
look into the model; while a CUDA graph is captured; on the meta device; in models with compiled parts, whose hooks would be compiled with
them; and in another thread while one is watched.

PyTorch calls no hook after an exception such as KeyboardInterrupt. So the watched pass gets its arguments as a _Guard, which ends the watch
when nothing holds it any more; `end_all` ends those that are left.
"""

import threading
import weakref
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
HOOK_OPTIONS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


_open: "weakref.WeakSet[FirstPass]" = weakref.WeakSet()  # watches of a pass that has not ended


class _Guard(tuple):
    """The positional arguments of the watched pass. Freeing them ends the watch. The pass holds them until it returns or raises."""

    def __new__(cls, args: tuple, watch: "FirstPass"):
        guard = super().__new__(cls, args)
        guard.watch, guard.inner = watch, args  # a guard that this one takes the place of must live on
        return guard

    def __del__(self):
        self.watch.close(completed=False)


class FirstPass:
    """Base of watches. Hooks are bound methods of this object, so that a watched model can be copied and pickled."""

    def __init__(self):
        self.thread: int | None = None  # in which a pass is watched
        self.on_model: list[Any] = []
        self.during: list[Any] = []  # handles of hooks for the watched pass alone
        self.names: dict[nn.Module, str] = {}  # of the modules, while a pass is watched

    def attach(self, model: nn.Module) -> None:
        self.on_model = [
            model.register_forward_pre_hook(self.begin),
            model.register_forward_hook(self.end, always_call=True),
        ]

    def wants(self, model: nn.Module) -> bool:
        """Whether this pass can be watched."""
        return True

    def start(self, model: nn.Module) -> None:
        """Put hooks on the modules in self.names, into self.during."""
        raise NotImplementedError

    def finish(self, model: nn.Module, completed: bool) -> None:
        """The hooks are gone; completed: the forward pass raised nothing."""
        raise NotImplementedError

    def begin(self, model: nn.Module, args: tuple) -> tuple | None:
        if _is_traced() or self.names or not (model.training and torch.is_grad_enabled()):
            return None
        if (
            _has_compiled_parts(model)
            or any(p.device.type == "meta" for p in model.parameters())
            or not self.wants(model)
        ):
            return None
        self.thread, self.names = threading.get_ident(), {module: name for name, module in model.named_modules()}
        _open.add(self)
        self.start(model)
        return _Guard(args, self)

    def end(self, model: nn.Module, args: Any, y: Any) -> None:
        if not _is_traced():
            self.close(completed=y is not None)  # a forward pass that raised is not counted, the next one is

    def close(self, completed: bool) -> None:
        """End the watch of this pass. Does nothing where no pass is watched, or one in another thread."""
        if not self.names or self.thread != threading.get_ident():
            return
        for handle in (
            *self.during,
            *(self.on_model if completed else ()),
        ):  # PyTorch iterates over on_model's where it raised
            handle.remove()
        self.during = []
        _open.discard(self)
        model = next(iter(self.names))
        self.finish(model, completed)
        self.names = {}


def end_all() -> None:
    """End the watches that interrupted passes left open in this thread. For use outside of forward passes only."""
    for watch in list(_open):
        watch.close(completed=False)


def watches(module: nn.Module) -> "list[FirstPass]":
    """Those on one module that have not ended."""
    owners = (getattr(hook, "__self__", None) for hook in module._forward_hooks.values())
    return [owner for owner in owners if isinstance(owner, FirstPass)]


def remove(module: nn.Module, kind: type[FirstPass] = FirstPass) -> None:
    """Take the watches of a kind off one module."""
    for hooks in (getattr(module, name) for name in HOOKS):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), kind)]:
            for other in (*HOOKS, *HOOK_OPTIONS):
                getattr(module, other).pop(key, None)


def remove_all(model: nn.Module) -> None:
    for module in model.modules():
        remove(module)


def _is_traced() -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _has_compiled_parts(model: nn.Module) -> bool:
    # by its name: importing torch._dynamo takes seconds
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )
