"""For how long an element of a buffer holds a value that is needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from kedge.compiler.schedule.dependence import conflict, own_per_iteration
from kedge.compiler.schedule.nest import spatial_conjuncts
from kedge.compiler.schedule.tree import (
    Access,
    accesses,
    block_path,
    blocks_in,
    enclosing,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    users,
    writers,
)
from kedge.compiler.tir.expr import INDEX_DTYPE, Binary, Expr, Load, Select, Var
from kedge.compiler.tir.simplify import Simplifier, conjuncts, prove
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc
from kedge.compiler.tir.structural import expr_equal, expr_key
from kedge.compiler.tir.visitor import children, free_vars, stmt_exprs, substitute_expr, walk_stmt


def is_free(func: PrimFunc, block: Block, buffer: Buffer, loops: Sequence[For], position: int) -> bool:
    """Whether nothing that is still needed stands where `block` would write `buffer` if it had no predicate.

    That is asked of the beginning of each run of `loops[position]`; `loops` are all those around the block. Iterations
    of the loops further out must use elements of their own. From the innermost loop on that holds every use of the
    buffer they need not, if each of its iterations fills what it reads.
    """
    if writers(func, buffer) != (block,) or enclosing(block_path(func, block.name)[:-1]) is not None:
        return False
    used_by = users(func.body, buffer)
    common = [loop for loop in loops[:position] if set(map(id, used_by)).issubset(map(id, blocks_in(loop)))]

    def apart(first: int, last: int) -> bool:
        return all(conflict(func, loops[number], loops[:number], [buffer]) is None for number in range(first, last))

    if not apart(len(common), position):
        return False
    if common:
        home = common[-1]
        if home.kind in ("parallel", "thread") and own_per_iteration(home, buffer):
            return True
        if all(_reads_what_is_filled(func, home, block, each, buffer) for each in used_by if each is not block):
            return True
    return apart(0, len(common))  # last, since this takes longest


def _reads_what_is_filled(func: PrimFunc, home: For, block: Block, reader: Block, buffer: Buffer) -> bool:
    """Whether all that `reader` reads of `buffer` in an iteration of `home`, `block` has written in the same one."""
    inside, limits = blocks_in(home), spatial_conjuncts(block, func.symbols)
    if limits is None or inside.index(reader) < inside.index(block):
        return False
    around_reader = {loop.var: loop for loop in loops_on(block_path(func, reader.name))}
    own = {each.var: each for each in loops_on(block_path(func, block.name)) if each.var not in around_reader}
    found = accesses(home)
    stored = [a.indices for a in found if a.block is block and a.buffer is buffer and a.is_write]
    if len({tuple(map(expr_key, indices)) for indices in stored}) > 1:  # the initialisation's store is one, too
        return False
    held = {expr_key(condition) for condition in conjuncts(reader.predicate)}

    def is_filled(read: Access) -> bool:
        """Whether the block wrote it, at values of its own loops that are those of the reader's loops."""
        at: dict[Var, Var] = {}
        if not all(_alike(a, b, own, at) for a, b in zip(stored[0], read.indices, strict=True)):
            return False
        extents = [(around_reader.get(there), own[var]) for var, there in at.items()]
        fit = all(theirs is not None and prove(theirs.extent <= ours.extent) for theirs, ours in extents)
        return fit and all(expr_key(substitute_expr(limit, at)) in held for limit in limits)

    return all(is_filled(a) for a in found if a.block is reader and a.buffer is buffer)


def _alike(a: Expr, b: Expr, renamed: Collection[Var], names: dict[Var, Var]) -> bool:
    """Whether `b` is `a` with some of the variables `renamed` called otherwise; adds these to `names`."""
    if isinstance(a, Var) and a in renamed:
        return isinstance(b, Var) and names.setdefault(a, b) is b
    if isinstance(a, Binary) and isinstance(b, Binary) and a.op == b.op:
        return _alike(a.a, b.a, renamed, names) and _alike(a.b, b.b, renamed, names)
    return expr_equal(a, b)


