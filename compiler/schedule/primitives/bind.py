"""Spreading loops over the threads of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kedge.compiler.schedule.dependence import (
    PRIVATE_SCOPES,
    conflict,
    fetched_alike,
    is_private,
    own_per_iteration,
    reducing_blocks,
)
from kedge.compiler.schedule.tree import accesses, find_loop, loop_path, loops_in, loops_on, refuse, swap
from kedge.compiler.tir.expr import Const, Var
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc
from kedge.compiler.tir.updates import as_update
from kedge.compiler.tir.visitor import free_vars, stores, walk_stmt

#: Axes of a grid of threads. Iterations over "vthread" are one thread's, one after the other.
THREAD_AXES = tuple(f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx", "vthread") for axis in "xyz")


def bind(func: PrimFunc, loop: Var, thread: str) -> PrimFunc:
    """`loop` spread over the threads of an axis such as "blockIdx.x".

    Iterations must not need one another, but for what threads of one group can do together: a reduction over a
    "threadIdx" axis (they combine their partial results), and tiles in shared scope that every iteration would fill
    alike (they fill them once, each its part, if the fetching loop is bound to the same axis).
    """
    if thread not in THREAD_AXES:
        known = ", ".join(THREAD_AXES)
        raise refuse(func, "bind", loop, f"unknown thread axis {thread!r}", hint=f"known: {known}")
    node = find_loop(func, loop)
    assert node is not None, f"{loop.name} is no loop of {func.name}"
    if node.kind != "serial":
        raise refuse(func, "bind", loop, f"it is {node.kind} already", at=node)
    outer = loops_on(loop_path(func, loop)[:-1])
    new = replace(node, kind="thread", thread=thread)
    _check_place(func, node, thread, outer)
    together = thread.startswith("threadIdx.")
    if together and not isinstance(node.extent, Const):
        raise refuse(
            func, "bind", loop, f"its extent is not constant, as the size of a group on {thread} must be", at=node,
            hint='split it by a constant, and bind the outer part to "blockIdx.x"',
        )  # fmt: skip
    for each in (*(one for one in outer if one.thread == thread), *loops_in(node.body)):
        if each.thread == thread:
            _check_nested(func, new, *((each, new) if each in outer else (new, each)))
    combined = _combined(func, node, thread) if together else _no_reduction(func, node, thread)
    _check_threads(func, node, new, outer, combined)
    return swap(func, node, new)


def _check_place(func: PrimFunc, node: For, thread: str, outer: Sequence[For]) -> None:
    """Refuse where loops around or inside are such that no threads can be started there."""
    around = next((each for each in outer if each.kind not in ("serial", "thread")), None)
    if around is not None:
        raise refuse(func, "bind", node.var, f"it stands inside {around.kind} loop {around.var.name!r}", at=around)
    within = next((each for each in loops_in(node.body) if each.kind == "parallel"), None)
    if within is not None:
        raise refuse(
            func, "bind", node.var, f"loop {within.var.name!r} inside is parallel, as only CPUs know it", at=node
        )
    if not thread.startswith("blockIdx."):
        inner = next((each for each in loops_in(node.body) if (each.thread or "").startswith("blockIdx.")), None)
        if inner is not None:
            reason = (
                f"loop {inner.var.name!r} inside is bound to {inner.thread}: groups hold threads, not threads groups"
            )
            raise refuse(func, "bind", node.var, reason, at=node, hint="reorder that loop outside first")
        return
    wrong = next(
        (each for each in outer if each.kind == "thread" and not (each.thread or "").startswith("blockIdx.")), None
    )
    if wrong is not None:
        reason = f"it stands inside loop {wrong.var.name!r}, which is bound to {wrong.thread}: groups hold threads"
        raise refuse(func, "bind", node.var, reason, at=wrong, hint="reorder it outside first, or bind it to threadIdx")
    same = next((each for each in (*outer, *loops_in(node.body)) if each.thread == thread), None)
    if same is not None:
        raise refuse(
            func, "bind", node.var, f"loop {same.var.name!r} on the same nest is bound to {thread} already", at=node,
            hint="fuse the two first, or take another axis",
        )  # fmt: skip


def _check_nested(func: PrimFunc, new: For, outer: For, inner: For) -> None:
    """Refuse unless the inner of two loops on one axis only fills tiles, the same in every iteration of the outer."""
    for store in stores(inner.body):
        if not fetched_alike(outer, store.buffer):
            other = inner if new is outer else outer
            raise refuse(
                func, "bind", new.var,
                f"loop {other.var.name!r} on the same nest is bound to {new.thread} already, and the inner one writes "
                f"{store.buffer.name!r}: that is no tile in shared scope which all iterations of the outer fill alike",
                hint="take another axis, or fuse the two",
            )  # fmt: skip


def _no_reduction(func: PrimFunc, node: For, thread: str) -> frozenset[Buffer]:
    block = next(iter(reducing_blocks(node)), None)
    if block is not None:
        raise refuse(
            func, "bind", node.var, f"block {block.name!r} reduces over it; groups cannot combine their parts", at=node,
            hint='bind it to "threadIdx.x", whose threads combine their results; or rfactor it first',
        )  # fmt: skip
    return frozenset()


def _combined(func: PrimFunc, node: For, thread: str) -> frozenset[Buffer]:
    """The buffer of the one reduction whose partial results the threads combine, where there is one."""
    blocks = reducing_blocks(node)
    if not blocks:
        return frozenset()
    block = blocks[0]
    if len(blocks) > 1:
        reason = f"blocks {block.name!r} and {blocks[1].name!r} both reduce over it"
        raise refuse(func, "bind", node.var, reason, at=node, hint="move one of them out of the loop")
    update = as_update(block.body)
    if update is None:
        reason = f"block {block.name!r} reduces over it, and is no sum, product, smallest or largest of values"
        raise refuse(func, "bind", node.var, reason, at=node)
    inner = [each for each in loops_in(node.body) if any(one is block for one in walk_stmt(each))]
    mine = {node.var, *(each.var for each in inner)}
    for it, binding in zip(block.iters, block.bindings, strict=True):
        loop = next((var for var in free_vars(binding) if var in mine), None)
        if it.kind == "spatial" and loop is not None:
            reason = f"block {block.name!r} reduces over it, but its output depends on loop {loop.name!r} inside"
            raise refuse(func, "bind", node.var, reason, at=node, hint=f"reorder {loop.name} outside of it first")
    other = next((each for each in inner if each.kind == "thread"), None)
    if other is not None:
        reason = f"block {block.name!r} reduces over it and over loop {other.var.name!r} inside, which is bound, too"
        raise refuse(func, "bind", node.var, reason, at=node, hint="fuse the two before binding")
    target = update.store.buffer
    for each in walk_stmt(node):
        if isinstance(each, Block) and each is not block and any(a.buffer is target for a in accesses(each)):
            reason = f"block {each.name!r} inside uses {target.name!r} before all threads have given their part to it"
            raise refuse(func, "bind", node.var, reason, at=node)
    if target.scope in PRIVATE_SCOPES:
        reason = (
            f"block {block.name!r} reduces over it into {target.name!r} in {target.scope} scope, each thread its own"
        )
        raise refuse(func, "bind", node.var, reason, at=node, hint='set_scope(block, "shared") first')
    return frozenset((target,))


def _check_threads(func: PrimFunc, node: For, new: For, outer: Sequence[For], combined: frozenset[Buffer]) -> None:
    """Refuse if iterations of `node` need one another when they run as those of `new`."""
    written = dict.fromkeys(a.buffer for a in accesses(node.body) if a.is_write)
    asked = [
        buffer
        for buffer in written
        if buffer not in combined and not is_private(func, new, buffer) and not fetched_alike(new, buffer)
    ]
    buffer = conflict(func, new, outer, asked)
    if buffer is not None:
        reason = f"its iterations depend on one another through buffer {buffer.name!r}"
        raise refuse(func, "bind", node.var, reason, at=node)
    used = dict.fromkeys(a.buffer for a in accesses(node.body))
    shared = next((b for b in used if own_per_iteration(new, b) and not is_private(func, new, b)), None)
    if shared is not None:
        reason = (
            f"{shared.name!r} in {shared.scope} scope is used outside of it, too, but each iteration would have its own"
        )
        raise refuse(func, "bind", node.var, reason, at=node)
