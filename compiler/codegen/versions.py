"""Tiles in versions: the same loops without conditions where these provably hold, and with them elsewhere.

    for i in (n + 15) // 16:                          for i in (n + 15) // 16:
      for j in vectorized(16):                          if n > i * 16 + 15:
        if i * 16 + j < n:                   ->           for j in vectorized(16):
          y[i * 16 + j] = x[i * 16 + j]                     y[i * 16 + j] = x[i * 16 + j]
                                                        else: … as before

One comparison per tile stands for one per element. What must hold for a tile is the condition in its worst case over
the lanes, unrolled loops and short loops of the tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from kedge.compiler.tir.expr import Binary, Const, Expr, Select, Var, const, logical_and
from kedge.compiler.tir.simplify import Simplifier, conjuncts, negated, over, simplify
from kedge.compiler.tir.stmt import For, If, Range, Seq, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import (
    children,
    free_vars,
    loads,
    map_children,
    map_stmt_children,
    map_stmt_exprs,
    stmt_children,
)

#: A serial loop is looked through for the worst case of a condition only if it is this short.
_SHORT = 16
#: A tile of more stores than this, unrolled loops counted out, is not copied for the sake of a choice.
_MOST_STORES = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    """A condition of some statement below: where `sure` holds, every instance of `conjunct` does."""

    conjunct: Expr
    sure: Expr
    depth: int  # of the innermost loop that `sure` depends on; 0: none


# Predicates -----------------------------------------------------------------------------------------------------


def version_tiles(stmt: Stmt) -> Stmt:
    """`stmt` with each tile once without its predicates, where they provably hold, and once with them."""
    claims = list(_claims(stmt, ()))
    if not claims:
        return stmt
    return _version(stmt, max(claim.depth for claim in claims), 0, ())


def _version(stmt: Stmt, depth: int, level: int, path: tuple[For, ...]) -> Stmt:
    """Put the choice between versions right under the loop at `depth`, in every nest that has one."""
    if level < depth:
        if isinstance(stmt, For):
            body = _version(stmt.body, depth, level + 1, (*path, stmt))
            return stmt if body is stmt.body else replace(stmt, body=body)
        return map_stmt_children(stmt, lambda child: _version(child, depth, level, path))
    sure: dict[Key, Expr] = {}
    dropped: set[int] = set()
    for claim in _claims(stmt, path):
        # What never holds for a whole tile stays in both versions.
        if claim.depth <= depth and not _is_false(claim.sure):
            sure.setdefault(expr_key(claim.sure), claim.sure)
            dropped.add(id(claim.conjunct))
    return If(logical_and(*sure.values()), _without(stmt, dropped), stmt) if dropped else stmt


def _claims(stmt: Stmt, path: tuple[For, ...]) -> Iterator[_Claim]:
    """The conjuncts of every `If` below whose worst case depends on fewer loops than they do."""
    if isinstance(stmt, For):
        yield from _claims(stmt.body, (*path, stmt))
        return
    if isinstance(stmt, If) and stmt.orelse is None:
        for conjunct in conjuncts(stmt.condition):
            claim = _claim(conjunct, path)
            if claim is not None:
                yield claim
    for child in stmt_children(stmt):
        yield from _claims(child, path)


def _claim(conjunct: Expr, path: Sequence[For]) -> _Claim | None:
    if not (isinstance(conjunct, Binary) and conjunct.op in ("lt", "le", "gt", "ge")) or conjunct.a.dtype != "int64":
        return None
    if any(True for _ in loads(conjunct)):
        return None  # what a tile finds in memory may be what it stored there
    used = set(free_vars(conjunct))
    inside = [loop for loop in path if loop.var in used]
    eliminated: list[Var] = []
    for loop in reversed(inside):
        if not isinstance(loop.extent, Const):
            break
        short = loop.extent.value <= _SHORT and len(eliminated) < len(inside) - 1
        if loop.kind not in ("vectorized", "unrolled") and not short:
            break
        eliminated.insert(0, loop.var)
    ranges = {loop.var: over(loop.extent) for loop in path}
    sure = _worst_case(conjunct, eliminated, ranges)
    if sure is None:
        return None
    rest = set(free_vars(sure))
    depth = max((i + 1 for i, loop in enumerate(path) if loop.var in rest), default=0)
    # Directly around the condition a version would save nothing over the condition itself.
    return _Claim(conjunct, sure, depth) if depth < len(path) else None


def _worst_case(conjunct: Binary, eliminated: Sequence[Var], ranges: Mapping[Var, Range]) -> Expr | None:
    """A condition without the eliminated variables that implies `conjunct` for all their values, if one is known."""
    small, large = (conjunct.a, conjunct.b) if conjunct.op in ("lt", "le") else (conjunct.b, conjunct.a)
    simplifier = Simplifier(ranges)
    span = simplifier.span(Binary("sub", large, small), eliminated)
    if span is None:
        return None
    least = simplifier.expr_of(span[0])
    return simplify(Binary("gt" if conjunct.op in ("lt", "gt") else "ge", least, const(0)), ranges)


def _is_false(condition: Expr) -> bool:
    return isinstance(condition, Const) and not condition.value


def _without(stmt: Stmt, dropped: set[int]) -> Stmt:
    """`stmt` with those conjuncts (by identity) taken for true."""
    if isinstance(stmt, If) and stmt.orelse is None:
        terms = [term for term in conjuncts(stmt.condition) if id(term) not in dropped]
        then = _without(stmt.then, dropped)
        return If(logical_and(*terms), then) if terms else then
    return map_stmt_children(stmt, lambda child: _without(child, dropped))


# Choices --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """A `select` between values of which one is read from memory, and where all of a tile takes one side of it."""

    condition: Expr
    first: Expr | None  # where this holds all of the tile takes the first side; None: nowhere, as far as is known
    second: Expr | None
    depth: int


def version_choices(stmt: Stmt) -> Stmt:
    """`stmt` with each tile that chooses between values in up to three versions: all one, all the other, mixed."""
    return _choose(stmt, ())


def _choose(stmt: Stmt, path: tuple[For, ...]) -> Stmt:
    if isinstance(stmt, Seq):
        return map_stmt_children(stmt, lambda child: _choose(child, path))
    if isinstance(stmt, If) and stmt.orelse is not None:  # a tile in versions: the one that counts
        then = _choose(stmt.then, path)
        return stmt if then is stmt.then else replace(stmt, then=then)
    found = {expr_key(choice.condition): choice for choice in _choices(stmt, path)}
    if not found:
        return stmt
    if max(choice.depth for choice in found.values()) > len(path):
        if isinstance(stmt, For):
            body = _choose(stmt.body, (*path, stmt))
            return stmt if body is stmt.body else replace(stmt, body=body)
        return map_stmt_children(stmt, lambda child: _choose(child, path))
    if _stores(stmt) > _MOST_STORES:
        return stmt
    result = stmt
    if len(found) == 1:
        ((key, choice),) = found.items()
        if choice.second is not None:
            result = If(choice.second, _choose(_taking(stmt, {key}, first=False), path), result)
    firsts = [choice.first for choice in found.values() if choice.first is not None]
    if len(firsts) == len(found):
        result = If(logical_and(*firsts), _choose(_taking(stmt, set(found), first=True), path), result)
    return result


def _choices(stmt: Stmt, path: tuple[For, ...]) -> Iterator[_Choice]:
    """The outermost choices of every store below that tiles may be spared."""
    if isinstance(stmt, For):
        path = (*path, stmt)
    elif isinstance(stmt, Store):
        for select in _outermost(stmt.value):
            choice = _choice(select, path)
            if choice is not None:
                yield choice
    for child in stmt_children(stmt):
        yield from _choices(child, path)


def _outermost(expr: Expr) -> Iterator[Select]:
    if isinstance(expr, Select):
        if any(True for side in (expr.a, expr.b) for _ in loads(side)):
            yield expr
        return
    for child in children(expr):
        yield from _outermost(child)


def _choice(select: Select, path: tuple[For, ...]) -> _Choice | None:
    terms = tuple(conjuncts(select.condition))
    claims = [_claim(term, path) for term in terms]
    sure = [claim for claim in claims if claim is not None and not _is_false(claim.sure)]
    first = logical_and(*(claim.sure for claim in sure)) if len(sure) == len(terms) else None
    opposite = negated(terms[0]) if len(terms) == 1 else None
    other = None if opposite is None else _claim(opposite, path)
    if other is not None and _is_false(other.sure):
        other = None
    if first is None and other is None:
        return None
    depth = max(claim.depth for claim in (*(sure if first is not None else ()), *((other,) if other else ())))
    return _Choice(select.condition, first, None if other is None else other.sure, depth)


def _taking(stmt: Stmt, conditions: set[Key], *, first: bool) -> Stmt:
    """`stmt` with one side of the choices on those conditions."""

    def take(expr: Expr) -> Expr:
        new = map_children(expr, take)
        if isinstance(new, Select) and expr_key(new.condition) in conditions:
            return new.a if first else new.b
        return new

    if isinstance(stmt, Store):
        return map_stmt_exprs(stmt, take)
    return map_stmt_children(stmt, lambda child: _taking(child, conditions, first=first))


def _stores(stmt: Stmt) -> int:
    """How many stores become code, unrolled loops counted out."""
    if isinstance(stmt, Store):
        return 1
    times = 1
    if isinstance(stmt, For) and stmt.kind == "unrolled" and isinstance(stmt.extent, Const):
        times = int(stmt.extent.value)
    return times * sum(_stores(child) for child in stmt_children(stmt))
