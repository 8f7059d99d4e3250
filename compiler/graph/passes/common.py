"""Computing equal things once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kedge.compiler.graph.ir import Call, Constant, Function, Input, Item, Module, Param, Value
from kedge.compiler.graph.passes.base import rewrite_function, with_functions
from kedge.compiler.tir.expr import Expr
from kedge.compiler.tir.structural import expr_key


@dataclass(frozen=True, slots=True)
class CommonSubexpressions:
    """Merge calls of one operator on the same operands with the same attributes."""

    name: str = "common-subexpressions"

    def __call__(self, module: Module) -> Module:
        """The module with such calls merged."""
        functions = {name: _merge(function) for name, function in module.functions.items()}
        if all(function is module.functions[name] for name, function in functions.items()):
            return module
        return with_functions(module, functions)


def _merge(function: Function) -> Function:
    first: dict[object, Value] = {}

    def rule(old: Value, new: Value) -> Value | None:
        known = first.setdefault(_key(new), new)
        return None if known is new else known

    return rewrite_function(function, rule)


def _key(value: Value) -> object:
    match value:
        case Call():
            attrs = tuple((name, _frozen(attribute)) for name, attribute in sorted(value.attrs.items()))
            return value.op, attrs, tuple(map(_operand, value.inputs))
        case Item(source=source, index=index):
            return "item", id(source), index
    return id(value)


def _operand(value: Value) -> object:
    if isinstance(value, Param):
        return "param", value.name
    if isinstance(value, Constant):
        return value.data.tobytes(), str(value.data.dtype), value.data.shape
    return ("input", value.name) if isinstance(value, Input) else id(value)


def _frozen(attribute: Any) -> object:
    if isinstance(attribute, Expr):
        return expr_key(attribute)
    if isinstance(attribute, tuple):
        return tuple(map(_frozen, attribute))
    return type(attribute), repr(attribute)
