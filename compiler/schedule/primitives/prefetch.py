"""Asking for memory before it is read."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.tree import block_path, find_loop, kind_of, loops_in, loops_on, named, refuse, swap
from kedge.compiler.tir.expr import Const, Load, Var
from kedge.compiler.tir.stmt import Block, For, PrimFunc
from kedge.compiler.tir.visitor import loads, stores, walk_expr

#: Annotations, by buffer how many iterations ahead: at first, or bit by bit. Of these, the loops that can have them.
_KINDS = {"prefetch": ("serial", "unrolled"), "spread": ("serial", "parallel")}
_MAX_OFFSET = 2**31 - 1


def prefetch(func: PrimFunc, block: str, buffer: str, loop: Var, offset: int, *, spread: bool) -> PrimFunc:
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
    key = "spread" if spread else "prefetch"
    problem = _problem(node, buffer, key)
    if problem is not None:
        raise refuse(func, "prefetch", loop, problem[0], at=node, hint=problem[1])
    ahead = {**node.annotations.get(key, {}), buffer: offset}
    return swap(func, node, replace(node, annotations=MappingProxyType({**node.annotations, key: ahead})))


def check_prefetched(before: PrimFunc, func: PrimFunc, primitive: str) -> None:
    """Refuse what `primitive` made of `before` if a loop could not prefetch any more, or would not."""
    for key in _KINDS:
        now, then = ([loop for loop in loops_in(one.body) if key in loop.annotations] for one in (func, before))
        for loop in now:
            for buffer in loop.annotations[key]:
                problem = _problem(loop, buffer, key)
                if problem is not None:
                    raise _too_late(before, primitive, loop, f"it prefetches {buffer!r}, and {problem[0]}")
        if len(now) < len(then):
            kept = {loop.var for loop in now}
            gone = next(loop for loop in then if loop.var not in kept)
            buffers = ", ".join(map(repr, gone.annotations[key]))
            raise _too_late(before, primitive, gone, f"it prefetches {buffers}, and would be gone")


def _too_late(func: PrimFunc, primitive: str, loop: For, reason: str) -> ScheduleError:
    hint = f"in a new Schedule, sch.{primitive} before sch.prefetch"
    return refuse(func, primitive, loop.var, reason, hint=hint)


def _problem(loop: For, buffer: str, key: str) -> tuple[str, str] | None:
    """Why `loop` cannot prefetch `buffer`, and a remedy."""
    if loop.kind not in _KINDS[key]:
        kinds = " or ".join(_KINDS[key])
        return f"it is {kind_of(loop)}", f"take a {kinds} loop, whose iterations come one after the other"
    inside = [load for load in loads(loop.body) if load.buffer.name == buffer]
    if not inside:
        return f"nothing in it reads {buffer!r}", "take a loop around the block that reads it"
    scope = inside[0].buffer.scope
    if scope != "global":
        return f"{buffer!r} is {scope}", "what is private or shared is near already: prefetch what it is filled from"
    if any(isinstance(node, Load) for load in inside for index in load.indices for node in walk_expr(index)):
        return f"where {buffer!r} is read depends on data", "prefetch the buffer that the places are read from"
    return _no_share(loop, buffer) if key == "spread" else None


def _no_share(loop: For, buffer: str) -> tuple[str, str] | None:
    """Why what an iteration of `loop` reads cannot be shared out among the loops inside of it, and a remedy."""
    around = [each for each in loops_in(loop.body) if any(load.buffer.name == buffer for load in loads(each.body))]
    for each in around:
        if not isinstance(each.extent, Const):
            reason = (
                f"loop {each.var.name!r} inside of it, which would ask for a part, has no known number of iterations"
            )
            return reason, "without spread=True each iteration asks at first"
    if not any(each.kind == "serial" for each in around):
        return (
            "no serial loop is inside of it, to ask for a part each",
            "without spread=True each iteration asks at first",
        )
    return None
