"""Which loops may run their iterations in any order, or at once.

Two iterations of a loop conflict if one writes an element that the other touches. Iterations are shown apart by
looking at one group of neighbouring dims of the buffer at a time: seen as a row-major address, the accesses of a later
iteration must all lie above (or all below) those of an earlier one. That proves what `split` and `fuse` make of
affine accesses; anything else counts as a conflict.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kedge.compiler.schedule.tree import Access, accesses, blocks_in, loop_ranges, loops_in
from kedge.compiler.tir.expr import Expr, Load, Var, as_expr, const
from kedge.compiler.tir.simplify import Simplifier, over
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc, Range
from kedge.compiler.tir.visitor import free_vars, stores, substitute_expr, walk_expr

#: Buffers in these scopes belong to one iteration of a parallel loop.
PRIVATE_SCOPES = frozenset({"local", "register"})


def conflict(func: PrimFunc, loop: For, outer: Sequence[For], buffers: Iterable[Buffer] | None = None) -> Buffer | None:
    """A buffer through which iterations of `loop` (under the loops `outer`) may depend on one another, or None.

    `buffers` limits the question to some; else it is about all that the loop writes, but those that are private to
    an iteration.
    """
    found = accesses(loop.body)
    written = dict.fromkeys(a.buffer for a in found if a.is_write)
    asked = [b for b in written if not is_private(func, loop, b)] if buffers is None else list(buffers)
    for buffer in asked:
        touching = [a for a in found if a.buffer is buffer]
        if any(a.is_write for a in touching) and not _apart(loop, outer, touching):
            return buffer
    return None


def is_private(func: PrimFunc, loop: For, buffer: Buffer) -> bool:
    """Whether every iteration of `loop` has a `buffer` of its own: a local one that is used only inside it."""
    if buffer.scope not in PRIVATE_SCOPES:
        return False
    inside = {id(block) for block in blocks_in(loop)}
    users = [b for b in blocks_in(func.body) if any(a.buffer is buffer for a in accesses(b))]
    return all(id(block) in inside for block in users)


def reduces_over(loop: For) -> Block | None:
    """A block under `loop` whose reduction variables depend on the loop, or None."""
    for block in blocks_in(loop):
        for it, binding in zip(block.iters, block.bindings, strict=True):
            if it.kind == "reduce" and loop.var in free_vars(binding):
                return block
    return None


def updates_in_place(block: Block) -> bool:
    """Whether the block reads back what it writes."""
    written = {store.buffer for store in stores(block.body)}
    return any(a.buffer in written and not a.is_write for a in accesses(block))


def _apart(loop: For, outer: Sequence[For], touching: Sequence[Access]) -> bool:
    """Whether different iterations touch different elements."""
    if any(isinstance(node, Load) for a in touching for index in a.indices for node in walk_expr(index)):
        return False
    renaming, ranges = _second_iteration(loop, outer)
    simplifier = Simplifier(ranges)
    rank = len(touching[0].indices)
    groups = [
        (first, last) for size in range(1, rank + 1) for first in range(rank - size + 1) for last in [first + size]
    ]
    for first, last in groups:
        pairs = [
            (_address(a, first, last), substitute_expr(_address(b, first, last), renaming))
            for a in touching
            for b in touching
            if a.is_write or b.is_write
        ]
        above = all(simplifier.prove(high > low) for low, high in pairs)
        if pairs and (above or all(simplifier.prove(high < low) for low, high in pairs)):
            return True
    return False


def _second_iteration(loop: For, outer: Sequence[For]) -> tuple[dict[Var, Expr], dict[Var, Range]]:
    """A later iteration: the renaming of everything inside the loop, and what is known of all variables."""
    inner = loops_in(loop.body)
    distance = Var("distance")
    renaming: dict[Var, Expr] = {loop.var: loop.var + distance + 1}
    ranges = {**loop_ranges(outer), **loop_ranges((loop, *inner)), distance: over(loop.extent)}
    for each in inner:
        copy = Var(each.var.name)
        renaming[each.var] = copy
        ranges[copy] = Range(const(0), substitute_expr(each.extent, renaming))
    return renaming, ranges


def _address(access: Access, first: int, last: int) -> Expr:
    """The row-major address of an access among the dims `[first, last)` of its buffer."""
    result: Expr = const(0)
    for index, dim in zip(access.indices[first:last], access.buffer.shape[first:last], strict=True):
        result = result * as_expr(dim) + index
    return result
