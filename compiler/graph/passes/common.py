"""Computing equal things once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kedge.compiler.graph.ir import Call, Function, Item, Module, Value
from kedge.compiler.graph.passes.base import rewrite_function, value_key, with_functions
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
            return value.op, attrs, tuple(map(value_key, value.inputs))
        case Item(source=source, index=index):
            return "item", id(source), index
    return id(value)


def _frozen(attribute: Any) -> object:
    if isinstance(attribute, Expr):
        return expr_key(attribute)
    if isinstance(attribute, tuple):
        return tuple(map(_frozen, attribute))
    return type(attribute), repr(attribute)
