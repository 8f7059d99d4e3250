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
from kedge.compiler.schedule.nest import combiner_of, has_own_places, loop_vars, resolved
from kedge.compiler.schedule.primitives.storage import set_scope
from kedge.compiler.schedule.tree import (
    LARGEST_INDEX,
    accepted,
    accesses,
    block_path,
    blocks_in,
    enclosing,
    find_loop,
    handle,
    held_by,
    intermediate,
    kind_of,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    named,
    of_kind,
    parts_of,
    placed,
    refuse,
    setter,
    swap,
    users,
    which,
    writers,
)
from kedge.compiler.tir.expr import INDEX_DTYPE, Const, Expr, Var, const
from kedge.compiler.tir.flatten import flattened, guarded
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Simplifier, prove, simplify
from kedge.compiler.tir.stmt import Block, Buffer, For, LoopKind, LoopSchedule, PrimFunc, Range, Stmt
from kedge.compiler.tir.visitor import free_vars, map_stmt, substitute

#: Annotations that primitives write, with these primitives.
_WRITTEN = {
    "intrin": "tensorize",
    "prefetch": "prefetch",
    "spread": "prefetch",
    "schedule": "parallel",
    "chunk": "parallel",
}
_MAX_CHUNK = 2**63 - 1
_SPLIT = "outer, inner = sch.split({}, [None, 8]); "


def split(func: PrimFunc, loop: Var, factors: Sequence[int | None]) -> tuple[PrimFunc, tuple[Var, ...]]:
    """One loop per factor instead of `loop`, outermost first; returns the new loops' variables.

    At most one factor is None: it takes what the others leave, rounded up. Where the product is not the extent, the
    blocks inside get a predicate.
    """
    path = loop_path(func, loop)
    node = serial_loop(func, "split", loop)
    known = _check_factors(func, loop, factors)
    extents = [_outer_extent(node, known, path) if f is None else const(f) for f in factors]
    variables = tuple(Var(f"{loop.name}_{i}") for i in range(len(factors)))
    index: Expr = const(0)
    total: Expr = const(1)
    for var, extent in zip(variables, extents, strict=True):
        index, total = index * extent + var, total * extent
    ranges = loop_ranges(loops_on(path[:-1]))
    # What is rounded up is enough: to prove it of quotients of quotients can be beyond the simplifier.
    if None not in factors and not prove(total >= node.extent, ranges):
        reason = f"factors {list(factors)} make {known} iterations, and may be too few for {print_expr(node.extent)}"
        hint = f"None takes what the others leave: sch.split({loop.name}, {[None, *factors[1:]]})"
        raise refuse(func, "split", loop, reason, at=node, hint=hint)
    # The old variable runs below the old extent: without that fact, simplifying could not use it.
    body = rebind(node.body, loop, index, None if prove(total <= node.extent, ranges) else index < node.extent)
    for var, extent in zip(reversed(variables), reversed(extents), strict=True):
        body = For(var, extent, "serial", body)
    return swap(func, node, simplify_bindings(body, ranges)), variables


def fuse(func: PrimFunc, loops: Sequence[Var]) -> tuple[PrimFunc, Var]:
    """One loop instead of `loops`, each of which holds nothing but the next; returns its variable."""
    if len(loops) < 2:
        given = ", ".join(f"loop {var.name!r}" for var in loops)
        raise refuse(func, "fuse", given, "it takes two loops or more, outermost first", hint="sch.fuse(i, j)")
    _check_nested(func, loops)
    nodes = [serial_loop(func, "fuse", loop) for loop in loops]
    for inner in nodes[1:]:
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
        body = rebind(body, node.var, value if node is nodes[0] else value % node.extent, None)
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
            other = next(v.name for v in free_vars(loop.extent) if v in inner)
            reason = f"its extent {print_expr(loop.extent)} depends on loop {other!r}, which it would stand outside of"
            raise refuse(func, "reorder", loop.var, reason, hint=f"leave loop {other!r} outside of it")
        if loop.kind == "vectorized" and len(inner) > 1:
            reason = "it is vectorized, and would not be innermost any more"
            raise refuse(func, "reorder", loop.var, reason, hint="in a new Schedule, sch.reorder before sch.vectorize")
    _check_order(func, chain, [loop.var for loop in new_chain if loop is not None])
    for loop in reversed(new_chain):
        assert loop is not None
        body = replace(loop, body=body)
    return swap(func, chain[0], body)


