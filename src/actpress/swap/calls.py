"""Which functions a module calls by itself (F.relu in its forward), read from its source.

Names are resolved as Python would: `F.relu`, `torch.relu`, `from torch.nn.functional import relu as act`, an alias in the file or in the
function, a function that the module holds (`self.act = F.relu`), a default argument. The reader follows the module's own methods
(self.attend(x), super().forward(x)) and plain functions of other libraries. A method of an unknown object (`x.relu()`) counts by its name.
What cannot be read (C, code built at run time) is named, so that a report can say it.
"""

import ast
import builtins
import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from actpress.layers import LAYERS

# Functions that keep a dense tensor for backward, by name, however they are reached (F.x, torch.x, tensor.x).
ACTIVATIONS = (
    "relu relu_ relu6 leaky_relu leaky_relu_ prelu rrelu rrelu_ elu elu_ selu selu_ celu celu_ gelu silu mish softplus softsign "
    "hardswish hardsigmoid hardtanh hardtanh_ threshold threshold_ tanh tanh_ sigmoid sigmoid_ logsigmoid "
    "glu softmax log_softmax dropout dropout1d dropout2d dropout3d alpha_dropout"
)
POOLS = "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool2d adaptive_max_pool2d"
NORMS = "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize"
PRODUCTS = (
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d matmul mm bmm addmm baddbmm einsum "
    "scaled_dot_product_attention multi_head_attention_forward"
)
KEEPERS = frozenset(f"{ACTIVATIONS} {POOLS} {NORMS} {PRODUCTS}".split()).union(
    *(layer.functional for layer in LAYERS.values())
)
PLACES = (nn.functional, torch, torch.Tensor)
FOLLOWED = 100  # functions read for one module at most

_UNKNOWN = object()


@dataclass
class Calls:
    """What one module calls."""

    found: set[str] = field(default_factory=set)  # of KEEPERS
    unread: set[str] = field(default_factory=set)  # functions whose source is not available


def calls(module: nn.Module, stock: type[nn.Module]) -> Calls:
    """The functions that the forward of `module`, as an instance of its class `stock`, calls. None for PyTorch's own leaf modules."""
    if _is_torch(stock) and next(module.children(), None) is None:
        return Calls()
    if isinstance(module, torch.fx.GraphModule):  # its source is generated from its graph
        nodes = [(node.op, node.target) for node in module.graph.nodes]
        methods = {target for op, target in nodes if op == "call_method"}
        return Calls(methods & KEEPERS | {_names()[f] for op, f in nodes if op == "call_function" and f in _names()})
    reader = _Reader(module, stock)
    for forward, owner in _attribute_of(module, stock, "forward"):
        reader.follow(forward, owner)
    return reader.calls


@functools.lru_cache(4096)
def _plain_calls(function: types.FunctionType) -> Calls:
    """What a function that is no method calls."""
    reader = _Reader(None, object)
    reader.follow(function)
    return reader.calls


def variants(name: str) -> tuple[Callable, ...]:
    """The functions called `name`: in torch.nn.functional, torch, and as a method of tensors."""
    return tuple(getattr(place, name) for place in PLACES if hasattr(place, name))


@functools.cache
def _names() -> dict[Any, str]:
    """Function -> its name in KEEPERS."""
    return {function: name for name in sorted(KEEPERS) for function in variants(name)}


class _Reader:
    """Reads functions of one module; of None, functions that are no methods."""

    def __init__(self, module: nn.Module | None, stock: type):
        self.module, self.stock, self.calls = module, stock, Calls()
        self.seen: set[Any] = set()

    def follow(self, function: Any, owner: type | None = None) -> None:
        """Read a function, or what it wraps. owner: the class that defines it, for super()."""
        function = inspect.unwrap(function)
        if function in self.seen or len(self.seen) >= FOLLOWED or (_is_torch(function) and not _is_torch(self.stock)):
            return
        self.seen.add(function)
        tree = _tree(function) if isinstance(function, types.FunctionType) else None
        if tree is None:
            self.calls.unread.add(getattr(function, "__qualname__", type(function).__qualname__))
        else:
            _Body(self, function, owner, tree).read()

    def value(self, value: Any, owner: type | None, package: str) -> None:
        """A function of `package` refers to `value`: it is one of KEEPERS, or a function to read, or neither."""
        while isinstance(value, functools.partial):
            value = value.func
        try:
            name = _names().get(value)
        except TypeError:  # not hashable
            return
        if name is not None:
            self.calls.found.add(name)
        elif isinstance(value, types.MethodType):
            if value.__self__ is self.module:
                self.follow(value.__func__, type(self.module))
        elif isinstance(value, torch.jit.ScriptFunction) or (
            owner is not None and isinstance(value, types.FunctionType)
        ):
            self.follow(value, owner)
        elif isinstance(value, types.FunctionType) and _package(value) == package:
            if self.module is None:
                self.follow(value)
            else:
                found = _plain_calls(value)
                self.calls.found |= found.found
                self.calls.unread |= found.unread


