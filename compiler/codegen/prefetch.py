"""The prefetches of a loop as statements: one for each cache line that an iteration some way ahead reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from kedge.compiler.codegen.alloc import Alloc, Prefetch, expressions_of, statements_of
from kedge.compiler.codegen.types import byte_size
from kedge.compiler.tir.expr import Const, Expr, Load, Var, as_expr, const, eq
from kedge.compiler.tir.simplify import simplify
from kedge.compiler.tir.stmt import Buffer, For, If, Stmt
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, substitute_expr, walk_expr

#: Of every processor that kedge knows; a longer line is asked for twice.
LINE_BYTES: Final = 64
#: Loops over so many lines are unrolled.
_SHORT = 8


def prefetches(loop: For) -> Iterator[Stmt]:
    """What an iteration of `loop` does first, where it is annotated with offsets in iterations by buffers' names.

    The loops inside of it are stepped through line by line; where the loop itself moves by less than a line, only
    those iterations prefetch that begin one. A buffer that each iteration has for itself is not asked for.
    """
    ahead = loop.annotations.get("prefetch", {})
    seen: set[tuple[Key, ...]] = set()
    for load, inner in _loads(loop.body, ()) if ahead else ():
        offset = ahead.get(load.buffer.name)
        key = tuple(expr_key(index) for index in load.indices)
        if offset is not None and key not in seen:
            seen.add(key)
            yield _lines(load, loop, inner, offset)


def _loads(stmt: Stmt, inner: tuple[For, ...]) -> Iterator[tuple[Load, tuple[For, ...]]]:
    """The loads in a statement of what is alive around it, each with the loops that are around the load in there."""
    for expr in expressions_of(stmt):
        for node in walk_expr(expr):
            if isinstance(node, Load):
                yield node, inner
    around = (*inner, stmt) if isinstance(stmt, For) else inner
    own = stmt.buffer if isinstance(stmt, Alloc) else None
    for child in statements_of(stmt):
        yield from ((load, loops) for load, loops in _loads(child, around) if load.buffer is not own)


def _lines(load: Load, loop: For, inner: tuple[For, ...], offset: int) -> Stmt:
    place = _flat(load)
    indices = load.indices
    loops: list[tuple[Var, Expr]] = []
    for each in inner:
        if any(each.var in free_vars(index) for index in indices):
            step = _step(place, each.var, load.buffer)
            var = Var(f"{each.var.name}_line")
            indices = tuple(substitute_expr(index, {each.var: var * step}) for index in indices)
            count = simplify((each.extent + (step - 1)) // step)
            loops.append((var, count))
    indices = tuple(simplify(substitute_expr(index, {loop.var: loop.var + offset})) for index in indices)
    stmt: Stmt = Prefetch(load.buffer, indices)
    for var, count in reversed(loops):
        short = isinstance(count, Const) and count.value <= _SHORT
        stmt = For(var, count, "unrolled" if short else "serial", stmt)
    own = _step(place, loop.var, load.buffer)
    return stmt if own == 1 else If(eq(loop.var % own, 0), stmt)


def _flat(load: Load) -> Expr:
    place: Expr = const(0)
    for index, dim in zip(load.indices, load.buffer.shape, strict=True):
        place = place * as_expr(dim) + index
    return place


def _step(place: Expr, var: Var, buffer: Buffer) -> int:
    """How many iterations of `var` it takes to read another line, if neighbours are that near."""
    stride = simplify(substitute_expr(place, {var: var + const(1)}) - place)
    if not isinstance(stride, Const) or stride.value == 0:
        return 1
    return max(1, LINE_BYTES // (abs(int(stride.value)) * byte_size(buffer.dtype)))