def set_kind(func: PrimFunc, primitive: str, loop: Var, kind: LoopKind, thread: str | None = None) -> PrimFunc:
    """`loop` running as `kind` ("parallel", "vectorized", "unrolled", "thread"), where that keeps the meaning."""
    node = serial_loop(func, primitive, loop)
    path = loop_path(func, loop)
    outer = loops_on(path[:-1])
    if kind == "parallel":
        nested = next((each for each in outer if each.kind != "serial" and each.kind != "thread"), None)
        if nested is not None:
            reason = f"it stands inside {of_kind(func, nested)}: no threads can be started there"
            raise refuse(func, primitive, loop, reason, hint=_instead(func, primitive, nested, node))
    within = next((each for each in loops_in(node.body) if each.kind == "parallel"), None)
    if within is not None:
        reason = f"{of_kind(func, within)} is inside: no threads can be started there"
        raise refuse(func, primitive, loop, reason, hint=_instead(func, primitive, node, within))
    inner = loops_in(node.body)
    if kind == "vectorized" and inner:
        reason = f"it is not innermost: loop {inner[0].var.name!r} is inside"
        raise refuse(func, primitive, loop, reason, hint=_innermost(func, primitive, node, inner, kind))
    if kind in ("vectorized", "unrolled") and not isinstance(node.extent, Const):
        hint = f"{_SPLIT.format(loop.name)}sch.{primitive}(inner)"
        reason = f"its extent {print_expr(node.extent)} is not constant"
        raise refuse(func, primitive, loop, reason, at=node, hint=hint)
    new = replace(node, kind=kind, thread=thread)
    if kind != "unrolled":
        _check_parallel(func, primitive, node, new, outer)
    return swap(func, node, new)


def _instead(func: PrimFunc, primitive: str, outer: For, inner: For) -> str:
    """The hint where one loop inside the other cannot have a kind of its own."""
    serial = f"leave loop {outer.var.name!r} serial"
    if outer.body is not inner or primitive == "unroll":
        return serial
    fused = f"sch.fuse({handle(func, outer, inner)}, {handle(func, inner, inner)})"
    return f"{serial}; or, in a new Schedule, both as one: sch.{primitive}({fused})"


def _innermost(func: PrimFunc, primitive: str, node: For, inner: Sequence[For], kind: LoopKind) -> str:
    """The hint where a loop holds others: bring it inside, or take the innermost, as far as either is legal."""
    ways = []
    mine, last = node.var.name, inner[-1]
    order = [*(each.var for each in inner), node.var]
    if reduces_over(node) is None and accepted(lambda: reorder(func, order)):
        turned = reorder(func, order)
        if conflict(turned, node, loops_on(loop_path(turned, node.var)[:-1])) is None:
            others = ", ".join(handle(func, each, node) for each in inner)
            to_split, name = ("", mine) if isinstance(node.extent, Const) else (_SPLIT.format(mine), "inner")
            ways.append(f"{to_split}sch.reorder({others}, {name}); sch.{primitive}({name})")
    if accepted(lambda: set_kind(func, primitive, last.var, kind)):
        ways.append(f"sch.{primitive}({handle(func, last, node)})")
    return ", or ".join(ways) if ways else f"it takes loops that hold no other: here {which(func, inner[-1])}"


def parallel(func: PrimFunc, loop: Var, schedule: LoopSchedule, chunk: int | None) -> PrimFunc:
    """`loop` spread over threads, in one static chunk for each or in dynamic chunks of `chunk` (None: 1) iterations."""
    if schedule == "static":
        if chunk is not None:
            reason = f"chunk={chunk}: static chunks are one for each thread, whatever their number"
            raise refuse(func, "parallel", loop, reason, hint=f'sch.parallel({loop.name}, "dynamic", {chunk})')
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
        writer = _WRITTEN[key]
        raise refuse(
            func, "annotate", at, f"key={key!r} is what sch.{writer} writes", hint=f"call sch.{writer} instead"
        )
    try:
        plain = json.loads(json.dumps(value, allow_nan=False))  # what a text and a trace give back: tuples are lists
    except (TypeError, ValueError) as error:
        hint = "it takes str, int, finite float, bool and None, and lists and dicts (with str keys) of these"
        raise refuse(func, "annotate", at, f"value={value!r} cannot be written as JSON", hint=hint) from error
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


def serial_loop(func: PrimFunc, primitive: str, loop: Var) -> For:
    """The loop over `loop`, which `primitive` takes apart, or a refusal where it does not run in turn any more."""
    node = find_loop(func, loop)
    assert node is not None, f"{loop.name} is no loop of {func.name}"
    if node.kind != "serial":
        hint = f"nothing takes that back: in a new Schedule, sch.{primitive} before sch.{setter(node)}, or without it"
        raise refuse(func, primitive, loop, f"it is {kind_of(node)} already", at=node, hint=hint)
    return node


