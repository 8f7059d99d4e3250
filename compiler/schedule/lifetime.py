"""For how long an element of a buffer holds a value that is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kedge.compiler.schedule.dependence import conflict, own_per_iteration
from kedge.compiler.schedule.nest import conjuncts, spatial_conjuncts
from kedge.compiler.schedule.tree import Access, accesses, block_path, blocks_in, loops_on, writers
from kedge.compiler.tir.expr import Binary, Expr, Var
from kedge.compiler.tir.simplify import prove
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc
from kedge.compiler.tir.structural import expr_equal, expr_key
from kedge.compiler.tir.visitor import substitute_expr


def is_free(func: PrimFunc, block: Block, buffer: Buffer, loops: Sequence[For], position: int) -> bool:
    """Whether nothing that is still needed stands where `block` would write `buffer` if it had no predicate.

    That is asked of the beginning of each run of `loops[position]`; `loops` are all those around the block. Iterations
    of the loops further out must use elements of their own. From the innermost loop on that holds every use of the
    buffer they need not, if each of its iterations fills what it reads.
    """
    if writers(func, buffer) != (block,):
        return False
    apart = [conflict(func, loop, loops[:number], [buffer]) is None for number, loop in enumerate(loops[:position])]
    if all(apart):
        return True
    users = [each for each in blocks_in(func.body) if any(a.buffer is buffer for a in accesses(each))]
    common = [loop for loop in loops[:position] if set(map(id, users)).issubset(map(id, blocks_in(loop)))]
    if not common or not all(apart[len(common) :]):
        return False
    home = common[-1]
    if home.kind in ("parallel", "thread") and own_per_iteration(home, buffer):
        return True
    return all(_reads_what_is_filled(func, home, block, each, buffer) for each in users if each is not block)


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
