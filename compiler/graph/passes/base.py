"""What passes are, and rewriting graphs bottom-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from kedge.compiler.graph.bind import parameters, read_only
from kedge.compiler.graph.ir import (
    Call,
    Constant,
    Function,
    Fused,
    Input,
    Item,
    Module,
    Param,
    TensorType,
    Value,
    operands,
    postorder,
)  # fmt: skip

if TYPE_CHECKING:
    from kedge.compiler.target import AnyTarget

Array: TypeAlias = np.ndarray[Any, Any]


class Pass(Protocol):
    """A frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """What reports, dumps and `pipeline.insert_after` call the pass."""

    def __call__(self, module: Module) -> Module:
        """The transformed module; the same object where nothing changed."""


@runtime_checkable
class TargetPass(Pass, Protocol):
    """A pass whose result depends on the target, such as a choice of layouts; without one it changes nothing."""

    def for_target(self, target: AnyTarget) -> Pass:
        """The same pass for `target`."""


def for_target(passes: Iterable[Pass], target: AnyTarget) -> tuple[Pass, ...]:
    """The passes, those that depend on a target bound to it."""
    return tuple(step.for_target(target) if isinstance(step, TargetPass) else step for step in passes)


def run_passes(module: Module, passes: Iterable[Pass]) -> Module:
    """The module after all `passes`, in order."""
    for step in passes:
        module = step(module)
    return module


class Context:
    """What a rewriting rule may ask: how often values are used, what is known, and new parameters."""

    def __init__(self, module: Module) -> None:
        self._known: dict[str, Array] = dict(module.params)
        self._names = {*parameters(module), *module.params}
        self._names |= {value.name for function in module.functions.values() for value in function.inputs}
        self._uses: Counter[int] = Counter()
        self._folded: dict[tuple[object, ...], Param] = {}
        self.added: dict[str, Array] = {}

    def enter(self, function: Function) -> None:
        """Count the uses of the values of `function`."""
        self._uses = Counter(id(value) for value in function.outputs)
        for value in function.values():
            self._uses.update(id(operand) for operand in operands(value))

    def uses(self, old: Value) -> int:
        """How many operands and outputs of the function being rewritten are `old` (a value from before)."""
        return self._uses[id(old)]

    def known(self, value: Value) -> Array | None:
        """The data of a constant or of a bound parameter."""
        if isinstance(value, Constant):
            return value.data
        return self._known.get(value.name) if isinstance(value, Param) else None

    def new_param(self, data: Array, like: str, suffix: str = "folded", key: tuple[object, ...] = ()) -> Param:
        """A new bound parameter named after the parameter `like`; the same again for the same non-empty `key`."""
        if key and key in self._folded:
            return self._folded[key]
        base = like if like.endswith(f".{suffix}") else f"{like}.{suffix}"
        name, count = base, 0
        while name in self._names:
            count += 1
            name = f"{base}{count}"
        self._names.add(name)
        data = read_only(data)
        self._known[name] = self.added[name] = data
        param = Param(name, TensorType(tuple(data.shape), str(data.dtype)))
        if key:
            self._folded[key] = param
        return param


def value_key(value: Value) -> object:
    """What a constant, parameter or input is, whichever node stands for it; of other values the node itself."""
    match value:
        case Constant(data=data):
            return "constant", data.tobytes(), str(data.dtype), data.shape
        case Param(name=name):
            return "param", name
        case Input(name=name):
            return "input", name
    return id(value)


#: Given the context, a value as it was and the same value over rewritten operands: its replacement, or None.
Rule: TypeAlias = Callable[[Context, Value, Value], Value | None]


def rewrite(module: Module, rule: Rule) -> Module:
    """The module with `rule` applied to every call and item, operands first; parameters no longer used are dropped."""
    context = Context(module)
    functions = {}
    for name, function in module.functions.items():
        context.enter(function)
        functions[name] = rewrite_function(function, lambda old, new: rule(context, old, new))
    if all(new is module.functions[name] for name, new in functions.items()):
        return module
    return with_functions(module, functions, context.added)


def with_functions(
    module: Module, functions: Mapping[str, Function], added: Mapping[str, Array] = MappingProxyType({})
) -> Module:
    """The module with other functions and more parameters, without the data of those that nothing uses."""
    used = parameters(Module(functions))
    params = {name: data for name, data in {**module.params, **added}.items() if name in used}
    return Module(MappingProxyType(dict(functions)), MappingProxyType(params))


def rewrite_function(function: Function, rule: Callable[[Value, Value], Value | None]) -> Function:
    """The function with values replaced bottom-up; the same object where nothing changed."""
    done: dict[int, Value] = {}
    for old in postorder(function.outputs):
        new = with_operands(old, [done[id(operand)] for operand in operands(old)])
        replacement = rule(old, new) if isinstance(old, (Call, Item)) else None
        done[id(old)] = new if replacement is None else replacement
    outputs = tuple(done[id(value)] for value in function.outputs)
    if all(new is old for new, old in zip(outputs, function.outputs, strict=True)):
        return function
    return replace(function, outputs=outputs)


def with_operands(value: Value, new: Sequence[Value]) -> Value:
    """The value over other operands; the same object where they are the same."""
    if all(a is b for a, b in zip(operands(value), new, strict=True)):
        return value
    if isinstance(value, (Call, Fused)):
        return replace(value, inputs=tuple(new))
    assert isinstance(value, Item)  # nothing else has operands
    source = new[0]
    assert isinstance(source, (Call, Fused))
    return Item(source, value.index)
