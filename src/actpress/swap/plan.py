"""Applying a method to a model, in place: its plan is checked, executed and reported.

A module that is changed stays the object it was and only changes class (nn.Conv2d -> actpress.layers.Conv2d), so parameters, buffers,
hooks, state_dict keys and every reference to the module survive. Only exact types are swapped: a subclass may have a forward of its own.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from actpress.codec import Context
from actpress.layers import Extended, applied, extend
from actpress.layers.applied import Applied, type_name
from actpress.swap import first_pass, saving, unshared_outputs
from actpress.swap.calls import calls
from actpress.swap.edits import Around, Edit, Graph, Swap
from actpress.swap.functional import Functions, bound
from actpress.swap.method import Method, check_method, check_plan, label, narrowed
from actpress.swap.saving import Inputs, Saving
from actpress.swap.state import set_epoch
from actpress.swap.wrapping import Wrapped, class_below, wrap

PRODUCTS, NORMS = (nn.Linear, _ConvNd), (nn.LayerNorm, _BatchNorm)  # see worth


def check_model(model: object) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")


@dataclass(frozen=True)
class Report:
    """What `apply` did. Names are those of model.named_modules(); a function called in a module's forward is "<module>.relu()", what runs
    around the forward, and its compilation, "<module>.forward()"."""

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
    """A method has no edit for any module or function of the model."""


def apply(
    model: nn.Module,
    method: Method,
    sample: Any = None,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> Report:
    """Execute, in place, the plan that `method` makes for `model`.

    Parameters, buffers, state_dict keys and forward outputs stay the same; `restore` is the way back.

    sample: an input of the model (a tensor, a tuple of arguments or a dict of keyword arguments). The report then says what each line
        saves, measured by a training forward pass before and after, on copies. Without it the first training forward pass of the model
        is watched. Either way a UserWarning says so where the method saves hardly less than the stock model, and what stayed dense.
    where: called with each module and its name in the model; modules for which it is false are left as they are, and nothing is
        warned of. A function is replaced for the module that calls it and for what runs below it. What a method does around the model as a
        whole (offloading, compilation) it does around the topmost modules for which `where` is true.
    Raises TypeError if `model` is no module or `method` no Method, ValueError if the method matches nothing in the model (applying a
    method twice matches nothing the second time) or its plan names a module that the model does not have. A model for which `apply` raises
    is left as it was.
    """
    check_model(model)
    check_method(method)
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of (name, module), got {where!r}")
    first_pass.end_all()
    inputs = None if sample is None else Inputs.of(sample)
    stock_kept = None if inputs is None else saving.kept(model, inputs)
    before = [(m, type(m), applied.attributes(m), m._compiled_call_impl) for m in model.modules()]
    try:
        report = _apply(model, method, where)
        if inputs is not None:
            report = dataclasses.replace(report, saving=saving.compare(model, inputs, label(method), stock_kept))
        if any(unshared_outputs.keeps_output(module) for module in model.modules()):
            unshared_outputs.watch(model)
    except BaseException:
        for module, cls, attributes, compiled in before:
            _put_back(module, cls, attributes, compiled)
        raise
    if where is None and report.replaced:
        if report.saving is not None:
            report.saving.warn_below(worth(method))
        elif next(model.children(), None) is not None:  # a model of one layer has nothing else to save
            saving.watch(model, label(method), worth(method))
    return report


def _apply(model: nn.Module, method: Method, where: Callable[[str, nn.Module], bool] | None) -> Report:
    plan = method.plan(model)
    check_plan(method, plan, model)
    if where is not None:
        plan = narrowed(plan, model, where)
    report, context, by_name = Report(), Context(torch.initial_seed()), _by_name(plan)
    for name, module in model.named_modules():
        edits = by_name.get(name, [])
        before, old = applied.of(module), type_name(class_below(module))
        swap = next((edit for edit in edits if isinstance(edit, Swap)), None)
        if where is not None and not where(name, module):
            if next(module.children(), None) is None:
                report.untouched[name] = f"{old} untouched: left out by where"
            continue
        if swap is not None:
            _swap(module, swap, method, context)
            report.replaced[name] = (old, f"actpress.{type(module).__name__}")
        elif next(module.children(), None) is None and not edits:
            report.untouched[name] = _why_untouched(module, method)
        _edit_functions(name, module, edits, method, context, report, before)
        for edit in edits:
            _execute(module, edit, method, report, old)
    if method.changes_model and not report.replaced:
        raise NothingMatches(_no_match(model, method, where))
    set_epoch(model, 0)
    return report


def _by_name(plan: Sequence[Edit]) -> dict[str, list[Edit]]:
    found: dict[str, list[Edit]] = {}
    for edit in plan:
        found.setdefault(edit.name, []).append(edit)
    return found


def _swap(module: nn.Module, edit: Swap, method: Method, context: Context) -> None:
    calls_around = vars(module).pop("_around", ())
    stock = class_below(module)
    module.__class__ = stock
    if issubclass(edit.layer, Extended):
        extend(module, edit.layer)
    else:
        module.__class__ = edit.layer
    if calls_around:
        wrap(module, calls_around)
    _note(module, edit.name, method, stock, swap=edit)
    if edit.codec is not None:
        module.codec, module.context = edit.codec, context
    if edit.library is not None:
        module.library = edit.library


def _edit_functions(
    name: str,
    module: nn.Module,
    edits: Sequence[Edit],
    method: Method,
    context: Context,
    report: Report,
    before: Applied | None,
) -> None:
    """Replace the functions that the module calls, and report on all that it calls and that save a dense tensor."""
    swapped = any(isinstance(edit, Swap) for edit in edits)
    ours: dict[str, Callable] = {}
    for edit in edits:
        if isinstance(edit, Around) and isinstance(edit.call, Functions):
            ours |= edit.call.rules
    stock = class_below(module) if before is None else before.stock
    around = vars(module).get("_around", ())
    taken = dict(around[0].rules) if around and isinstance(around[0], Functions) else {}
    ours = {function: rule for function, rule in ours.items() if function not in taken}
    if ours:
        rules = {
            function: bound(rule, context=context, origin=f"{function}() in {name!r} under {label(method)}")
            for function, rule in ours.items()
        }
        wrap(module, (Functions(rules | taken), *(around[1:] if taken else around)))
        _note(module, name, method, stock)
    if swapped or (before is not None and not isinstance(module, Wrapped)):
        return
    called = calls(module, stock)
    functions = method.functions()
    for function in sorted(called.found):
        where = f"{name}.{function}()".lstrip(".")
        if function in ours:
            report.replaced[where] = (f"{function}()", f"actpress.{function}()")
        elif function in functions and isinstance(module, torch.fx.GraphModule):
            report.untouched[where] = f"{function}() untouched: called by the generated code of a torch.fx.GraphModule"
        elif function in taken:
            report.untouched[where] = f"{function}() untouched: replaced before"
        else:
            report.untouched[where] = f"{function}() untouched: no rule"
    for function in sorted(called.unread):
        report.untouched[f"{name}: {function}()"] = "functions untouched: no source to read what the module calls"


def _execute(module: nn.Module, edit: Edit, method: Method, report: Report, old: str) -> None:
    """Execute an Around that replaces no functions, or a Graph."""
    if isinstance(edit, Swap) or (isinstance(edit, Around) and isinstance(edit.call, Functions)):
        return
    where = f"{edit.name}.forward()".lstrip(".")
    note = applied.of(module)
    stock = class_below(module) if note is None else note.stock
    if isinstance(module, torch.fx.GraphModule):  # makes its own forward anew whenever it is copied
        report.untouched[where] = f"{old} untouched: a torch.fx.GraphModule, whose forward is generated"
        return
    around = vars(module).get("_around", ())
    if isinstance(edit, Graph):
        if module._compiled_call_impl is not None:
            raise ValueError(f"{label(method)}: {edit.name!r} is compiled in place already; undo that first")
        module.compile(backend=edit.backend)
    elif edit.call in around:
        report.untouched[where] = f"{old} untouched: {note.method} is applied to it"
        return
    else:
        wrap(module, (*around, edit.call))
    _note(module, edit.name, method, stock, compiled=isinstance(edit, Graph))
    report.replaced[where] = (old, f"{old} under {label(method)}")


def _note(
    module: nn.Module,
    name: str,
    method: Method,
    stock: type[nn.Module],
    swap: Swap | None = None,
    compiled: bool = False,
) -> None:
    before, text = applied.of(module), label(method)
    if before is not None:
        earlier = before.method.split(" + ")
        text = before.method if earlier[-len(text.split(" + ")) :] == text.split(" + ") else f"{before.method} + {text}"
        name, stock, swap, compiled = before.name, before.stock, swap or before.swap, compiled or before.compiled
    module._actpress = Applied(name, text, stock, applied.class_name(module), swap, compiled)


def _put_back(module: nn.Module, cls: type[nn.Module], attributes: Mapping[str, Any], compiled: Any) -> None:
    """Give a module the class and the attributes that `apply` changed."""
    module.__class__ = cls
    for name in (*applied.ATTRIBUTES, "_compiled_call_impl"):
        vars(module).pop(name, None)
    vars(module).update(attributes if compiled is None else {**attributes, "_compiled_call_impl": compiled})


def _no_match(model: nn.Module, method: Method, where: Callable[[str, nn.Module], bool] | None) -> str:
    leaves = (module for module in model.modules() if next(module.children(), None) is None)
    listed = ", ".join(sorted({type_name(type(module)) for module in leaves}))
    text = f"{label(method)} matches nothing in {type(model).__name__}; it has: {listed}"
    if where is not None:
        allowed = [where(name, module) for name, module in model.named_modules()]
        text += f"; where allows {sum(map(bool, allowed))} of its {len(allowed)} modules"
    earlier = {note.method for module in model.modules() if (note := applied.of(module)) is not None}
    return text + (
        f"; {', '.join(sorted(earlier))} is applied already, actpress.restore(model) undoes that" if earlier else ""
    )


def worth(method: Method) -> float:
    """The ratio of the stock model's saved bytes to the method's below which `apply` warns.

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
        # a module that was not swapped may have attributes of these names of its own
        own = {} if note.swap else applied.attributes(module)
        compiled = None if note.compiled else module._compiled_call_impl
        kept = {name: value for name, value in own.items() if name not in ("_actpress", "_around")}
        _put_back(module, note.stock, kept, compiled)
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
