"""What a method is: it looks at a model and returns a plan, a list of edits.

Most methods only map layer types to replacements, in `rules`, and functions to functions; `Method.plan` makes the plan of that. A method of
another kind overrides `plan`. Several methods compose to one plan.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from actpress.codec import Codec
from actpress.layers import applied
from actpress.swap import libraries
from actpress.swap.calls import calls
from actpress.swap.edits import Around, Edit, Swap
from actpress.swap.functional import Functions
from actpress.swap.wrapping import Wrapped, class_below


class Replacement(NamedTuple):
    """What takes the place of modules of a type: a Swap without the module's name."""

    layer: type[nn.Module]
    codec: Codec | None = None
    start_epoch: int = 0
    library: Any = None


class Method:
    """Base of all methods."""

    changes_model = True  # False: matching nothing is not an error
    closer = ""  # which of its options bring the gradient closer to the exact one; `check` says so where it is far

    def rules(self) -> Mapping[type[nn.Module], Replacement]:
        """Stock layer type -> its replacement."""
        return {}

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
        base, mixin, library = found
        return rules[base]._replace(layer=mixin, library=library)

    def plan(self, model: nn.Module) -> Sequence[Edit]:
        """The edits that this method makes in `model`, which is left as it is. Made of rules and functions unless overridden."""
        functions, edits = self.functions(), []
        for name, module in model.named_modules():
            found = self.replacement(name, module)
            if found is not None:
                edits.append(Swap(name, *found))
            called = _called(module, found) & functions.keys()
            if called:
                edits.append(Around(name, Functions({function: functions[function] for function in sorted(called)})))
        return edits


def _called(module: nn.Module, found: Replacement | None) -> set[str]:
    """The functions that may be replaced in a module's forward: none where the forward itself is replaced, or was before."""
    note = applied.of(module)
    own_forward = issubclass(found.layer, libraries.Calling) if found else note is None or isinstance(module, Wrapped)
    # a GraphModule makes its own forward anew whenever it is copied
    if not own_forward or isinstance(module, torch.fx.GraphModule):
        return set()
    called = calls(module, class_below(module) if note is None else note.stock).found
    taken = module._around[0].rules if isinstance(module, Wrapped) and isinstance(module._around[0], Functions) else ()
    return called - set(taken) - ({found.library[0]} if found else set())


@dataclass(frozen=True)
class Composition(Method):
    """Several methods as one: for each module, and each function, the first with a replacement wins. Other edits add up."""

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

    def plan(self, model: nn.Module) -> Sequence[Edit]:
        plans = [list(method.plan(model)) for method in self.methods]
        swaps: dict[str, Swap] = {}
        for edit in (edit for plan in plans for edit in plan if isinstance(edit, Swap)):
            swaps.setdefault(edit.name, edit)
        functions: dict[str, dict[str, Callable]] = {}
        others: list[Edit] = []
        for edit in (edit for plan in plans for edit in plan if not isinstance(edit, Swap)):
            if not (isinstance(edit, Around) and isinstance(edit.call, Functions)):
                others.append(edit)
            elif edit.name not in swaps or issubclass(swaps[edit.name].layer, libraries.Calling):
                rules = functions.setdefault(edit.name, {})
                rules.update({name: ours for name, ours in edit.call.rules.items() if name not in rules})
        return [*swaps.values(), *(Around(name, Functions(rules)) for name, rules in functions.items()), *others]


def compose(*methods: Method) -> Composition:
    """Several methods as one: for each module the first that has a rule for it wins. Raises TypeError for what is no Method."""
    for method in methods:
        check_method(method)
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


def check_method(method: object) -> None:
    """Raise TypeError for what is no Method."""
    if not isinstance(method, Method):
        raise TypeError(
            f"method must be an actpress.swap.Method, one of those in actpress.methods for instance, got {method!r}"
        )


def check_plan(method: Method, plan: Sequence[Edit], model: nn.Module) -> None:
    """Raise TypeError or ValueError for a plan that cannot be executed."""
    modules, seen = dict(model.named_modules()), set()
    for edit in plan:
        if not isinstance(edit, Edit):
            raise TypeError(f"{label(method)}: its plan holds {edit!r}, allowed: Swap, Around, Graph")
        if edit.name not in modules:
            raise ValueError(f"{label(method)}: its plan names the module {edit.name!r}, which the model does not have")
        key = (type(edit), edit.name)
        if key in seen and not isinstance(edit, Around):
            raise ValueError(f"{label(method)}: its plan holds two edits {type(edit).__name__} of {edit.name!r}")
        seen.add(key)


def narrowed(plan: Sequence[Edit], model: nn.Module, where: Callable[[str, nn.Module], bool]) -> list[Edit]:
    """The edits of modules for which `where` is true. An edit of the model as a whole is made on the topmost of them."""
    modules = dict(model.named_modules())
    allowed = [name for name, module in modules.items() if where(name, module)]
    topmost: list[str] = []
    for name in allowed:  # outer modules come before inner ones
        if not any(above == "" or name.startswith(f"{above}.") for above in topmost):
            topmost.append(name)
    names = set(allowed)
    kept = [edit for edit in plan if edit.name in names]
    whole = [edit for edit in plan if edit.name == "" and "" not in names and not isinstance(edit, Swap)]
    whole = [edit for edit in whole if not (isinstance(edit, Around) and isinstance(edit.call, Functions))]
    return [*kept, *(replace(edit, name=name) for edit in whole for name in topmost)]
