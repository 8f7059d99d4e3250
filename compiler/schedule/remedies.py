"""What refusals of several primitives tell to do instead: calls on the function at hand."""

from __future__ import annotations

from kedge.compiler.schedule.dependence import reusing, tied_to
from kedge.compiler.schedule.nest import is_one, loop_vars, resolved
from kedge.compiler.schedule.tree import (
    block_path,
    blocks_in,
    enclosing,
    handle,
    intermediate,
    loops_on,
    readers,
    writers,
)
from kedge.compiler.tir.expr import Const, Load, Var
from kedge.compiler.tir.flatten import holds_blocks
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc, Store
from kedge.compiler.tir.visitor import loads, stores


def loops_around(func: PrimFunc, block: Block) -> tuple[For, ...]:
    """The loops around a block, outermost first."""
    return loops_on(block_path(func, block.name))


def reduces(block: Block) -> bool:
    """Whether a block is a reduction."""
    return block.init is not None or any(it.kind == "reduce" for it in block.iters)


def cache_write_call(func: PrimFunc, block: Block) -> str | None:
    """A call that has the block write a small buffer; None where it has no loop for that.

    The loop is the outermost one whose part of the output has a constant size.
    """
    if holds_blocks(block):
        return None
    reducing, wanted = loop_vars(resolved(func, block), "reduce"), None
    path = block_path(func, block.name)
    outer = enclosing(path[:-1])
    if outer is not None and any(loop.var in reducing for loop in loops_on(path[: path.index(outer)])):
        return None
    for loop in reversed(loops_on(path if outer is None else path[path.index(outer) :])):
        wanted = loop if loop.var not in reducing else None
        if not isinstance(loop.extent, Const):
            break
    return None if wanted is None else f"sch.cache_write({block.name}, {handle(func, wanted)})"


def inline_call(func: PrimFunc, buffer: Buffer) -> str | None:
    """A call that has the readers of a buffer compute it; None where its block is not one for that."""
    makers = writers(func, buffer)
    plain = len(makers) == 1 and intermediate(func, buffer) and isinstance(makers[0].body, Store)
    if (
        not plain
        or reduces(makers[0])
        or tied_to(func, makers[0]) is not None
        or any(load.buffer is buffer for load in loads(makers[0].body))
    ):
        return None
    return f"sch.compute_inline({makers[0].name})"


def other_way(func: PrimFunc, buffer: Buffer) -> str:
    """The hint where a reader cannot go to where its buffer is made: the maker can go to the reader."""
    call = inline_call(func, buffer)
    if call is not None:
        return f"the block that computes {buffer.name!r} can go into its readers instead: {call}"
    makers = [block for block in writers(func, buffer) if intermediate(func, buffer)]
    users = [block for block in readers(func, buffer) if loops_around(func, block)]
    if makers and users:
        loop = loops_around(func, users[0])[0]
        return f"move the block that computes {buffer.name!r} to its readers: sch.compute_at with {_loop(func, loop)}"
    return f"leave it in loops of its own, where all of {buffer.name!r} is there"


def _loop(func: PrimFunc, loop: For) -> str:
    return f"loop {handle(func, loop)}"


def merge_call(func: PrimFunc, block: Block) -> tuple[str, Block] | None:
    """Calls that merge a block into the one that computes what it reads, and that one; None where there is none."""
    for buffer in dict.fromkeys(load.buffer for load in loads(block.body)):
        makers = writers(func, buffer)
        if not intermediate(func, buffer) or len(makers) != 1 or readers(func, buffer) != (block,):
            continue
        if not _reads_each_once(block, buffer):
            continue
        merge = f"sch.reverse_compute_inline({block.name})"
        if not reduces(makers[0]):
            return merge, makers[0]
        first = cache_write_call(func, makers[0])
        if first is not None:
            return f"{first}; {merge}", makers[0]
    return None


def _reads_each_once(block: Block, buffer: Buffer) -> bool:
    """Whether a block reads one element of `buffer` for each of its own, and another one each time."""
    wanted = {it.var for it in block.iters if not is_one(it.extent)}
    return all(
        wanted.issubset(load.indices) and all(isinstance(index, (Var, Const)) for index in load.indices)
        for load in loads(block.body)
        if load.buffer is buffer
    )


def why_tied(func: PrimFunc, primitive: str, block: Block, buffer: Buffer) -> tuple[str, str]:
    """Why a block cannot leave its loops because of a buffer that it uses, and what to do."""
    reused = reusing(func, buffer)
    if reused is None:
        reason = f"{buffer.name!r} is in {buffer.scope} scope, of which each iteration of the loops around has its own"
        makers = writers(func, buffer)
        return reason, f'sch.set_scope({makers[0].name}, "global"); sch.{primitive} after that' if makers else ""
    writer, loop = reused
    if loop in loop_vars(writer, "reduce"):
        reason = f"loop {loop.name!r} drives both the output and the reduction of block {writer.name!r}"
        return reason, f"in a new Schedule, sch.{primitive} before sch.fuse of these loops"
    reason = f"{buffer.name!r} is filled again in each iteration of loop {loop.name!r}, so its blocks cannot leave that"
    value = block.body.value if isinstance(block.body, Store) else None
    if isinstance(value, Load) and block.name == writer.name:
        call = inline_call(func, value.buffer)
        if call is not None:
            return reason, f"inline what it copies: {call}"
    return reason, f"in a new Schedule, sch.{primitive} before sch.cache_read or sch.cache_write"


def copied_by(func: PrimFunc, block: Block) -> Buffer | None:
    """The buffer of which a block makes a small copy, as `cache_read` has it do; None for any other block."""
    body = block.body
    if not isinstance(body, Store) or not isinstance(body.value, Load) or not intermediate(func, body.buffer):
        return None
    return body.value.buffer if reusing(func, body.buffer) is not None else None


def consumers_outside(func: PrimFunc, node: For, block: Block) -> list[Block]:
    """The blocks outside of loop `node` that must move into it before `block` can, last ones first.

    Empty where one of them computes what is needed elsewhere, too.
    """
    inside = {id(each) for each in blocks_in(node)}
    moved: list[Block] = []
    for each in reversed(blocks_in(func.body)):
        written = {store.buffer for store in stores(each)}
        users = [user for buffer in written for user in readers(func, buffer)]
        here = [id(user) in inside or any(user is one for one in moved) for user in users]
        if each is block:
            return moved if users and all(here) else []
        if id(each) not in inside and users and all(here) and all(intermediate(func, b) for b in written):
            moved.append(each)
    return []
