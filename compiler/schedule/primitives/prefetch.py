"""Asking for memory before it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from kedge.compiler.schedule.tree import block_path, find_loop, kind_of, loops_in, loops_on, named, refuse, swap
from kedge.compiler.tir.expr import Load, Var
from kedge.compiler.tir.stmt import Block, For, PrimFunc
from kedge.compiler.tir.visitor import loads, stores, walk_expr

_KINDS = ("serial", "unrolled")
_MAX_OFFSET = 2**31 - 1


def prefetch(func: PrimFunc, block: str, buffer: str, loop: Var, offset: int) -> PrimFunc:
    """`func` with each iteration of `loop` asking for what `block` reads of `buffer` in the `offset`-th after it."""
    path = block_path(func, block)
    node, target = find_loop(func, loop), path[-1]
    assert node is not None and isinstance(target, Block)
    if node not in path:
        hint = f"it takes one of {named(loops_on(path)) or 'no loops: there are none'}"
        raise refuse(func, "prefetch", loop, f"it is not around block {block!r}", hint=hint)
    own = {store.buffer for store in stores(target)}
    read = {load.buffer.name: load.buffer for load in loads(target.body) if load.buffer not in own}
    if buffer not in read:
        reason = f"block {block!r} does not read {buffer!r}"
        raise refuse(func, "prefetch", loop, reason, hint=f"it reads {', '.join(map(repr, read)) or 'no other buffer'}")
    if not 1 <= offset <= _MAX_OFFSET:
        reason = f"offset={offset} is not between 1 and {_MAX_OFFSET}"
        raise refuse(func, "prefetch", loop, reason, hint="take as many iterations as memory needs time for")
    problem = _problem(node, buffer)
    if problem is not None:
        raise refuse(func, "prefetch", loop, problem[0], at=node, hint=problem[1])
    ahead = {**_ahead(node), buffer: offset}
    return swap(func, node, replace(node, annotations=MappingProxyType({**node.annotations, "prefetch": ahead})))


def check_prefetched(before: PrimFunc, func: PrimFunc, primitive: str) -> None:
    """Refuse what `primitive` made of `before` if a loop could not prefetch any more, or would not."""
    now, then = ([loop for loop in loops_in(one.body) if _ahead(loop)] for one in (func, before))
    for loop in now:
        for buffer in _ahead(loop):
            problem = _problem(loop, buffer)
            if problem is not None:
                reason = f"it prefetches {buffer!r}, and {problem[0]}"
                raise refuse(
                    before, primitive, loop.var, reason, hint=f"in a new Schedule, sch.{primitive} before sch.prefetch"
                )
    if len(now) < len(then):
        kept = {loop.var for loop in now}
        gone = next(loop for loop in then if loop.var not in kept)
        reason = f"it prefetches {', '.join(map(repr, _ahead(gone)))}, and would be gone"
        raise refuse(
            before, primitive, gone.var, reason, hint=f"in a new Schedule, sch.{primitive} before sch.prefetch"
        )


def _ahead(loop: For) -> Mapping[str, int]:
    found: Mapping[str, int] = loop.annotations.get("prefetch", {})
    return found


def _problem(loop: For, buffer: str) -> tuple[str, str] | None:
    """Why `loop` cannot prefetch `buffer`, and a remedy."""
    if loop.kind not in _KINDS:
        return f"it is {kind_of(loop)}", "take a serial or unrolled loop, whose iterations come one after the other"
    inside = [load for load in loads(loop.body) if load.buffer.name == buffer]
    if not inside:
        return f"nothing in it reads {buffer!r}", "take a loop around the block that reads it"
    scope = inside[0].buffer.scope
    if scope != "global":
        return f"{buffer!r} is {scope}", "what is private or shared is near already: prefetch what it is filled from"
    if any(isinstance(node, Load) for load in inside for index in load.indices for node in walk_expr(index)):
        return f"where {buffer!r} is read depends on data", "prefetch the buffer that the places are read from"
    return None
