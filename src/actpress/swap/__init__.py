"""Applying a method to a model, in place.

A replaced module stays the object it was and only changes class (nn.Conv2d -> actpress.layers.Conv2d), so parameters,
buffers, hooks, state_dict keys and every reference to the module survive. Only exact types are replaced: a subclass may have
a forward of its own.
"""

import dataclasses
import functools
import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from actpress import layers
from actpress.codec import Context, Dense
from actpress.layers import applied
from actpress.layers.applied import Applied, type_name
from actpress.swap import first_pass, functional, libraries, saving
from actpress.swap.calls import calls
from actpress.swap.saving import Inputs, Saving

PRODUCTS, NORMS = (nn.Linear, _ConvNd), (nn.LayerNorm, _BatchNorm)  # see worth


class Replacement(NamedTuple):
    """The layer class that takes a module's place and, if it keeps more than masks, what decides how: a Codec for a layer that keeps its
    input, an activation's own kind of codec for one that does not."""

    layer: type[nn.Module]
    codec: Any = None
    start_epoch: int = 0  # a Codec's first epoch, see set_epoch; until then the layer keeps its input dense
    calls: tuple[str, Callable] | None = (
        None  # of libraries.Calling: the function of a library's forward that becomes ours
    )


class Method:
    """Base of all methods: says for each module what replaces it. Most only map types, in `rules`."""

    changes_model = True  # False: matching nothing is not an error
    closer = ""  # which of its options bring the gradient closer to the exact one; `check` says so where it is far

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        """Stock layer type -> its replacement."""
        raise NotImplementedError

    def functions(self) -> Mapping[str, Callable]:
        """Name of a function that forward methods call, such as relu -> its replacement, with the same arguments."""
        return {}

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        """What replaces `module`, called `name` in the model; None leaves it as it is. Override to go by name.

        A layer of a library that stands in for a stock type follows that type's rule, see `libraries`.
        """
        rules = self.rules()
        if type(module) in rules:
            return rules[type(module)]
        found = libraries.stand_in(module, rules)
        if found is None:
            return None
        base, mixin, calls = found
        return rules[base]._replace(layer=mixin, calls=calls)

    def attach(self, model: nn.Module) -> None:
        """Called once `model` has its new layers: to leave a hook on it, for instance."""


@dataclass(frozen=True)
class Composition(Method):
    """Several methods as one: for each module the first with a replacement wins."""

    methods: tuple[Method, ...]

    @property
    def changes_model(self) -> bool:
        return any(method.changes_model for method in self.methods)

    @property
    def closer(self) -> str:
        return ", ".join(dict.fromkeys(method.closer for method in self.methods if method.closer))

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        return {layer: ours for method in reversed(self.methods) for layer, ours in method.rules().items()}

    def replacement(self, name: str, module: nn.Module) -> Replacement | None:
        found = (method.replacement(name, module) for method in self.methods)
        return next((replacement for replacement in found if replacement is not None), None)

    def functions(self) -> Mapping[str, Callable]:
        return {name: ours for method in reversed(self.methods) for name, ours in method.functions().items()}

    def attach(self, model: nn.Module) -> None:
        for method in self.methods:
            method.attach(model)


def compose(*methods: Method) -> Composition:
    """Several methods as one: for each module the first that has a rule for it wins. Raises TypeError for what is no Method."""
    for method in methods:
        _check_method(method)
    return Composition(methods)


def label(method: Method, also: Collection[str] = ()) -> str:
    """A method with the options that differ from their defaults, and those named in `also`: Division(bits=4)."""
    if isinstance(method, Composition):
        return " + ".join(label(part, also) for part in method.methods)
    options = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    shown = [
        f"{option.name}={getattr(method, option.name)!r}"
        for option in options
        if option.name in also or getattr(method, option.name) != _default(option)
    ]
    return type(method).__name__ + (f"({', '.join(shown)})" if shown else "")


def _default(option: dataclasses.Field) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")


def _check_method(method: object) -> None:
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be an actpress.swap.Method, one of those in actpress.methods for instance, got {method!r}"
        )


@dataclass(frozen=True)
class Report:
    """What `apply` did. Names are those of model.named_modules(); a function called in a module's forward is "<module>.relu()"."""

    replaced: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (old type, new type)
    untouched: dict[str, str] = field(
        default_factory=dict
    )  # name of a leaf module or function -> why it stays as it is
    saving: Saving | None = None  # measured, where apply was given a sample

    def __str__(self) -> str:
        groups = [f"{old} -> {new}" for old, new in self.replaced.values()]
        names = dict(zip(self.replaced, groups, strict=True)) | self.untouched
        found = sorted(Counter(groups).items()) + sorted(Counter(self.untouched.values()).items())
        if self.saving is None:
            return "\n".join(f"{count:4d}  {group}" for group, count in found)
        return self.saving.table(names, dict(found))


class NothingMatches(ValueError):
    """A method has no rule for any module or function of the model."""


