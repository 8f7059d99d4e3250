"""The prefetches of a loop as statements: one for each cache line that an iteration some way ahead reads.

They come all before an iteration (`prefetches`), or bit by bit with what it does (`spread`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from kedge.compiler.codegen.alloc import Alloc, Prefetch, expressions_of, map_statements, statements_of
from kedge.compiler.codegen.types import byte_size
from kedge.compiler.target.costs import LINE_BYTES
from kedge.compiler.tir.expr import Const, Expr, Load, Var, as_expr, const, eq, minimum
from kedge.compiler.tir.simplify import simplify
from kedge.compiler.tir.stmt import For, If, Seq, Stmt
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, substitute_expr, walk_expr

#: Loops over so many lines are unrolled.
_SHORT = 8


def prefetches(loop: For) -> Iterator[Stmt]:
    """What an iteration of `loop` does first, where it is annotated with offsets in iterations by buffers' names.

    The loops inside of it are stepped through line by line, and to the last element of what lies together: buffers
    begin anywhere, and only what is shorter than a line is likely to be in one. Where the loop itself moves by less
    than a line, only those iterations prefetch that begin one. A buffer that each iteration has for itself is not
    asked for.
    """
    ahead = loop.annotations.get("prefetch", {})
    seen: set[tuple[Key, ...]] = set()
    for load, inner in _loads(loop.body, ()) if ahead else ():
        offset = ahead.get(load.buffer.name)
        key = tuple(expr_key(index) for index in load.indices)
        if offset is not None and key not in seen:
            seen.add(key)
            yield _lines(load, loop, inner, offset)


def spread(loop: For) -> Stmt:
    """The body of `loop`, in which the innermost serial loops around a load share out what is asked for.

    The loop is annotated with offsets in iterations by buffers' names. What the iteration so far ahead reads is asked
    for in the order of memory, as much in each iteration of all serial loops together: where some of them read it
    again, less than a line. A buffer that each iteration has for itself is not asked for.
    """
    ahead = loop.annotations.get("spread", {})
    shares: dict[For, list[Stmt]] = {}
    seen: set[tuple[For, tuple[Key, ...]]] = set()
    for load, inner in _loads(loop.body, ()) if ahead else ():
        offset = ahead.get(load.buffer.name)
        serial = [each for each in inner if each.kind == "serial"]
        if offset is None or not serial:
            continue
        key = (serial[-1], tuple(expr_key(index) for index in load.indices))
        if key not in seen:
            seen.add(key)
            shares.setdefault(serial[-1], []).extend(_share(load, loop, inner, serial, offset))
    return _with_shares(loop.body, shares) if shares else loop.body


def _with_shares(stmt: Stmt, shares: Mapping[For, list[Stmt]]) -> Stmt:
    new = map_statements(stmt, lambda child: _with_shares(child, shares))
    if isinstance(stmt, For) and stmt in shares:
        assert isinstance(new, For)
        return replace(new, body=Seq((*shares[stmt], new.body)))
    return new


def _share(load: Load, loop: For, inner: tuple[For, ...], serial: list[For], offset: int) -> Iterator[Stmt]:
    """What an iteration of the last of the `serial` loops asks for."""
    place, size = _flat(load), byte_size(load.buffer.dtype)
    reading = tuple(each for each in inner if any(each.var in free_vars(index) for index in load.indices))
    run, along = _run(place, reading)
    apart = [each for each in reading if each not in along]
    total, line = run * math.prod(_count(each) for each in apart), LINE_BYTES // size
    each_reads = -(-total // math.prod(_count(each) for each in serial))
    lines = -(-each_reads // line)
    step = each_reads if lines == 1 else lines * line
    # The end is reached early: what is left to ask for then is the last iterations' part, for a whole loop.
    number: Expr = const(0)
    for each in serial[:-1]:
        number = number * as_expr(each.extent) + each.var
    along_last = _count(serial[-1]) * step
    begin = minimum(number * along_last, const(max(0, total - along_last)))
    there: dict[Var, Expr] = {**{each.var: const(0) for each in along}, loop.var: loop.var + offset}
    for part in range(lines):
        at = begin + serial[-1].var * step + part * line
        if apart and run % line == 0:
            # A run that begins within a line ends in one more, and the one before it ended where it begins.
            at = at // line * line + (line - 1)
        rest = at // run if apart else at
        for each in reversed(apart):
            there[each.var] = rest % as_expr(each.extent)
            rest = rest // as_expr(each.extent)
        first, last = load.indices[:-1], load.indices[-1]
        within = at % run if apart else at
        yield Prefetch(
            load.buffer,
            (*(simplify(substitute_expr(i, there)) for i in first), simplify(substitute_expr(last, there)) + within),
        )


def _count(loop: For) -> int:
    assert isinstance(loop.extent, Const), "sch.prefetch refuses loops of unknown length"
    return int(loop.extent.value)


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
    place, size = _flat(load), byte_size(load.buffer.dtype)
    inner = tuple(each for each in inner if any(each.var in free_vars(index) for index in load.indices))
    run, along = _run(place, inner)
    own = _stride(place, loop.var)
    near, lines = _by_line(along, place, size)
    far, rows = _by_line([each for each in inner if each not in along], place, size)

    def at(chosen: Mapping[Var, Expr]) -> Stmt:
        there = {**chosen, loop.var: loop.var + offset}
        return Prefetch(load.buffer, tuple(simplify(substitute_expr(index, there)) for index in load.indices))

    stmt = _nest(lines, at({**far, **near}))
    if own != run and run * size >= LINE_BYTES:  # it may begin within a line, and then ends in one more
        ends = {each.var: as_expr(each.extent) - 1 for each in along}
        stmt = Seq((stmt, at({**far, **ends})))
    stmt, step = _nest(rows, stmt), _per_line(own, size)
    return stmt if step == 1 else If(eq(loop.var % step, 0), stmt)


def _run(place: Expr, loops: Iterable[For]) -> tuple[int, list[For]]:
    """How many elements lie together that loops read, and these loops, innermost last."""
    run, along = 1, list[For]()
    for each in sorted(loops, key=lambda each: _stride(place, each.var) or 0):
        if _stride(place, each.var) == run and isinstance(each.extent, Const):
            run *= int(each.extent.value)
            along.insert(0, each)
    return run, along


def _by_line(loops: Iterable[For], place: Expr, size: int) -> tuple[dict[Var, Expr], list[tuple[Var, Expr]]]:
    """Where loops are line by line, and the loops over lines: variables and extents."""
    at, stepped = dict[Var, Expr](), list[tuple[Var, Expr]]()
    for each in loops:
        step, var = _per_line(_stride(place, each.var), size), Var(f"{each.var.name}_line")
        at[each.var] = var * step
        stepped.append((var, simplify((each.extent + (step - 1)) // step)))
    return at, stepped


def _nest(loops: Iterable[tuple[Var, Expr]], stmt: Stmt) -> Stmt:
    for var, count in reversed(list(loops)):
        short = isinstance(count, Const) and count.value <= _SHORT
        stmt = For(var, count, "unrolled" if short else "serial", stmt)
    return stmt


def _flat(load: Load) -> Expr:
    place: Expr = const(0)
    for index, dim in zip(load.indices, load.buffer.shape, strict=True):
        place = place * as_expr(dim) + index
    return place


def _stride(place: Expr, var: Var) -> int | None:
    """Elements between what neighbouring iterations read; None where that is not known, and for none."""
    stride = simplify(substitute_expr(place, {var: var + const(1)}) - place)
    return int(stride.value) or None if isinstance(stride, Const) else None


def _per_line(stride: int | None, size: int) -> int:
    """How many iterations it takes to read another line, if neighbours are that near."""
    return 1 if stride is None else max(1, LINE_BYTES // (abs(stride) * size))
