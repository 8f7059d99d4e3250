"""Blocks of elements that are transposed in registers: rows are loaded as vectors, columns are what a lane each takes.

    for j in unrolled(16):                            r0, …, r15 = x[0, 0:16], …, x[15, 0:16]
      for i in vectorized(16):                        c0, …, c15 = their columns, by shuffles
        y[j, i] = x[i, j]                    ->       y[0, 0:16], …, y[15, 0:16] = c0, …, c15

One element after the other, that would take a load and an insertion each; so it takes a load and some four shuffles
for each vector. The shuffles exchange halves of the rows, then quarters, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kedge.compiler.codegen.alloc import expressions_of, statements_of
from kedge.compiler.codegen.builder import FunctionBuilder, Value
from kedge.compiler.codegen.together import MAX_UNROLL
from kedge.compiler.schedule.rules.analysis import stride
from kedge.compiler.tir.expr import Binary, Const, Expr, Load, Select, Var, const
from kedge.compiler.tir.simplify import Ranges, conjuncts, over, simplify
from kedge.compiler.tir.stmt import Buffer, For, If, Stmt, Store
from kedge.compiler.tir.visitor import children, free_vars, loads, substitute_expr

#: Rows of fewer elements are loaded one element after the other.
LEAST_ELEMENTS = 4


@dataclass(frozen=True, slots=True)
class Turned:
    """A load that moves by one element with `var`, the variable of an unrolled loop, in its first `count` iterations.

    All of these surely read.
    """

    var: Var
    count: int

    def part(self, number: int, lanes: int) -> tuple[int, int] | None:
        """The first iteration, and the number of them, that are loaded as one vector with iteration `number`."""
        start = 0
        while number < self.count:
            size = min(lanes, 1 << (self.count - start).bit_length() - 1)
            if size < LEAST_ELEMENTS:
                return None
            if number < start + size:
                return start, size
            start += size
        return None


def turned(loop: For, ranges: Ranges) -> dict[Load, Turned]:
    """The loads of vectors under an unrolled loop that move by one element from iteration to iteration.

    `ranges` are those of the variables around. What the loop itself stores is not looked at. Each load, of a buffer of
    any shape and dtype, comes with the variable that moves it and the number of iterations that surely read, at least
    `LEAST_ELEMENTS`. Loads that stand in two places are left out.
    """
    found: dict[Load, list[Turned | None]] = {}
    written = set(_written(loop))
    for load, plan in _plans(loop, (), (), ranges):
        if load.buffer not in written:
            found.setdefault(load, []).append(plan)
    # An expression in two places may be read in one of them only.
    return {load: plans[0] for load, plans in found.items() if len(plans) == 1 and plans[0] is not None}


def _written(stmt: Stmt) -> Iterator[Buffer]:
    if isinstance(stmt, Store):
        yield stmt.buffer
    for child in statements_of(stmt):
        yield from _written(child)


def _plans(
    stmt: Stmt, loops: tuple[For, ...], guards: tuple[Expr, ...], ranges: Ranges
) -> Iterator[tuple[Load, Turned | None]]:
    match stmt:
        case For(kind="unrolled", extent=Const(value=count)) if count <= MAX_UNROLL:
            loops = (*loops, stmt)
        case For(kind="vectorized"):
            for part in _stores_under(stmt.body, guards):
                store, within = part
                if any(load.buffer is store.buffer for load in loads(store.value)):
                    continue
                for load, conditions in _read(store.value, within):
                    yield load, _plan(load, loops, conditions, stmt.var, ranges)
            return
        case For():
            return
        case If(condition=condition, then=then, orelse=orelse):
            yield from _plans(then, loops, (*guards, *conjuncts(condition)), ranges)
            if orelse is not None:
                yield from _plans(orelse, (), guards, ranges)
            return
    for expr in expressions_of(stmt) if isinstance(stmt, Store) else ():
        for load in loads(expr):
            yield load, None
    for child in statements_of(stmt):
        yield from _plans(child, loops, guards, ranges)


def _stores_under(stmt: Stmt, guards: tuple[Expr, ...]) -> Iterator[tuple[Store, tuple[Expr, ...]]]:
    match stmt:
        case Store():
            yield stmt, guards
            return
        case If(condition=condition, then=then, orelse=None):
            yield from _stores_under(then, (*guards, *conjuncts(condition)))
            return
        case If() | For():
            return
    for child in statements_of(stmt):
        yield from _stores_under(child, guards)


def _read(expr: Expr, guards: tuple[Expr, ...]) -> Iterator[tuple[Load, tuple[Expr, ...]]]:
    """The loads of an expression with what decides whether they happen."""
    match expr:
        case Load():
            yield expr, guards
        case Select(condition=condition):
            yield from _read(condition, guards)
            yield from _read(expr.a, (*guards, *conjuncts(condition)))
            yield from _read(expr.b, (*guards, condition))
            return
        case Binary(op="and" | "or", a=first, b=second):
            yield from _read(first, guards)
            yield from _read(second, (*guards, first))
            return
    for child in children(expr):
        yield from _read(child, guards)


def _plan(load: Load, loops: Sequence[For], guards: Sequence[Expr], lane: Var, ranges: Ranges) -> Turned | None:
    known = {**ranges, **{loop.var: over(loop.extent) for loop in loops}}
    for loop in loops:
        if stride(load.indices, load.buffer.shape, loop.var, known) == 1:
            assert isinstance(loop.extent, Const)
            count = _iterations(loop.var, int(loop.extent.value), guards, lane)
            return Turned(loop.var, count) if count >= LEAST_ELEMENTS else None
    return None


def _iterations(var: Var, count: int, guards: Sequence[Expr], lane: Var) -> int:
    """How many of the first iterations surely read, or read under one mask of lanes for all of them."""
    for guard in guards:
        used = set(free_vars(guard))
        if any(True for _ in loads(guard)):
            return 0
        if var not in used:
            if lane not in used:
                return 0  # what was computed in one branch is not known in the next one
            continue
        for number in range(count):
            holds = simplify(substitute_expr(guard, {var: const(number)}))
            if not isinstance(holds, Const) or not holds.value:
                count = number
                break
    return count


def columns(b: FunctionBuilder, rows: Sequence[Value]) -> list[Value]:
    """Transpose: n `rows`, vectors of m elements of one dtype, as m columns, vectors of n. m <= n, both powers of two.

    The columns have an element of each row. Rows are put side by side until there are as many vectors as columns; of
    each square of the vectors, halves are exchanged, then quarters (Eklundh's algorithm).
    """
    count, size = len(rows), rows[0].lanes
    vectors = [_side_by_side(b, rows[first::size]) for first in range(size)]
    half = size // 2
    while half:
        for first in range(size):
            if first & half:
                continue
            above, below = vectors[first], vectors[first + half]
            upper = [lane if not lane & half else count + lane - half for lane in range(count)]
            lower = [lane + half if not lane & half else count + lane for lane in range(count)]
            vectors[first] = _shuffled(b, above, below, upper)
            vectors[first + half] = _shuffled(b, above, below, lower)
        half //= 2
    return vectors


def _side_by_side(b: FunctionBuilder, parts: Sequence[Value]) -> Value:
    """Vectors one after the other."""
    while len(parts) > 1:
        parts = [
            _shuffled(b, first, second, range(2 * first.lanes))
            for first, second in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def _shuffled(b: FunctionBuilder, first: Value, second: Value, picks: Sequence[int]) -> Value:
    mask = ", ".join(f"i32 {pick}" for pick in picks)
    return b.result(
        f"shufflevector {first.typed}, {second.typed}, <{len(picks)} x i32> <{mask}>", first.type, len(picks)
    )  # fmt: skip
