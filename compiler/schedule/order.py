"""What runs between a block and another place where it would run instead."""

from __future__ import annotations

from collections.abc import Sequence

from kedge.compiler.schedule.tree import accesses, blocks_in, path_to
from kedge.compiler.tir.stmt import Block, Buffer, PrimFunc, Stmt


def before(func: PrimFunc, one: Block, other: Block) -> bool:
    """Whether `one` stands before `other`."""
    order = blocks_in(func.body)
    return order.index(one) < order.index(other)


def overwritten_before(func: PrimFunc, block: Block, target: Stmt) -> tuple[Block, Buffer] | None:
    """A block that may write what `block` reads after it has run and before all of `target`, which comes later, has.

    What `block` computes is no longer to be had there. Also the buffer that is written; None where there is no such.
    """
    order = blocks_in(func.body)
    last = order.index(blocks_in(_apart_from(func, block, target))[-1])
    read = {access.buffer for access in accesses(block) if not access.is_write}
    return _touching(order[order.index(block) + 1 : last + 1], read, only_writes=True)


def touched_since(func: PrimFunc, block: Block, target: Stmt) -> tuple[Block, Buffer] | None:
    """A block that may touch what `block` writes after `target`, which comes earlier, begins and before `block` runs.

    If `block` ran there, that one would meet the new values. Also the buffer that is touched; None where there is no
    such.
    """
    order = blocks_in(func.body)
    first = order.index(blocks_in(_apart_from(func, block, target))[0])
    written = {access.buffer for access in accesses(block) if access.is_write}
    return _touching(order[first : order.index(block)], written, only_writes=False)


def _apart_from(func: PrimFunc, block: Block, target: Stmt) -> Stmt:
    """The outermost statement around `target` without `block`: all of it runs before the block, or all after."""
    path = path_to(func.body, lambda s: s is target)
    return next(s for s in path if not any(each is block for each in blocks_in(s)))


def _touching(blocks: Sequence[Block], buffers: set[Buffer], *, only_writes: bool) -> tuple[Block, Buffer] | None:
    for each in blocks:
        for access in accesses(each):
            if access.buffer in buffers and (access.is_write or not only_writes):
                return each, access.buffer
    return None
