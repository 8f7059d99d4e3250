"""Spreading loops over the threads of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches

from kedge.compiler.schedule.dependence import (
    PRIVATE_SCOPES,
    conflict,
    fetched_alike,
    is_private,
    own_per_iteration,
    reducing_blocks,
)
from kedge.compiler.schedule.primitives.loops import one_for_all, over_outputs, own_copies, reorder, split
from kedge.compiler.schedule.tree import (
    accepted,
    accesses,
    blocks_in,
    find_loop,
    handle,
    kind_of,
    loop_path,
    loops_in,
    loops_on,
    of_kind,
    refuse,
    setter,
    swap,
    users,
    which,
)
from kedge.compiler.tir.expr import Const, Var
from kedge.compiler.tir.flatten import flattened
from kedge.compiler.tir.stmt import Buffer, For, PrimFunc
from kedge.compiler.tir.updates import as_update
from kedge.compiler.tir.visitor import free_vars, stores

#: Axes of a grid of threads. Iterations over "vthread" are one thread's, one after the other.
THREAD_AXES = tuple(f"{kind}.{axis}" for kind in ("blockIdx", "threadIdx", "vthread") for axis in "xyz")
#: A size of groups that every GPU has.
_GROUP = 256


def bind(func: PrimFunc, loop: Var, thread: str) -> PrimFunc:
    """`loop` spread over the threads of an axis such as "blockIdx.x".

    Iterations must not need one another, but for what threads of one group can do together: a reduction over a
    "threadIdx" axis (they combine their partial results), and tiles in shared scope that every iteration would fill
    alike (they fill them once, each its part, if the fetching loop is bound to the same axis).
    """
    if thread not in THREAD_AXES:
        known, close = ", ".join(THREAD_AXES), get_close_matches(thread, THREAD_AXES, 1)
        hint = f"did you mean sch.bind({loop.name}, {_quoted(close[0])})?" if close else f"there are {known}"
        raise refuse(func, "bind", loop, f"thread={thread!r} is no axis of threads", hint=hint)
    node = find_loop(func, loop)
    assert node is not None, f"{loop.name} is no loop of {func.name}"
    if node.kind != "serial":
        hint = "nothing takes that back: take another loop"
        if node.kind != "thread":
            hint = f"nothing takes that back: in a new Schedule, sch.bind in place of sch.{setter(node)}"
        raise refuse(func, "bind", loop, f"it is {kind_of(node)} already", at=node, hint=hint)
    outer = loops_on(loop_path(func, loop)[:-1])
    new = replace(node, kind="thread", thread=thread)
    _check_place(func, node, thread, outer)
    together = thread.startswith("threadIdx.")
    if together and not isinstance(node.extent, Const):
        raise refuse(
            func, "bind", loop, f"its extent is not constant, as the size of a group on {thread} must be", at=node,
            hint=_constant_part(func, node, thread),
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
        reason = f"it stands inside {of_kind(func, around)}"
        if around.kind == "parallel":
            reason += ": threads of a CPU start none of a GPU"
            hint = f"in a new Schedule, sch.bind in place of sch.parallel for loop {around.var.name!r}"
        else:
            hint = f"in a new Schedule, sch.bind before sch.{setter(around)}"
        raise refuse(func, "bind", node.var, reason, at=around, hint=hint)
    within = next((each for each in loops_in(node.body) if each.kind == "parallel"), None)
    if within is not None:
        reason = f"{of_kind(func, within)} is inside: threads of a GPU start none of a CPU"
        hint = f"in a new Schedule, sch.bind in place of sch.parallel for loop {within.var.name!r}"
        raise refuse(func, "bind", node.var, reason, at=node, hint=hint)
    mine = node.var.name
    if not thread.startswith("blockIdx."):
        inner = next((each for each in loops_in(node.body) if (each.thread or "").startswith("blockIdx.")), None)
        if inner is not None:
            reason = f"it holds {of_kind(func, inner)}: groups hold threads, threads do not hold groups"
            hint = "take a loop inside of that one"
            if accepted(lambda: reorder(func, [inner.var, node.var])):
                hint = f"sch.reorder({handle(func, inner, node)}, {mine}); sch.bind({mine}, {_quoted(thread)})"
            raise refuse(func, "bind", node.var, reason, at=node, hint=hint)
        return
    wrong = next(
        (each for each in outer if each.kind == "thread" and not (each.thread or "").startswith("blockIdx.")), None
    )
    if wrong is not None:
        reason = f"it stands inside {of_kind(func, wrong)}: groups hold threads, threads do not hold groups"
        hint = f"sch.bind({mine}, {_quoted(_free_axis(node, outer, 'threadIdx.x'))})"
        if accepted(lambda: reorder(func, [node.var, wrong.var])):
            hint = f"sch.reorder({mine}, {handle(func, wrong, node)}); sch.bind({mine}, {_quoted(thread)}), or {hint}"
        raise refuse(func, "bind", node.var, reason, at=wrong, hint=hint)
    same = next((each for each in (*outer, *loops_in(node.body)) if each.thread == thread), None)
    if same is not None:
        reason = f"{which(func, same)} on the same nest is bound to {thread} already"
        raise refuse(func, "bind", node.var, reason, at=node, hint=_another_axis(func, node, same, thread, outer))


def _another_axis(func: PrimFunc, node: For, other: For, thread: str, outer: Sequence[For]) -> str:
    """The hint where two loops would be on one axis."""
    free = _free_axis(node, outer, thread)
    ways = [f"take another axis: sch.bind({node.var.name}, {_quoted(free)})"] if free != thread else []
    pair = (other, node) if other in outer else (node, other)
    if pair[0].body is pair[1] and not any(map(reducing_blocks, pair)):
        names = ", ".join(handle(func, each, node) for each in pair)
        ways.append(f"in a new Schedule, both as one: sch.bind(sch.fuse({names}), {_quoted(thread)})")
    return "; or ".join(ways) if ways else "leave one of them serial"


def _free_axis(node: For, outer: Sequence[For], thread: str) -> str:
    """An axis of the kind of `thread` on which no loop around or inside is; `thread` itself if there is none."""
    kind, taken = thread.split(".")[0], {each.thread for each in (*outer, *loops_in(node.body))}
    return next((f"{kind}.{axis}" for axis in "xyz" if f"{kind}.{axis}" not in taken | {thread}), thread)


def _constant_part(func: PrimFunc, node: For, thread: str) -> str:
    """The hint for a loop over threads of a group whose extent is not constant."""
    name = node.var.name
    first = f"outer, inner = sch.split({name}, [None, {_GROUP}])"
    here = f"sch.bind(inner, {_quoted(thread)})"
    if reducing_blocks(node):
        return f"{first}; sch.reorder(inner, outer); {here}"
    split_func, (outside, _) = split(func, node.var, [None, _GROUP])
    if accepted(lambda: bind(split_func, outside, "blockIdx.x")):
        return f'{first}; sch.bind(outer, "blockIdx.x"); {here}'
    return f"{first}; {here}"


def _quoted(axis: str) -> str:
    return f'"{axis}"'


def _check_nested(func: PrimFunc, new: For, outer: For, inner: For) -> None:
    """Refuse unless the inner of two loops on one axis only fills tiles, the same in every iteration of the outer."""
    for store in stores(inner.body):
        if not fetched_alike(outer, store.buffer):
            other = inner if new is outer else outer
            thread = new.thread or ""
            reason = (
                f"{which(func, other)} on the same nest is bound to {thread} already, and the inner one writes "
                f"{store.buffer.name!r}: that is no tile in shared scope which all iterations of the outer fill alike"
            )
            node = find_loop(func, new.var)
            assert node is not None
            around = loops_on(loop_path(func, new.var)[:-1])
            raise refuse(func, "bind", new.var, reason, hint=_another_axis(func, node, other, thread, around))


def _no_reduction(func: PrimFunc, node: For, thread: str) -> frozenset[Buffer]:
    block = next(iter(reducing_blocks(node)), None)
    if block is not None:
        kind = "groups" if thread.startswith("blockIdx.") else "iterations of one thread"
        reason = f"block {block.name!r} reduces over it; {kind} cannot combine their parts"
        together = f'sch.bind({node.var.name}, "threadIdx.x")'
        if not isinstance(node.extent, Const):
            together = _constant_part(func, node, "threadIdx.x")
        hint = f"threads of one group can: {together}; or {over_outputs(func, node, block, 'then sch.bind its loop')}"
        raise refuse(func, "bind", node.var, reason, at=node, hint=hint)
    return frozenset()


def _combined(func: PrimFunc, node: For, thread: str) -> frozenset[Buffer]:
    """The buffer of the one reduction whose partial results the threads combine, where there is one."""
    blocks = reducing_blocks(node)
    if not blocks:
        return frozenset()
    flat = flattened(node)
    block = next(each for each in blocks_in(flat) if each.name == blocks[0].name)
    if len(blocks) > 1:
        reason = f"blocks {block.name!r} and {blocks[1].name!r} both reduce over it"
        raise refuse(func, "bind", node.var, reason, at=node, hint="move one of them out of the loop")
    update = as_update(block.body)
    if update is None:
        reason = f"block {block.name!r} reduces over it, and is no sum, product, smallest or largest of values"
        raise refuse(func, "bind", node.var, reason, at=node, hint="bind loops over its outputs")
    inner = [each for each in loops_in(flat) if each.var is not node.var and block in blocks_in(each)]
    mine = {node.var, *(each.var for each in inner)}
    for it, binding in zip(block.iters, block.bindings, strict=True):
        loop = next((var for var in free_vars(binding) if var in mine), None)
        if it.kind == "spatial" and loop is not None:
            reason = f"block {block.name!r} reduces over it, but its output depends on loop {loop.name!r} inside"
            hint = f"sch.reorder({loop.name}, {node.var.name}); sch.bind({node.var.name}, {_quoted(thread)})"
            raise refuse(func, "bind", node.var, reason, at=node, hint=hint)
    other = next((each for each in inner if each.kind == "thread"), None)
    if other is not None:
        reason = f"block {block.name!r} reduces over it and over loop {other.var.name!r} inside, which is bound, too"
        hint = "bind one of them only; or, in a new Schedule, sch.fuse of the two before sch.bind"
        raise refuse(func, "bind", node.var, reason, at=node, hint=hint)
    target = update.store.buffer
    for each in users(flat, target):
        if each is not block:
            reason = f"block {each.name!r} inside uses {target.name!r} before all threads have given their part to it"
            hint = f"take block {each.name!r} out of loop {node.var.name!r}: behind it the result is there"
            raise refuse(func, "bind", node.var, reason, at=node, hint=hint)
    if target.scope in PRIVATE_SCOPES:
        reason = (
            f"block {block.name!r} reduces over it into {target.name!r} in {target.scope} scope, each thread its own"
        )
        hint = f'sch.set_scope({block.name}, "shared"); sch.bind({node.var.name}, {_quoted(thread)})'
        raise refuse(func, "bind", node.var, reason, at=node, hint=hint)
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
        reason = f"its iterations may depend on one another through buffer {buffer.name!r}"
        raise refuse(func, "bind", node.var, reason, at=node, hint=own_copies(func, node, buffer))
    used = dict.fromkeys(a.buffer for a in accesses(node.body))
    shared = next((b for b in used if own_per_iteration(new, b) and not is_private(func, new, b)), None)
    if shared is not None:
        reason = (
            f"{shared.name!r} in {shared.scope} scope is used outside of it, too, but each iteration would have its own"
        )
        raise refuse(func, "bind", node.var, reason, at=node, hint=one_for_all(func, shared))
