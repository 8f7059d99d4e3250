"""Primitives that reshape a nest of loops or change how a loop runs: split, fuse, reorder, kinds, annotations."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from types import MappingProxyType
from typing import Any

from kedge.compiler.schedule.dependence import conflict, is_private, own_per_iteration, reduces_over, updates_in_place
from kedge.compiler.schedule.nest import has_own_places, loop_vars
from kedge.compiler.schedule.tree import (
    LARGEST_INDEX,
    accesses,
    block_path,
    blocks_in,
    find_loop,
    held_by,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    named,
    placed,
    refuse,
    swap,
)
from kedge.compiler.tir.expr import INDEX_DTYPE, Const, Expr, Var, const, logical_and
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Simplifier, prove, simplify
from kedge.compiler.tir.stmt import Block, For, LoopKind, LoopSchedule, PrimFunc, Range, Stmt
from kedge.compiler.tir.visitor import free_vars, map_stmt, substitute

#: Annotations that primitives write, with the calls that write them.
_WRITTEN = {
    "intrin": "sch.tensorize(loop, intrin)",
    "prefetch": "sch.prefetch(block, buffer, loop, offset)",
    "schedule": 'sch.parallel(loop, "dynamic", chunk)',
    "chunk": 'sch.parallel(loop, "dynamic", chunk)',
}
_MAX_CHUNK = 2**63 - 1


def split(func: PrimFunc, loop: Var, factors: Sequence[int | None]) -> tuple[PrimFunc, tuple[Var, ...]]:
    """One loop per factor instead of `loop`, outermost first; returns the new loops' variables.

    At most one factor is None: it takes what the others leave, rounded up. Where the product is not the extent, the
    blocks inside get a predicate.
    """
    path = loop_path(func, loop)
    node = _serial(func, "split", loop)
    known = _check_factors(func, loop, factors)
    extents = [_outer_extent(node, known, path) if f is None else const(f) for f in factors]
    variables = tuple(Var(f"{loop.name}_{i}") for i in range(len(factors)))
    index: Expr = const(0)
    total: Expr = const(1)
    for var, extent in zip(variables, extents, strict=True):
        index, total = index * extent + var, total * extent
    ranges = loop_ranges(loops_on(path[:-1]))
    if not prove(total >= node.extent, ranges):
        reason = f"factors {list(factors)} make {known} iterations, and may be too few for {print_expr(node.extent)}"
        raise refuse(func, "split", loop, reason, at=node, hint=f"factors {[None, *factors[1:]]} always fit")
    # The old variable runs below the old extent: without that fact, simplifying could not use it.
    body = _rebind(node.body, loop, index, None if prove(total <= node.extent, ranges) else index < node.extent)
    for var, extent in zip(reversed(variables), reversed(extents), strict=True):
        body = For(var, extent, "serial", body)
    return swap(func, node, simplify_bindings(body, ranges)), variables


def fuse(func: PrimFunc, loops: Sequence[Var]) -> tuple[PrimFunc, Var]:
    """One loop instead of `loops`, each of which holds nothing but the next; returns its variable."""
    if len(loops) < 2:
        given = ", ".join(f"loop {var.name!r}" for var in loops)
        raise refuse(func, "fuse", given, "it takes two loops or more, outermost first", hint="sch.fuse(i, j)")
    nodes = [_serial(func, "fuse", loop) for loop in loops]
    for outer, inner in pairwise(nodes):
        if outer.body is not inner:
            reason = f"its body is not just loop {inner.var.name!r} but {held_by(outer)}"
            hint = "fuse takes loops outermost first, each all that is in the one before; reorder brings them together"
            raise refuse(func, "fuse", outer.var, reason, hint=hint)
        if any(v in loops for v in free_vars(inner.extent)):
            reason = f"its extent {print_expr(inner.extent)} depends on a loop that it would be fused with"
            raise refuse(func, "fuse", inner.var, reason, hint="fuse loops whose extents do not depend on one another")
    fused = Var("_".join(loop.name for loop in loops))
    ranges = loop_ranges(loops_on(loop_path(func, loops[0])[:-1]))
    extent: Expr = const(1)
    body = nodes[-1].body
    for node in reversed(nodes):
        value: Expr = fused if isinstance(extent, Const) and extent.value == 1 else fused // extent
        extent = simplify(node.extent * extent, ranges)
        # The outermost quotient is in range by itself; every other one is a digit.
        body = _rebind(body, node.var, value if node is nodes[0] else value % node.extent, None)
    return swap(func, nodes[0], simplify_bindings(For(fused, extent, "serial", body), ranges)), fused


def reorder(func: PrimFunc, loops: Sequence[Var]) -> PrimFunc:
    """`func` with `loops`, which lie on one chain of perfectly nested loops, in the order given, outermost first."""
    if len(set(loops)) != len(loops) or len(loops) < 2:
        given = ", ".join(f"loop {var.name!r}" for var in loops)
        raise refuse(func, "reorder", given, "it takes two loops or more, each once", hint="sch.reorder(j, i)")
    chain = _chain(func, loops)
    order = iter([find_loop(func, var) for var in loops])
    new_chain = [next(order) if loop.var in loops else loop for loop in chain]
    body = chain[-1].body
    for position, loop in enumerate(new_chain):
        assert loop is not None
        inner = {each.var for each in new_chain[position:] if each is not None}
        if any(v in inner for v in free_vars(loop.extent)):
            reason = f"its extent {print_expr(loop.extent)} depends on a loop that it would stand outside of"
            raise refuse(func, "reorder", loop.var, reason, hint="leave that loop outside")
        if loop.kind == "vectorized" and len(inner) > 1:
            reason = "it is vectorized, and would not be innermost any more"
            raise refuse(func, "reorder", loop.var, reason, hint="reorder before vectorize")
    _check_order(func, chain, [loop.var for loop in new_chain if loop is not None])
    for loop in reversed(new_chain):
        assert loop is not None
        body = replace(loop, body=body)
    return swap(func, chain[0], body)


def set_kind(func: PrimFunc, primitive: str, loop: Var, kind: LoopKind, thread: str | None = None) -> PrimFunc:
    """`loop` running as `kind` ("parallel", "vectorized", "unrolled", "thread"), where that keeps the meaning."""
    node = _serial(func, primitive, loop)
    path = loop_path(func, loop)
    outer = loops_on(path[:-1])
    around = next((each for each in outer if each.kind not in ("serial", "parallel", "thread")), None)
    if kind in ("parallel", "thread"):
        nested = around or (next((each for each in outer if each.kind == "parallel"), None))
        if nested is not None:
            reason = f"it stands inside {nested.kind} loop {nested.var.name!r}, where no threads can be started"
            raise refuse(func, primitive, loop, reason, hint="fuse the two before either gets its kind, or take one")
    within = next((each for each in loops_in(node.body) if each.kind == "parallel"), None)
    if within is not None:
        reason = f"parallel loop {within.var.name!r} is inside, where no threads can be started"
        raise refuse(func, primitive, loop, reason, hint="fuse the two before either gets its kind, or take one")
    if kind in ("vectorized", "unrolled") and not isinstance(node.extent, Const):
        hint = f"split it by a constant first, and {primitive} the inner loop: sch.split({loop.name}, [None, 8])"
        reason = f"its extent {print_expr(node.extent)} is not constant"
        raise refuse(func, primitive, loop, reason, at=node, hint=hint)
    if kind == "vectorized":
        inner = loops_in(node.body)
        if inner:
            reason = f"it is not innermost: loop {inner[0].var.name!r} is inside"
            raise refuse(func, primitive, loop, reason, hint=f"reorder it inwards first, or take {named(inner[-1:])}")
    new = replace(node, kind=kind, thread=thread)
    if kind != "unrolled":
        _check_parallel(func, primitive, node, new, outer)
    return swap(func, node, new)


def parallel(func: PrimFunc, loop: Var, schedule: LoopSchedule, chunk: int | None) -> PrimFunc:
    """`loop` spread over threads, in one static chunk for each or in dynamic chunks of `chunk` (None: 1) iterations."""
    if schedule == "static":
        if chunk is not None:
            reason = f"chunk={chunk}: static chunks are one for each thread, whatever their number"
            raise refuse(func, "parallel", loop, reason, hint=f'sch.parallel(loop, "dynamic", {chunk}), or no chunk')
        return set_kind(func, "parallel", loop, "parallel")
    size = 1 if chunk is None else chunk
    if not 1 <= size <= _MAX_CHUNK:
        reason = f"chunk={size} is not between 1 and 2**63 - 1"
        raise refuse(func, "parallel", loop, reason, hint="take as many iterations as last some microseconds")
    new = set_kind(func, "parallel", loop, "parallel")
    return _annotated(new, _node(new, loop), {"schedule": "dynamic", "chunk": size})


def annotate(func: PrimFunc, subject: Var | str, key: str, value: Any) -> PrimFunc:
    """The loop (a variable) or block (a name) with one more annotation of the user's."""
    node = _node(func, subject)
    at = node.var if isinstance(node, For) else node
    if key in _WRITTEN:
        call = _WRITTEN[key]
        primitive = call.partition("(")[0].removeprefix("sch.")
        raise refuse(func, "annotate", at, f"key {key!r} is what {primitive} writes", hint=call)
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))  # what a text and a trace give back: tuples are lists
    except (TypeError, ValueError) as error:
        hint = "take texts, finite numbers, truth values, None, and lists and dicts of these by text"
        raise refuse(func, "annotate", at, f"value {value!r} is not JSON-able", hint=hint) from error
    return _annotated(func, node, {key: plain})