def is_kept_from_none(func: PrimFunc, node: For, block: Block, buffer: Buffer) -> bool:
    """Whether other blocks under loop `node` read no element of `buffer` that the predicate of `block` left out.

    Without its predicate the block would fill all of the buffer. What holds it back from an element is put in terms
    of that element's indices, and must not hold of those that are read: given the extents of the reader's iteration
    variables, its predicate, and the conditions of `select` around the load.
    """
    limits = spatial_conjuncts(block, func.symbols)
    if not limits:
        return limits is not None
    own = {loop.var for loop in loops_in(node.body) if any(each is block for each in blocks_in(loop))}
    stored = next(a.indices for a in accesses(node) if a.block is block and a.buffer is buffer and a.is_write)
    simplifier = Simplifier(loop_ranges((*loops_on(loop_path(func, node.var)), *loops_in(node.body))))
    room = [each for limit in limits for each in _nonnegative(limit)]
    if len(room) < len(limits):
        return False

    def is_filled(indices: Sequence[Expr], facts: Sequence[Expr]) -> bool:
        return all(_holds(_at(each, stored, indices, own, simplifier), own, facts, simplifier) for each in room)

    readers = [each for each in blocks_in(node) if each is not block]
    return all(is_filled(*read) for reader in readers for read in _reads(reader, buffer))


def _nonnegative(condition: Expr) -> tuple[Expr, ...]:
    """What is at least 0 where a comparison of indices holds; nothing where that does not say it."""
    match condition:
        case Binary(op="lt" | "gt" | "le" | "ge" as op, a=a, b=b) if a.dtype == INDEX_DTYPE:
            small, large = (a, b) if op in ("lt", "le") else (b, a)
            return (large - small - 1 if op in ("lt", "gt") else large - small,)
    return ()


def _reads(reader: Block, buffer: Buffer) -> Iterator[tuple[tuple[Expr, ...], tuple[Expr, ...]]]:
    """The indices of each load of `buffer` in terms of loops, and what is at least 0 when it counts."""
    env = dict(zip((it.var for it in reader.iters), reader.bindings, strict=True))
    pairs = zip(reader.iters, reader.bindings, strict=True)
    known = [fact for it, binding in pairs for fact in (binding, it.extent - binding - 1)]
    known += [fact for conjunct in conjuncts(reader.predicate) for fact in _nonnegative(conjunct)]

    def visit(expr: Expr, facts: tuple[Expr, ...]) -> Iterator[tuple[tuple[Expr, ...], tuple[Expr, ...]]]:
        if isinstance(expr, Load) and expr.buffer is buffer:
            yield tuple(substitute_expr(index, env) for index in expr.indices), facts
        for child in children(expr):
            chosen = isinstance(expr, Select) and child is expr.a
            conditions = conjuncts(substitute_expr(expr.condition, env)) if chosen and isinstance(expr, Select) else ()
            yield from visit(child, (*facts, *(fact for each in conditions for fact in _nonnegative(each))))

    for part in (reader.body, reader.init):
        for stmt in () if part is None else walk_stmt(part):
            for expr in stmt_exprs(stmt):
                yield from visit(expr, tuple(known))


def _at(room: Expr, stored: Sequence[Expr], read: Sequence[Expr], own: Collection[Var], simplifier: Simplifier) -> Expr:
    """`room` where the element that is stored is the one that is read: as far as can be, without the loops `own`."""

    def left(expr: Expr) -> int:
        return sum(var in own for var in free_vars(expr))

    for there, here in zip(stored, read, strict=True):
        swapped = [simplifier.simplify(room + there - here), simplifier.simplify(room - there + here)]
        room = min(room, *swapped, key=left)
    return room


def _holds(room: Expr, own: Collection[Var], facts: Sequence[Expr], simplifier: Simplifier) -> bool:
    """Whether `room` is at least 0, by itself or because one of the facts is."""
    if any(var in own for var in free_vars(room)):
        return False
    return simplifier.prove(room >= 0) or any(simplifier.prove(room - fact >= 0) for fact in facts)
