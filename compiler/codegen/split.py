"""Innermost loops over register tiles that choose between versions of their body, as a loop for each version.

    for k in 20:                                      for k in 19:
      if k < 19:                                        whole(k)
        whole(k)                          ->          for k in 1:
      else:                                             part(k + 19)
        part(k)

An iteration then has no branch but the one back, and what is only at the ends, such as the padding of an image, is
decided while compiling. A condition that the loop does not change is asked once, in front of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from kedge.compiler.codegen.alloc import Alloc, map_statements, statements_of
from kedge.compiler.tir.expr import Binary, Const, Expr, Var, const, logical_and
from kedge.compiler.tir.simplify import Simplifier, conjuncts, lasting, negated, over
from kedge.compiler.tir.stmt import For, If, LoopKind, Seq, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, loads, map_stmt_exprs, seq, substitute_expr

#: Stores, unrolled loops counted out, of all copies of what happens where the condition does not hold.
_MOST_STORES = 384
#: Iterations at the ends are unrolled up to so many stores.
_MOST_UNROLLED = 128


def split_loops(stmt: Stmt) -> Stmt:
    """`stmt`, in which buffers may live inside of loops, with the innermost of these split where conditions change.

    Split are serial loops of a known number of iterations, whose body is an `If` that adds to a buffer in registers (of
    any shape and dtype) and whose condition compares int64 sums of the loop's variable. Parts count from 0 again. The
    same object where no loop is split.
    """
    split = _splits(stmt)
    return stmt if split is stmt else _simplified(split, Simplifier())


def _splits(stmt: Stmt) -> Stmt:
    stmt = map_statements(stmt, _splits)
    if isinstance(stmt, For) and stmt.kind == "serial" and isinstance(stmt.extent, Const) and stmt.extent.value > 1:
        split = _split(stmt, int(stmt.extent.value))
        if split is not None:
            return map_statements(split, _splits)  # what is left of it may have another choice inside
    return stmt


@dataclass(frozen=True, slots=True)
class _Where:
    """A condition holds for iterations [begin, end) of a loop, if what does not depend on these does."""

    begin: int
    end: int
    always: tuple[Expr, ...]


def _split(loop: For, count: int) -> Stmt | None:
    lives, choice = [], loop.body
    while isinstance(choice, Alloc):
        lives.append(choice.buffer)
        choice = choice.body
    if not isinstance(choice, If) or not _is_innermost(choice.then) or not _accumulates(choice.then):
        return None
    where = _where(choice.condition, loop.var, count)
    if where is None or where.begin >= where.end:
        return None

    def part(begin: int, end: int, body: Stmt | None) -> Stmt:
        if begin >= end or body is None:
            return Seq(())
        # At the ends what choices are left depends on the iteration.
        few = (end - begin) < count and (end - begin) * _stores(body) <= _MOST_UNROLLED
        kind: LoopKind = "unrolled" if body is not whole and few and _is_innermost(body) else "serial"
        for buffer in reversed(lives):
            body = Alloc(buffer, body)
        var = Var(loop.var.name)
        return replace(loop, var=var, extent=const(end - begin), kind=kind, body=_moved(body, {loop.var: var + begin}))

    whole, other = choice.then, choice.orelse
    copies = int(where.begin > 0) + int(where.end < count) + int(bool(where.always))
    if copies > 1 and other is not None and copies * _stores(other) > _MOST_STORES:
        return None
    parts = seq(part(0, where.begin, other), part(where.begin, where.end, whole), part(where.end, count, other))
    return If(logical_and(*where.always), parts, part(0, count, other)) if where.always else parts


def _where(condition: Expr, var: Var, count: int) -> _Where | None:
    """Where the condition holds in a loop; None where that is no range of numbers, or data decides."""
    begin, end = 0, count
    always = []
    known = Simplifier({var: over(const(count))})
    for term in conjuncts(condition):
        if any(True for _ in loads(term)):
            return None
        if var not in free_vars(term):
            always.append(term)
            continue
        if not (isinstance(term, Binary) and term.op in ("lt", "le", "gt", "ge")) or term.a.dtype != "int64":
            return None
        small, large = (term.a, term.b) if term.op in ("lt", "le") else (term.b, term.a)
        # The term holds where `factor * var + rest` is not negative.
        distance = known.poly(Binary("sub", large, small)) - known.poly(const(int(term.op in ("lt", "gt"))))
        parts = distance.coefficient(known.poly(var).atoms()[0])
        factor, rest = (None, None) if parts is None else (parts[0].value, parts[1].value)
        if factor is None or rest is None or factor == 0:
            return None
        if factor > 0:
            begin = max(begin, -(rest // factor))
        else:
            end = min(end, rest // -factor + 1)
    return _Where(begin, end, tuple(always))


def _is_innermost(stmt: Stmt) -> bool:
    """Whether no loop is left in a statement once code is emitted for it."""
    if isinstance(stmt, For) and stmt.kind not in ("unrolled", "vectorized"):
        once = isinstance(stmt.extent, Const) and stmt.extent.value <= 1
        return once and _is_innermost(stmt.body)
    return all(_is_innermost(child) for child in statements_of(stmt))


def _stores(stmt: Stmt) -> int:
    """How many stores become code, unrolled loops counted out."""
    if isinstance(stmt, Store):
        return 1
    times = 1
    if isinstance(stmt, For) and stmt.kind == "unrolled" and isinstance(stmt.extent, Const):
        times = int(stmt.extent.value)
    return times * sum(_stores(child) for child in statements_of(stmt))


def _simplified(stmt: Stmt, known: Simplifier) -> Stmt:
    """`stmt` without what the loops and branches around decide."""
    if isinstance(stmt, If):
        condition = known.simplify(stmt.condition)
        then = _simplified(stmt.then, known.assuming(lasting(condition)))
        opposite = negated(condition)
        other = known if opposite is None else known.assuming(lasting(opposite))
        return If(condition, then, None if stmt.orelse is None else _simplified(stmt.orelse, other))
    if not isinstance(stmt, Alloc):
        stmt = map_stmt_exprs(stmt, known.simplify)
    if isinstance(stmt, For):
        known = known.within({stmt.var: over(stmt.extent)})
    return map_statements(stmt, lambda child: _simplified(child, known))


def _accumulates(stmt: Stmt) -> bool:
    """Whether a statement adds to a register tile."""
    if isinstance(stmt, Store):
        return stmt.buffer.scope == "register"
    return any(_accumulates(child) for child in statements_of(stmt))


def _moved(stmt: Stmt, mapping: Mapping[Var, Expr]) -> Stmt:
    moved = stmt if isinstance(stmt, Alloc) else map_stmt_exprs(stmt, lambda expr: substitute_expr(expr, mapping))
    return map_statements(moved, lambda child: _moved(child, mapping))
