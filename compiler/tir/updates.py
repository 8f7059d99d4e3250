"""Stores that combine a value with the element they replace: what reductions are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, get_args

from kedge.compiler.tir.expr import Binary, Combiner, Expr, Load
from kedge.compiler.tir.stmt import Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import loads


@dataclass(frozen=True, slots=True)
class Update:
    """`store` is `element = element combined with value`; `value` does not read the buffer itself."""

    store: Store
    combiner: Combiner
    value: Expr


def as_update(stmt: Stmt) -> Update | None:
    """`stmt` as an update; None where it is none."""
    if not isinstance(stmt, Store) or not isinstance(stmt.value, Binary) or stmt.value.op not in get_args(Combiner):
        return None
    for own, value in ((stmt.value.a, stmt.value.b), (stmt.value.b, stmt.value.a)):
        if isinstance(own, Load) and own.buffer is stmt.buffer:
            same = tuple(map(expr_key, own.indices)) == tuple(map(expr_key, stmt.indices))
            if same and all(load.buffer is not stmt.buffer for load in loads(value)):
                return Update(stmt, cast(Combiner, stmt.value.op), value)
    return None