def _annotated(func: PrimFunc, node: For | Block, more: Mapping[str, Any]) -> PrimFunc:
    return swap(func, node, replace(node, annotations=MappingProxyType({**node.annotations, **more})))


def _node(func: PrimFunc, subject: Var | str) -> For | Block:
    path = loop_path(func, subject) if isinstance(subject, Var) else block_path(func, subject)
    node = path[-1]
    assert isinstance(node, (For, Block))
    return node


def simplify_bindings(stmt: Stmt, ranges: Mapping[Var, Range]) -> Stmt:
    """`stmt` with the bindings and predicates of its blocks and the extents of its loops simplified."""
    scope = {**ranges, **loop_ranges(loops_in(stmt))}
    simplifier = Simplifier(scope)

    def visit(node: Stmt) -> Stmt:
        match node:
            case Block():
                bindings = tuple(simplifier.simplify(b) for b in node.bindings)
                return replace(node, bindings=bindings, predicate=simplifier.simplify(node.predicate))
            case For():
                extent = simplifier.simplify(node.extent)
                return node if extent is node.extent else replace(node, extent=extent)
        return node

    return map_stmt(stmt, visit)


def _serial(func: PrimFunc, primitive: str, loop: Var) -> For:
    node = find_loop(func, loop)
    assert node is not None, f"{loop.name} is no loop of {func.name}"
    if node.kind != "serial":
        hint = f"{primitive} takes serial loops: do it before the loop gets another kind"
        raise refuse(func, primitive, loop, f"it is {node.kind} already", at=node, hint=hint)
    return node