def apply(
    model: nn.Module,
    method: Method,
    sample: Any = None,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> Report:
    """Replace, in place, every module of `model` that `method` has a rule for, and the functions its forward methods call.

    Parameters, buffers, state_dict keys and forward outputs stay the same; `restore` is the way back.

    sample: an input of the model (a tensor, a tuple of arguments or a dict of keyword arguments). The report then says what each line
        saves, measured by a training forward pass before and after, on copies. Without it the first training forward pass of the model
        is watched. Either way a UserWarning says so where the method keeps hardly less than the stock model, and what stayed dense.
    where: called with each module and its name in the model; modules for which it is false are left as they are, and nothing is
        warned of. A function is replaced for the module that calls it and for what runs below it.
    Raises TypeError if `model` is no module or `method` no Method, ValueError if the method matches nothing in the model (applying a
    method twice matches nothing the second time). A model for which `apply` raises is left as it was.
    """
    check_model(model)
    _check_method(method)
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of (name, module), got {where!r}")
    first_pass.end_all()
    inputs = None if sample is None else Inputs.of(sample)
    stock_kept = None if inputs is None else saving.kept(model, inputs)
    before = [(module, type(module), applied.attributes(module)) for module in model.modules()]
    try:
        report = _apply(model, method, where)
        if inputs is not None:
            report = dataclasses.replace(report, saving=saving.compare(model, inputs, label(method), stock_kept))
        method.attach(model)
    except BaseException:
        for module, cls, attributes in before:
            _put_back(module, cls, attributes)
        raise
    if where is None and report.replaced:
        if report.saving is not None:
            report.saving.warn_below(worth(method))
        elif next(model.children(), None) is not None:  # a model of one layer has nothing else to keep
            saving.watch(model, label(method), worth(method))
    return report


def _apply(model: nn.Module, method: Method, where: Callable[[str, nn.Module], bool] | None) -> Report:
    plan = [(name, module, method.replacement(name, module)) for name, module in model.named_modules()]
    report, context, functions = Report(), Context(torch.initial_seed()), method.functions()
    for name, module, replacement in plan:
        old = type_name(functional.stock_class(module))
        leaf = next(module.children(), None) is None
        if where is not None and not where(name, module):
            if leaf:
                report.untouched[name] = f"{old} untouched: left out by where"
            continue
        if replacement is not None:
            _replace(module, name, method, replacement, context)
            report.replaced[name] = (old, f"actpress.{type(module).__name__}")
            continue
        if leaf:
            report.untouched[name] = _why_untouched(module, method)
        if applied.of(module) is None or isinstance(module, functional.Intercepted):
            _replace_functions(name, module, method, functions, report)
    if method.changes_model and not report.replaced:
        raise NothingMatches(_no_match(model, method, plan))
    set_epoch(model, 0)
    return report


def _put_back(module: nn.Module, cls: type[nn.Module], attributes: Mapping[str, Any]) -> None:
    """Give a module the class and the attributes that `apply` changed."""
    module.__class__ = cls
    for name in applied.ATTRIBUTES:
        vars(module).pop(name, None)
    vars(module).update(attributes)


def _replace(module: nn.Module, name: str, method: Method, replacement: Replacement, context: Context) -> None:
    stock = functional.stock_class(module)
    functions = functional.release(module)
    if issubclass(replacement.layer, layers.Extended):
        layers.extend(module, replacement.layer)
    else:
        module.__class__ = replacement.layer
    _note(module, name, method, stock)
    if replacement.codec is not None:
        module.codec, module.context = replacement.codec, context
    if replacement.start_epoch:
        module.late_codec = (replacement.start_epoch, replacement.codec)
    if replacement.calls is not None:
        module.calls = replacement.calls
        called = calls(module, stock).found - {replacement.calls[0]}
        rules = {**method.functions(), **functions}
        module.function_rules = {function: rules[function] for function in sorted(called) if function in rules}


def _replace_functions(
    name: str, module: nn.Module, method: Method, functions: Mapping[str, Callable], report: Report
) -> None:
    stock = functional.stock_class(module)
    called = calls(module, stock)
    before = set(vars(module).get("function_rules", ()))
    generated = issubclass(stock, torch.fx.GraphModule)  # makes its own forward anew whenever it is copied
    ours = {
        function: _named(functions[function], f"{function}() in {name!r} under {label(method)}")
        for function in called.found - before
        if function in functions and not generated
    }
    if ours:
        functional.intercept(module, ours)
        _note(module, name, method, stock)
    for function in sorted(called.found):
        where = f"{name}.{function}()".lstrip(".")
        if function in functions and generated:
            report.untouched[where] = f"{function}() untouched: called by the generated code of a torch.fx.GraphModule"
        elif function in ours:
            report.replaced[where] = (f"{function}()", f"actpress.{function}()")
        elif function in before:
            report.untouched[where] = f"{function}() untouched: replaced before"
        else:
            report.untouched[where] = f"{function}() untouched: no rule"
    for function in sorted(called.unread):
        where = f"{name}: {function}()"
        report.untouched[where] = "functions untouched: no source to read what the module calls"


def _named(function: Callable, origin: str) -> Callable:
    """The function with its origin, for messages, if it takes one."""
    takes = "origin" in inspect.signature(function).parameters
    return functools.partial(function, origin=origin) if takes else function


def _note(module: nn.Module, name: str, method: Method, stock: type[nn.Module]) -> None:
    before = applied.of(module)
    text = label(method) if before is None else f"{before.method} + {label(method)}"
    module._actpress = Applied(name, text, stock if before is None else before.stock, applied.class_name(module))


def _no_match(model: nn.Module, method: Method, plan: list[tuple[str, nn.Module, Replacement | None]]) -> str:
    text = f"{label(method)} matches nothing in {type(model).__name__}; it has: {_listed(plan)}"
    earlier = {note.method for module in model.modules() if (note := applied.of(module)) is not None}
    return text + (
        f"; {', '.join(sorted(earlier))} is applied already, actpress.restore(model) undoes that" if earlier else ""
    )


def worth(method: Method) -> float:
    """`apply` warns where the method keeps less than this many times less than the stock model.

    1.5 for a method with rules for products and for norms, which means to cover whole networks; else 10/9, a tenth saved.
    """
    types = tuple(method.rules())
    covers = [any(issubclass(t, kind) for t in types) for kind in (PRODUCTS, NORMS)]
    return 1.5 if all(covers) else 10 / 9


def restore(model: nn.Module) -> list[str]:
    """Undo every `apply` on `model` or on parts of it, in place: stock classes, functions and attributes, and the hooks of apply gone.

    Parameters, buffers, gradients and hooks of others stay. Returns the names, in `model`, of the modules that changed; a stock model
    is left as it is and gives an empty list. `apply` works again afterwards, with a new stream of noise. Raises RuntimeError, and changes
    nothing, where another tool has changed a module's class since (parametrizations, fully_shard): its class would be lost.
    """
    check_model(model)
    first_pass.end_all()
    noted = {name: (module, note) for name, module in model.named_modules() if (note := applied.of(module)) is not None}
    for name, (module, note) in noted.items():
        if applied.class_name(module) != note.now:
            raise RuntimeError(
                f"restore: {name!r} is a {type(module).__name__}, made by another tool after apply ({note.method}); undo that first"
            )
    for module in model.modules():
        first_pass.remove(module)
    for module, note in noted.values():
        own = applied.attributes(module) if isinstance(module, functional.Intercepted) else {}
        _put_back(module, note.stock, {name: own[name] for name in own.keys() - {"_actpress", "function_rules"}})
    return list(noted)


def _why_untouched(module: nn.Module, method: Method) -> str:
    cls, note = type(module), applied.of(module)
    if note is not None:
        return f"{type_name(cls)} untouched: {note.method} is applied to it"
    rules = method.rules()
    base = next((base for base in cls.__mro__ if base in rules), None)
    why = "no rule" if base is None else f"a subclass of {type_name(base)}, whose forward may differ"
    why = "the method leaves it dense by its name" if base is cls else why
    return f"{type_name(cls)} untouched: {why}"


def _listed(plan: list[tuple[str, nn.Module, Replacement | None]]) -> str:
    return ", ".join(
        sorted({type_name(type(module)) for _, module, _ in plan if next(module.children(), None) is None})
    )


def state(model: nn.Module) -> dict[str, Any]:
    """What the model's methods have to remember beside the weights, to be stored with a checkpoint: for each call of `apply`, in the
    order of its first layer, the position of its noise stream and the epoch. Plain numbers, lists and dicts; empty for a stock model.
    Waits for the device where CUDA graphs draw noise."""
    contexts = _contexts(model)
    return {"contexts": [context.state() for context in contexts]} if contexts else {}


def load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put the model's methods where `state` found them. Raises ValueError if the model has more or fewer contexts than the state.

    A state of an older version, {seed, draws, epoch}, is that of a single context; where the model has several, all get it, and a
    UserWarning says that resuming is not bit for bit.
    """
    contexts = _contexts(model)
    old = "draws" in state
    states = [state] * max(len(contexts), 1) if old else state.get("contexts", [])
    if len(contexts) != len(states):
        raise ValueError(
            f"method state {dict(state)} does not fit a model with {len(contexts)} applied methods that keep codes; "
            "allowed: the state of a model on which apply was called in the same way"
        )
    if old and len(contexts) > 1:
        warnings.warn(
            f"the method state holds 1 of {len(contexts)} positions in noise streams: resuming is not bit for bit",
            stacklevel=2,
        )
    for context, values in zip(contexts, states, strict=True):
        context.load_state(values)
    _set_late_codecs(model)


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell the model's method which epoch begins, counted from 0. A training loop calls it; only methods that start late care:
    their layers keep inputs dense until then. A compiled model is compiled again once, when they start."""
    for context in _contexts(model):
        context.epoch = epoch
    _set_late_codecs(model)


def _set_late_codecs(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "late_codec"):
            first, codec = module.late_codec
            module.codec = codec if module.context.epoch >= first else Dense()


def _contexts(model: nn.Module) -> list[Context]:
    """The context of each call of `apply`, in the order of the first layer that has it: none for a stock model."""
    return list(
        {id(m.context): m.context for m in model.modules() if isinstance(getattr(m, "context", None), Context)}.values()
    )