def _check_factors(func: PrimFunc, loop: Var, factors: Sequence[int | None]) -> int:
    """The product of the known factors."""
    if len(factors) < 2 or list(factors).count(None) > 1:
        reason = f"factors {list(factors)}: it takes two or more, at most one of them None"
        raise refuse(func, "split", loop, reason, hint=f"sch.split({loop.name}, [None, 4])")
    fitting = [factors[0] if factors[0] is None else None, *(f if f and f > 0 else 1 for f in factors[1:])]
    rest = f"None takes what the others leave: sch.split({loop.name}, {fitting})"
    if any(f is not None and f < 1 for f in factors):
        raise refuse(func, "split", loop, f"factors {list(factors)}: each is at least 1", hint=rest)
    known = math.prod(f for f in factors if f is not None)
    if known > LARGEST_INDEX:
        reason = f"factors {list(factors)}: their product is more than {INDEX_DTYPE} holds"
        raise refuse(func, "split", loop, reason, hint=f"take smaller ones: sch.split({loop.name}, [None, 8])")
    return known


def _outer_extent(node: For, known: int, path: Sequence[Stmt]) -> Expr:
    return simplify((node.extent + (known - 1)) // known, loop_ranges(loops_on(path[:-1])))


def rebind(body: Stmt, old: Var, value: Expr, predicate: Expr | None) -> Stmt:
    """`body` with loop variable `old` replaced, and `predicate` added to its blocks."""
    body = substitute(body, {old: value})
    return body if predicate is None else guarded(body, predicate)


def _check_nested(func: PrimFunc, loops: Sequence[Var]) -> None:
    """Refuse unless each of `loops` holds nothing but the next, and say in which way it does not."""
    nodes = [node for loop in loops if (node := find_loop(func, loop)) is not None]
    paths = {loop: loops_on(loop_path(func, loop)) for loop in loops}
    for outer, inner in pairwise(nodes):
        if outer is inner:
            raise refuse(
                func, "fuse", outer.var, "it is named twice", hint="fuse takes each loop once, outermost first"
            )
        around = paths[inner.var]
        if outer not in around:
            if inner not in paths[outer.var]:
                reason = f"{placed(inner)} is not inside {placed(outer)}"
                raise refuse(
                    func, "fuse", outer.var, reason, hint="sch.get_loops(block) gives loops that are inside one another"
                )
            order = ", ".join(handle(func, each, outer) for each in sorted(set(nodes), key=lambda n: len(paths[n.var])))
            reason = f"loop {inner.var.name!r} is around it: they are in the wrong order"
            raise refuse(func, "fuse", outer.var, reason, hint=f"fuse takes the outermost first: sch.fuse({order})")
        chain = around[around.index(outer) :]
        _check_chain(func, "fuse", chain)
        if len(chain) > 2:
            names = f"{handle(func, outer, inner)}, {handle(func, inner, inner)}"
            between = ", ".join(handle(func, each, inner) for each in chain[1:-1])
            reason = (
                f"{named(chain[1:-1])} stand{'s' if len(chain) == 3 else ''} between it and loop {inner.var.name!r}"
            )
            raise refuse(func, "fuse", outer.var, reason, hint=f"sch.reorder({names}, {between}); sch.fuse({names})")


def _check_chain(func: PrimFunc, primitive: str, chain: Sequence[For]) -> None:
    """Refuse unless each loop of `chain` holds nothing but the next."""
    for outer, inner in pairwise(chain):
        if outer.body is not inner:
            rest = [part for part in parts_of(outer) if part is not inner and inner not in loops_in(part)]
            reason = f"it holds {held_by(outer)}: not just loop {inner.var.name!r}"
            hint = "take loops of which each holds nothing but the next"
            if rest:
                what = named(block for part in rest for block in blocks_in(part))
                reason = f"besides loop {inner.var.name!r} it holds {what}, which would run more often"
                hint = (
                    f"in a new Schedule, sch.{primitive} before what put that there: sch.cache_read, sch.cache_write, "
                    "sch.compute_at, sch.decompose_reduction"
                )
            raise refuse(func, primitive, outer.var, reason, at=chain[0], hint=hint)


def _chain(func: PrimFunc, loops: Sequence[Var]) -> list[For]:
    """The perfectly nested loops from the outermost to the innermost of `loops`."""
    paths = {var: loops_on(loop_path(func, var)) for var in loops}
    deepest = max(loops, key=lambda var: len(paths[var]))
    on_path = [loop.var for loop in paths[deepest]]
    for var in loops:
        if var not in on_path:
            inside = blocks_in(paths[deepest][-1])[0].name
            reason = f"it and {placed(paths[deepest][-1])} are not inside one another"
            hint = f"loops that are: sch.get_loops({inside})"
            raise refuse(func, "reorder", var, reason, hint=hint)
    first = min(on_path.index(var) for var in loops)
    chain = list(paths[deepest][first:])
    _check_chain(func, "reorder", chain)
    return chain


def _check_order(func: PrimFunc, chain: Sequence[For], order: Sequence[Var]) -> None:
    """Refuse if two loops change places across which a dependence runs."""
    blocks = blocks_in(flattened(chain[-1]))
    old = [loop.var for loop in chain]
    at = {var: position for position, var in enumerate(order)}
    flipped = [(var, other) for var, other in combinations(old, 2) if at[other] < at[var]]
    # A dependence is turned around only if the outermost loop that it crosses was outside of one that now is outside.
    moved = {var for var, _ in flipped}
    for block in blocks:
        both = loop_vars(block, "spatial") & loop_vars(block, "reduce") if block.init is not None else frozenset()
        mixed = next((var for var in old if var in both), None)
        if mixed is not None:
            reason = (
                f"it drives both the output and the reduction of block {block.name!r}: the order of the first updates "
                "would change"
            )
            raise refuse(func, "reorder", mixed, reason, at=chain[0], hint=before_fusing("reorder"))
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
            hint = f"leave loop {loop.var.name!r} where it is, and reorder others"
            raise refuse(func, "reorder", loop.var, reason, at=chain[0], hint=hint)


def _is_reduction(block: Block) -> bool:
    return any(it.kind == "reduce" for it in block.iters)


def before_fusing(primitive: str) -> str:
    """The hint where one loop drives too much."""
    return f"in a new Schedule, sch.{primitive} before sch.fuse of these loops"


def over_outputs(func: PrimFunc, node: For, block: Block, then: str) -> str:
    """The hint where a loop is one of a reduction: another loop, or the reduction in two steps."""
    whole = resolved(func, block)
    reducing = loop_vars(whole, "reduce")
    loops = [each for each in loops_on(block_path(func, block.name)) if each.var not in reducing]
    others = f"take {named(loops)} over outputs, or " if loops else ""
    path = block_path(func, block.name)
    inside = enclosing(path[:-1], node) if node in path else None
    mixed = node.var in loop_vars(whole, "spatial")
    if combiner_of(block) is None or mixed or inside is not None or {"prefetch", "spread"} & set(node.annotations):
        return others.removesuffix(", or ") or "it takes loops over outputs"
    return f"{others}partial = sch.rfactor({block.name}, {node.var.name}), {then} around block partial"


def own_copies(func: PrimFunc, node: For, buffer: Buffer) -> str:
    """The hint where iterations meet in a buffer: each can have its own, if none needs what another wrote."""
    inside = {id(block) for block in blocks_in(node)}
    makers = writers(func, buffer)
    private = intermediate(func, buffer) and all(id(each) in inside for each in users(func.body, buffer))
    if private and makers and reduces_over(node) is None and accepted(lambda: set_scope(func, makers[0].name, "local")):
        call = f'sch.set_scope({makers[0].name}, "local")'
        return f"if no iteration uses what another wrote, give each its own {buffer.name!r}: {call}"
    return "take a loop of which no iteration touches an element that another one writes"


def one_for_all(func: PrimFunc, buffer: Buffer) -> str:
    """The hint where a buffer should be the same for all iterations."""
    makers = writers(func, buffer)
    if makers and accepted(lambda: set_scope(func, makers[0].name, "global")):
        return f'one for all: sch.set_scope({makers[0].name}, "global")'
    return f"take a loop around all that uses {buffer.name!r}"


def _check_parallel(func: PrimFunc, primitive: str, node: For, new: For, outer: Sequence[For]) -> None:
    """Refuse if iterations of `node` need one another when they run as those of `new`."""
    block = reduces_over(node)
    if block is not None:
        reason = f"block {block.name!r} reduces over it: its iterations update the same elements"
        hint = over_outputs(func, node, block, f"then sch.{primitive} its loop")
        raise refuse(func, primitive, node.var, reason, at=node, hint=hint)
    buffer = conflict(func, new, outer)
    if buffer is not None:
        reason = f"its iterations may depend on one another through buffer {buffer.name!r}"
        raise refuse(func, primitive, node.var, reason, at=node, hint=own_copies(func, node, buffer))
    used = dict.fromkeys(a.buffer for a in accesses(node.body))
    shared = next((b for b in used if own_per_iteration(new, b) and not is_private(func, new, b)), None)
    if shared is not None:
        reason = (
            f"each iteration would get its own {shared.name!r}, which is in {shared.scope} scope and is "
            "used outside of the loop, too"
        )
        raise refuse(func, primitive, node.var, reason, at=node, hint=one_for_all(func, shared))