def _check_factors(func: PrimFunc, loop: Var, factors: Sequence[int | None]) -> int:
    """The product of the known factors."""
    if len(factors) < 2 or list(factors).count(None) > 1:
        reason = f"factors {list(factors)}: it takes two or more, at most one of them None"
        raise refuse(func, "split", loop, reason, hint=f"sch.split({loop.name}, [None, 4])")
    if any(f is not None and f < 1 for f in factors):
        raise refuse(func, "split", loop, f"factors {list(factors)}: each is at least 1", hint="None takes the rest")
    known = math.prod(f for f in factors if f is not None)
    if known > LARGEST_INDEX:
        raise refuse(func, "split", loop, f"factors {list(factors)}: their product is no {INDEX_DTYPE}")
    return known


def _outer_extent(node: For, known: int, path: Sequence[Stmt]) -> Expr:
    return simplify((node.extent + (known - 1)) // known, loop_ranges(loops_on(path[:-1])))


def _rebind(body: Stmt, old: Var, value: Expr, predicate: Expr | None) -> Stmt:
    """`body` with loop variable `old` replaced, and `predicate` added to its blocks."""
    body = substitute(body, {old: value})
    if predicate is None:
        return body
    limit = predicate

    def guard(stmt: Stmt) -> Stmt:
        if not isinstance(stmt, Block):
            return stmt
        always = isinstance(stmt.predicate, Const) and stmt.predicate.value
        return replace(stmt, predicate=limit if always else logical_and(stmt.predicate, limit))

    return map_stmt(body, guard)


def _chain(func: PrimFunc, loops: Sequence[Var]) -> list[For]:
    """The perfectly nested loops from the outermost to the innermost of `loops`."""
    paths = {var: loops_on(loop_path(func, var)) for var in loops}
    deepest = max(loops, key=lambda var: len(paths[var]))
    on_path = [loop.var for loop in paths[deepest]]
    for var in loops:
        if var not in on_path:
            reason = f"it and {placed(paths[deepest][-1])} are not inside one another"
            hint = "sch.get_loops(block) gives loops that are"
            raise refuse(func, "reorder", var, reason, hint=hint)
    first = min(on_path.index(var) for var in loops)
    chain = list(paths[deepest][first:])
    for outer, inner in pairwise(chain):
        if outer.body is not inner:
            reason = f"its body is not just loop {inner.var.name!r} but {held_by(outer)}"
            hint = "it takes loops of which each is all that is in the one before"
            raise refuse(func, "reorder", outer.var, reason, at=chain[0], hint=hint)
    return chain


def _check_order(func: PrimFunc, chain: Sequence[For], order: Sequence[Var]) -> None:
    """Refuse if two loops change places across which a dependence runs."""
    blocks = blocks_in(chain[-1])
    old = [loop.var for loop in chain]
    at = {var: position for position, var in enumerate(order)}
    flipped = [(var, other) for var, other in combinations(old, 2) if at[other] < at[var]]
    # A dependence is turned around only if the outermost loop that it crosses was outside of one that now is outside.
    moved = {var for var, _ in flipped}
    for block in blocks:
        both = loop_vars(block, "spatial") & loop_vars(block, "reduce") if block.init is not None else frozenset()
        mixed = next((var for var in old if var in both), None)
        if mixed is not None:
            reason = f"block {block.name!r} takes both its output and its reduction from it: what is first may change"
            raise refuse(func, "reorder", mixed, reason, at=chain[0], hint="reorder before fusing the two")
    if len(blocks) == 1 and (not updates_in_place(blocks[0]) or _is_reduction(blocks[0])):
        # Instances of one block run in any order, its reduction's first value still comes first: as long as those
        # for different outputs store to different places.
        commutes = _is_reduction(blocks[0]) and blocks[0].init is None
        either = {var for pair in flipped for var in pair}
        moved = set() if commutes or has_own_places(blocks[0]) else either & loop_vars(blocks[0], "spatial")
    outer = loops_on(loop_path(func, chain[0].var)[:-1])
    for position, loop in enumerate(chain):
        if loop.var not in moved:
            continue
        buffer = conflict(func, loop, (*outer, *chain[:position]))
        if buffer is not None:
            reason = f"its iterations may depend on one another through buffer {buffer.name!r}"
            hint = "loops stay outside of others if one iteration touches an element that another one writes"
            raise refuse(func, "reorder", loop.var, reason, at=chain[0], hint=hint)


def _is_reduction(block: Block) -> bool:
    return any(it.kind == "reduce" for it in block.iters)


def _check_parallel(func: PrimFunc, primitive: str, node: For, new: For, outer: Sequence[For]) -> None:
    """Refuse if iterations of `node` need one another when they run as those of `new`."""
    block = reduces_over(node)
    if block is not None:
        reason = f"block {block.name!r} reduces over it: its iterations update the same elements"
        hint = f"take a loop over outputs, or that of the block which sch.rfactor(block, {node.var.name}) makes"
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    buffer = conflict(func, new, outer)
    if buffer is not None:
        reason = f"its iterations may depend on one another through buffer {buffer.name!r}"
        hint = "it takes loops of which no iteration touches an element that another one writes"
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    used = dict.fromkeys(a.buffer for a in accesses(node.body))
    shared = next((b for b in used if own_per_iteration(new, b) and not is_private(func, new, b)), None)
    if shared is not None:
        reason = f"its iterations share {shared.name!r} in {shared.scope} scope, of which each would get one of its own"
        raise refuse(func, primitive, node.var, reason, at=node, hint="scope 'global' is one for all")
