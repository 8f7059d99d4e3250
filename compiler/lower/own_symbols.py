"""Symbols of a kernel's own: `h` where a tensor is `(h + 3) // 4` long.

A network halves its images again and again, so the dims of its tensors are quotients. A kernel need not know of what:
with a symbol for each, its index arithmetic has no divisions, code generation proves what it must of plain variables,
and layers that are the same but for the sizes of their images share a kernel. The function that calls it computes the
quotients.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any

from kedge.compiler.errors import ShapeError
from kedge.compiler.graph.builder import make_call
from kedge.compiler.graph.dims import factors, plain, product, same_type, substitute
from kedge.compiler.graph.ir import Call, Function, Fused, Input, TensorType, Value
from kedge.compiler.tir.expr import Dim, Expr, Var
from kedge.compiler.tir.simplify import bounds
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, substitute_expr


def with_own_symbols(group: Fused, limits: Mapping[Var, Var]) -> tuple[Fused, Mapping[Var, Expr]]:
    """The group over symbols of its own, and what they stand for; the group itself where that says too little of dims.

    `limits` are the function's symbols with the bounds that its callers keep (`limits.least_sizes`): `(h - 5) // 2 + 1`
    is never negative where images of less than 5 rows are refused.
    Each factor of its inputs' dims that is neither a number nor a symbol becomes one. All other types follow by shape
    inference, which refuses what needs to be known of the factors (that one is half of the other, say); what it gives
    must be what the group had.
    """
    own = _Own(_names(group), limits)
    for argument in group.body.inputs:
        for dim in argument.type.shape:
            own.enter(dim)
    meanings = own.meanings()
    if not meanings:
        return group, meanings
    inputs = tuple(Input(value.name, _type_over(own, value.type)) for value in group.body.inputs)
    made: dict[int, Value] = {id(old): new for old, new in zip(group.body.inputs, inputs, strict=True)}
    for value in group.body.values():
        if isinstance(value, Call):
            attrs = {name: own.over(attr) for name, attr in value.attrs.items()}
            try:
                new = make_call(value.op, [made[id(one)] for one in value.inputs], attrs, value.origin)
            except ShapeError:
                return group, {}
            made[id(value)] = new
        if not same_type(_type_of(made.setdefault(id(value), value).type, meanings), value.type):
            return group, {}
    outputs = tuple(made[id(value)] for value in group.body.outputs)
    body = Function(group.body.name, inputs, outputs, group.body.output_names)
    return Fused(body, group.inputs, tuple(value.type for value in outputs), group.origin), meanings


class _Own:
    """A symbol for each factor."""

    def __init__(self, taken: set[str], limits: Mapping[Var, Var]) -> None:
        self._taken = taken
        self._limits = limits
        self._symbols: dict[Key, tuple[Expr, Var]] = {}

    def enter(self, dim: Dim) -> None:
        """Give each factor of `dim` a symbol, if it is never negative."""
        for factor in factors(dim):
            if isinstance(factor, Expr) and self._is_replaced(factor) and expr_key(factor) not in self._symbols:
                low, high = self._bounds(factor)
                name = self._name(next((var.name for var in free_vars(factor)), "size"))
                self._symbols[expr_key(factor)] = factor, Var(name, lower=low, upper=high)

    def _is_replaced(self, factor: Dim) -> bool:
        """Whether a factor gets a symbol: it is neither a number nor a symbol, and never negative."""
        if isinstance(factor, (int, Var)):
            return False
        low, _ = self._bounds(factor)
        return low is not None and low >= 0

    def _bounds(self, factor: Expr) -> tuple[int | None, int | None]:
        return bounds(substitute_expr(factor, self._limits))

    def _name(self, wanted: str) -> str:
        """A name of its own: symbols are told apart by their names where a kernel is printed or interpreted."""
        names = (wanted if number == 0 else f"{wanted}_{number}" for number in count())
        name = next(name for name in names if name not in self._taken)
        self._taken.add(name)
        return name

    def meanings(self) -> Mapping[Var, Expr]:
        """What the symbols stand for."""
        return {symbol: factor for factor, symbol in self._symbols.values()}

    def over(self, value: Any) -> Any:
        """A dim, an attribute or a tuple of them, with symbols for the factors that have one."""
        if isinstance(value, tuple):
            return tuple(self.over(each) for each in value)
        if not isinstance(value, Expr):
            return value
        new = [self._symbol(factor) for factor in factors(value)]
        return product(new) if any(isinstance(each, Var) for each in new) else value

    def _symbol(self, factor: Dim) -> Dim:
        found = self._symbols.get(expr_key(factor)) if isinstance(factor, Expr) else None
        return factor if found is None else found[1]


def _names(group: Fused) -> set[str]:
    """Of all variables that may stay in the group."""
    types = [value.type for value in (*group.body.inputs, *group.body.values())]
    return {var.name for type_ in types for dim in type_.shape if isinstance(dim, Expr) for var in free_vars(dim)}


def _type_over(own: _Own, type_: TensorType) -> TensorType:
    return TensorType(own.over(type_.shape), type_.dtype, type_.space)


def _type_of(type_: TensorType, meanings: Mapping[Var, Expr]) -> TensorType:
    return TensorType(tuple(plain(substitute(dim, meanings)) for dim in type_.shape), type_.dtype, type_.space)
