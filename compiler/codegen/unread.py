"""Elements of a private buffer that nothing reads: the lanes of a tile beyond the end of a row.

    for i in unrolled(8):                               for i in unrolled(8):
      for j in vectorized(16):                            for j in vectorized(16):
        if j < 10:                                          if j < 10:
          t[i, j] = t[i, j] + a[i, k] * b[k, j]               y[i, j] = t[i, j]

Nothing reads t[i, 10] and what follows it, so the store may write there whatever its lanes hold, and a sum needs no
blend of old and new lanes at each step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kedge.compiler.codegen.alloc import Alloc, expressions_of, statements_of
from kedge.compiler.tir.expr import INDEX_DTYPE, Binary, Call, Expr, Load, Var, const
from kedge.compiler.tir.simplify import conjuncts, simplify
from kedge.compiler.tir.stmt import Buffer, For, If, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, loads, walk_expr

#: A condition on the element that is accessed: the dim, how its index compares with 0, and what is added to it before.
_Limit: TypeAlias = tuple[int, str, Key]
_SWAPPED = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def writes_freely(stmt: Alloc) -> bool:
    """Whether stores to the buffer may write the lanes, too, that conditions around them leave out.

    They may where every load of it has those conditions, on the same dims of the buffer: then nothing reads what is
    written beyond them.
    """
    accesses = list(_accesses(stmt.body, stmt.buffer, (), ()))
    inside = {var for access in accesses for var in access.loops}
    asked = [access.limits(inside) for access in accesses if access.loads]
    never_beyond = frozenset.intersection(*asked) if asked else frozenset()
    return all(access.may_leave(never_beyond, inside) for access in accesses if not access.loads)


@dataclass(frozen=True, slots=True)
class _Access:
    """A load or store of the buffer, under conditions, inside of loops; `lanes` are those that are vectorized."""

    loads: bool
    indices: tuple[Expr, ...]
    conditions: tuple[Expr, ...]
    loops: tuple[Var, ...]
    lanes: tuple[Var, ...]

    def limits(self, inside: set[Var]) -> frozenset[_Limit]:
        """The conditions that are on the element alone."""
        return frozenset(limit for condition in self.conditions for limit in self._limits(condition, inside))

    def may_leave(self, never_beyond: frozenset[_Limit], inside: set[Var]) -> bool:
        """Whether each condition that differs between lanes only leaves out what nothing reads."""
        return all(
            any(limit in never_beyond for limit in self._limits(condition, inside))
            for condition in self.conditions
            if any(var in self.lanes for var in free_vars(condition))
        )

    def _limits(self, condition: Expr, inside: set[Var]) -> Iterator[_Limit]:
        if not isinstance(condition, Binary) or condition.op not in _SWAPPED or condition.a.dtype != INDEX_DTYPE:
            return
        distance = condition.a - condition.b
        for dim, own in enumerate(self.indices):
            for op, rest in ((condition.op, distance - own), (_SWAPPED[condition.op], const(0) - distance - own)):
                rest = simplify(rest)
                if not any(var in inside for var in free_vars(rest)) and next(loads(rest), None) is None:
                    yield dim, op, expr_key(rest)  # else it may be another at another access


def _accesses(stmt: Stmt, buffer: Buffer, conditions: tuple[Expr, ...], around: Sequence[For]) -> Iterator[_Access]:
    loops = tuple(loop.var for loop in around)
    lanes = tuple(loop.var for loop in around if loop.kind == "vectorized")
    for expr in expressions_of(stmt):
        for node in walk_expr(expr):
            if isinstance(node, Load) and node.buffer is buffer:
                yield _Access(True, node.indices, conditions, loops, lanes)
    if isinstance(stmt, Store) and stmt.buffer is buffer:
        yield _Access(False, stmt.indices, conditions, loops, lanes)
    if isinstance(stmt, If):
        yield from _accesses(stmt.then, buffer, (*conditions, *conjuncts(stmt.condition)), around)
        if stmt.orelse is not None:
            otherwise = Call("not", (stmt.condition,), "bool")
            yield from _accesses(stmt.orelse, buffer, (*conditions, otherwise), around)
        return
    inner = (*around, stmt) if isinstance(stmt, For) else around
    for child in statements_of(stmt):
        yield from _accesses(child, buffer, conditions, inner)