class _Body:
    """One function's source: its names are resolved in its own scope."""

    def __init__(self, reader: _Reader, function: types.FunctionType, owner: type | None, tree: ast.AST):
        self.reader, self.owner, self.tree = reader, owner, tree
        self.package = _package(function)
        parameters = list(inspect.signature(function).parameters.values())
        self.self_name = parameters[0].name if owner is not None and parameters else None
        self.scope = vars(builtins) | function.__globals__ | _closure(function)
        self.locals: dict[str, list[ast.expr | Any]] = {p.name: [] for p in parameters}
        for parameter in parameters:
            if callable(parameter.default) and parameter.default is not inspect.Parameter.empty:
                self.locals[parameter.name].append(ast.Constant(parameter.default))

    def read(self) -> None:
        for node in ast.walk(self.tree):
            self._bind(node)
        annotations = {id(part) for node in ast.walk(self.tree) for a in _annotations(node) for part in ast.walk(a)}
        for node in ast.walk(self.tree):
            if id(node) in annotations:
                continue
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                for value, owner in self.resolve(node):
                    self.reader.value(value, owner, self.package)
            elif isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
                self.reader.calls.found.add("matmul")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                self._method_of_unknown(node.func)

    def _method_of_unknown(self, function: ast.Attribute) -> None:
        if function.attr in KEEPERS and not self.resolve(function) and not self._is_module(function):
            self.reader.calls.found.add(function.attr)

    def _is_module(self, node: ast.Attribute) -> bool:
        """self.relu(x) calls a module, also where the reader does not find it (self.blocks[i].relu)."""
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and node.id == self.self_name

    def _bind(self, node: ast.AST) -> None:
        """Names that the function itself binds: by assignment, import, or definition."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    self.locals.setdefault(target.id, []).append(node.value)
        elif isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            for target in ast.walk(node.target):
                if isinstance(target, ast.Name):
                    self.locals.setdefault(target.id, [])
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                self._bind_import(alias.asname or name, sys.modules.get(name))
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            source = sys.modules.get(node.module)
            for alias in node.names:
                self._bind_import(alias.asname or alias.name, getattr(source, alias.name, None))

    def _bind_import(self, name: str, value: Any) -> None:
        self.locals.setdefault(name, []).append(ast.Constant(value))

    def resolve(self, node: ast.expr, depth: int = 5) -> list[tuple[Any, type | None]]:
        """(value, class that defines it) for each value that the expression may have; [] where that is not known."""
        if depth == 0:
            return []
        if isinstance(node, ast.Constant):
            return [(node.value, None)] if callable(node.value) or isinstance(node.value, types.ModuleType) else []
        if isinstance(node, ast.IfExp):
            return self.resolve(node.body, depth - 1) + self.resolve(node.orelse, depth - 1)
        if isinstance(node, ast.Name):
            if node.id == self.self_name:
                return [(self.reader.module, self.reader.stock)]
            if node.id in self.locals:
                return [found for value in self.locals[node.id] for found in self.resolve(value, depth - 1)]
            return [(self.scope[node.id], None)] if node.id in self.scope else []
        if isinstance(node, ast.Attribute):
            if _is_super(node.value):
                return self._attribute_of_super(node.attr)
            return [
                found for value, _ in self.resolve(node.value, depth - 1) for found in self._attribute(value, node.attr)
            ]
        return []

    def _attribute(self, value: Any, name: str) -> list[tuple[Any, type | None]]:
        if value is self.reader.module:
            return list(_attribute_of(value, self.reader.stock, name))
        if isinstance(value, nn.Module):  # reads its own functions
            return [(value._modules[name], None)] if name in value._modules else []
        if isinstance(value, types.ModuleType | type):
            found = getattr(value, name, _UNKNOWN)
            return [] if found is _UNKNOWN else [(found, value if isinstance(value, type) else None)]
        return []

    def _attribute_of_super(self, name: str) -> list[tuple[Any, type | None]]:
        order = self.reader.stock.__mro__
        after = order[order.index(self.owner) + 1 :] if self.owner in order else ()
        return next(([(cls.__dict__[name], cls)] for cls in after if name in cls.__dict__), [])


def _attribute_of(module: nn.Module, stock: type, name: str) -> Iterator[tuple[Any, type | None]]:
    """A module's attribute, without running properties: its submodule, what it holds, or its class's method with the class."""
    for held in (module._modules, vars(module)):
        if name in held:
            yield held[name], None
            return
    for cls in stock.__mro__:
        if name in cls.__dict__:
            method = cls.__dict__[name]
            yield method.__func__ if isinstance(method, staticmethod | classmethod) else method, cls
            return


def _annotations(node: ast.AST) -> list[ast.expr]:
    names = ("annotation", "returns")
    return [part for part in (getattr(node, name, None) for name in names) if isinstance(part, ast.expr)]


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _closure(function: types.FunctionType) -> dict[str, Any]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - an empty cell raises
    except ValueError:
        return False
    return True


@functools.lru_cache(4096)
def _tree(function: types.FunctionType) -> ast.AST | None:
    """None where there is no source: built in a shell, in C, or by a decorator."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def _is_torch(thing: Any) -> bool:
    name = getattr(thing, "__module__", None) or ""
    return name == "torch" or name.startswith("torch.")


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").partition(".")[0]
