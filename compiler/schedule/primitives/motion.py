"""Moving a block into a loop of its consumer (compute_at) or of its producer (reverse_compute_at)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kedge.compiler.schedule.dependence import conflict, fetched_alike, group_loops, reduces_over, tied_to
from kedge.compiler.schedule.nest import Span, check_unconditional, is_one, moving_together, span_of
from kedge.compiler.schedule.order import before, overwritten_before, touched_since
from kedge.compiler.schedule.tree import (
    accesses,
    block_path,
    blocks_in,
    check_only_writer,
    enclosing,
    find_loop,
    intermediate,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    named,
    placed,
    readers,
    refuse,
    remove,
    swap,
    writers,
)
from kedge.compiler.tir.expr import Const, Expr, Var, as_expr, const, logical_and
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Ranges, Simplifier, over, prove_equal
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, loads, seq


def compute_at(func: PrimFunc, name: str, loop: Var) -> PrimFunc:
    """`func` with block `name` computed inside `loop`, at the start of its body: just what its consumers read there.

    All consumers must be under `loop`. What iterations share is computed again in each; in shared scope, threads of a
    group share what all of them need, as far as loops are bound to threads already.
    """
    primitive = "compute_at"
    block, store = _movable(func, primitive, name, loop)
    buffer = store.buffer
    if not intermediate(func, buffer):
        hint = "reverse_compute_at moves it into a loop of what it reads"
        raise refuse(func, primitive, block, f"it computes the output {buffer.name!r}, which no block reads", hint=hint)
    check_only_writer(func, primitive, block, buffer)
    node = find_loop(func, loop)
    assert node is not None
    inside = blocks_in(node)
    consumers = readers(func, buffer)
    outside = [each.name for each in consumers if each not in inside]
    if outside or not consumers:
        if not consumers:
            raise refuse(func, primitive, block, f"nothing reads {buffer.name!r}, which it computes")
        reason = f"its consumer {outside[0]!r} is not under {placed(node)}"
        around = [each for each in loops_in(func.body) if all(c in blocks_in(each) for c in consumers)]
        hint = f"around all of its consumers ({named(consumers)}): {named(around)}"
        raise refuse(func, primitive, block, reason, hint=hint)
    early = next((each for each in consumers if before(func, each, block)), None)
    if early is not None:
        raise refuse(func, primitive, block, f"its consumer {early.name!r} runs before it, on older values")
    changed = overwritten_before(func, block, node)
    if changed is not None:
        reason = f"block {changed[0].name!r} writes {changed[1].name!r}, which it reads, before loop {loop.name!r} ends"
        raise refuse(func, primitive, block, reason)
    outer = loops_on(loop_path(func, loop))
    wanted = [a for a in accesses(node.body) if a.buffer is buffer]
    axes = _index_axes(func, primitive, block, store)
    group = group_loops(outer, buffer.scope)
    apart = tuple(each for each in outer if each not in group)
    spans = {
        axis: _span(func, primitive, block, [a.indices[dim] for a in wanted], node, apart, group)
        for dim, axis in enumerate(axes)
        if axis is not None
    }
    nest = _nest_over(block, spans, loop_ranges(outer))
    func = remove(func, block)
    moved_into = find_loop(func, loop)
    assert moved_into is not None
    moved = swap(func, moved_into, replace(moved_into, body=seq(nest, moved_into.body)))
    return _checked(func, moved, primitive, block, buffer, loop)


def reverse_compute_at(func: PrimFunc, name: str, loop: Var) -> PrimFunc:
    """`func` with block `name` inside `loop` of its producer, at the end of its body: on just what was made there."""
    primitive = "reverse_compute_at"
    block, store = _movable(func, primitive, name, loop)
    node = find_loop(func, loop)
    assert node is not None
    outer = loops_on(loop_path(func, loop))
    spans: dict[Var, Span] = {}
    for source in _sources(func, block, node):
        _check_complete(func, block, source, node, outer)
        for axis, span in _consumed(func, block, source, node, outer).items():
            if not _same_span(spans.setdefault(axis, span), span):
                reason = f"an iteration of {loop.name!r} makes different values of {axis.name!r} of what it reads"
                raise refuse(func, primitive, block, reason, at=node, hint="take a loop further out")
    missing = [it for it in block.iters if it.var not in spans and not is_one(it.extent)]
    if missing and not all(it.kind == "reduce" or it.var in _stored(store) for it in missing):
        reason = f"its {missing[0].var.name!r} indexes neither what is made there nor its output"
        raise refuse(func, primitive, block, reason)
    check_only_writer(func, primitive, block, store.buffer)
    touched = touched_since(func, block, node)
    if touched is not None:
        reason = f"block {touched[0].name!r} uses {touched[1].name!r}, which it writes, after loop {loop.name!r} begins"
        raise refuse(func, primitive, block, reason)
    nest = _nest_over(block, spans, loop_ranges(outer))
    func = remove(func, block)
    moved_into = find_loop(func, loop)
    assert moved_into is not None
    moved = swap(func, moved_into, replace(moved_into, body=seq(moved_into.body, nest)))
    return _checked(func, moved, primitive, block, store.buffer, loop)


def _stored(store: Store) -> frozenset[Var]:
    return frozenset(v for index in store.indices for v in free_vars(index))


def _movable(func: PrimFunc, primitive: str, name: str, loop: Var) -> tuple[Block, Store]:
    """The block and its store, if it may leave its loops."""
    path = block_path(func, name)
    block = path[-1]
    assert isinstance(block, Block)
    if any(each.var is loop for each in loops_on(path)):
        whose = "of its consumers" if primitive == "compute_at" else "of the blocks that it reads from"
        hint = f"it takes a loop {whose}"
        raise refuse(func, primitive, block, f"it is under loop {loop.name!r} already", hint=hint)
    if not isinstance(block.body, Store):
        raise refuse(func, primitive, block, "its body is more than one store")
    if block.init is None and any(load.buffer is block.body.buffer for load in loads(block.body)):
        raise refuse(func, primitive, block, "it updates a buffer in place", hint="move it before decompose_reduction")
    check_unconditional(func, primitive, block, path)
    tied = tied_to(func, block)
    if tied is not None:
        reason = f"{tied.name!r} in {tied.scope} scope, used anew in each iteration, ties it to the loops around it"
        raise refuse(func, primitive, block, reason, hint="move it before caching")
    together = moving_together(block, loops_on(path))
    if together is not None:
        names = " and ".join(repr(var.name) for var in together)
        reason = f"one loop drives both its {names}: it is not known which values they would take elsewhere"
        raise refuse(func, primitive, block, reason, hint="move it before caching, or before fusing its loops")
    around = enclosing(loop_path(func, loop))
    if around is not None:
        reason = f"it stands inside block {around.name!r}, which sees nothing of the loops around it"
        raise refuse(func, primitive, loop, reason, hint="take a loop outside of all blocks")
    node = find_loop(func, loop)
    if node is not None and node.kind in ("vectorized", "unrolled"):
        raise refuse(func, primitive, loop, f"it is {node.kind}", hint="move blocks before setting the kinds of loops")
    return block, block.body


def _axis(func: PrimFunc, primitive: str, block: Block, buffer: Buffer, index: Expr) -> Var | None:
    """The spatial iteration variable that `index` is, or None for the index 0."""
    if isinstance(index, Const) and index.value == 0:
        return None
    if isinstance(index, Var) and any(it.var is index for it in block.iters):
        return index
    reason = f"it indexes {buffer.name!r} by {print_expr(index)}, which is none of its iteration variables"
    raise refuse(func, primitive, block, reason)


def _index_axes(func: PrimFunc, primitive: str, block: Block, store: Store) -> list[Var | None]:
    axes = [_axis(func, primitive, block, store.buffer, index) for index in store.indices]
    named = [axis for axis in axes if axis is not None]
    spatial = [it.var for it in block.iters if it.kind == "spatial" and not is_one(it.extent)]
    if len(set(named)) < len(named) or any(var not in named for var in spatial):
        reason = f"its iteration variables do not each index {store.buffer.name!r}, which it writes, just once"
        raise refuse(func, primitive, block, reason)
    return axes


def _sources(func: PrimFunc, block: Block, node: For) -> tuple[Buffer, ...]:
    """The buffers that `block` reads and that are written under `node`; what else it reads must be there before."""
    inside, order = blocks_in(node), blocks_in(func.body)
    sources = []
    for buffer in dict.fromkeys(load.buffer for load in loads(block.body)):
        made_by = [b for b in writers(func, buffer) if b is not block]
        if any(b in inside for b in made_by):
            sources.append(buffer)
        late = [b.name for b in made_by if b not in inside and order.index(b) > order.index(inside[0])]
        if late:
            reason = f"it reads {buffer.name!r}, which block {late[0]!r} computes only after loop {node.var.name!r}"
            hint = f"move it into a loop of block {late[0]!r}"
            raise refuse(func, "reverse_compute_at", block, reason, hint=hint)
    if not sources:
        reason = f"nothing it reads is written under {placed(node)}"
        read = {load.buffer for load in loads(block.body)}
        makers = [b for b in order if b is not block and any(a.is_write and a.buffer in read for a in accesses(b))]
        around = [each for each in loops_in(func.body) if any(b in blocks_in(each) for b in makers)]
        hint = f"what it reads is written under {named(around)}" if around else "no loop writes what it reads"
        raise refuse(func, "reverse_compute_at", block, reason, hint=hint)
    return tuple(sources)


def _consumed(func: PrimFunc, block: Block, source: Buffer, node: For, outer: Sequence[For]) -> dict[Var, Span]:
    """Over which values of its variables `block` finds its part of `source` under `node`."""
    primitive = "reverse_compute_at"
    consumed = [load for load in loads(block.body) if load.buffer is source]
    axes = [_axis(func, primitive, block, source, index) for index in consumed[0].indices]
    for load in consumed[1:]:
        if any(
            _axis(func, primitive, block, source, i) is not axis for i, axis in zip(load.indices, axes, strict=True)
        ):
            raise refuse(func, primitive, block, f"it reads several elements of {source.name!r} at once")
    made = [a for a in accesses(node.body) if a.buffer is source and a.is_write]
    extents = {it.var: it.extent for it in block.iters}
    spans: dict[Var, Span] = {}
    for dim, axis in enumerate(axes):
        if axis is None:
            continue
        if not prove_equal(extents[axis], source.shape[dim]):
            whole = print_expr(as_expr(source.shape[dim]))
            size = f"its {axis.name!r} takes {print_expr(extents[axis])} values of {whole}"
            raise refuse(func, primitive, block, f"it does not read all of {source.name!r}: {size}")
        span = _span(func, primitive, block, [a.indices[dim] for a in made], node, outer)
        if not _same_span(spans.setdefault(axis, span), span):
            raise refuse(func, primitive, block, f"it reads a diagonal of {source.name!r}")
    return spans


def _same_span(a: Span, b: Span) -> bool:
    return a is b or (prove_equal(a.start, b.start) and prove_equal(a.extent, b.extent))


def _checked(before: PrimFunc, moved: PrimFunc, primitive: str, block: Block, buffer: Buffer, loop: Var) -> PrimFunc:
    """`moved`, unless iterations of a parallel loop would now write the same elements."""
    path = loops_on(loop_path(moved, loop))
    for position, each in enumerate(path):
        together = each.kind == "thread" and fetched_alike(each, buffer)
        at_once = each.kind in ("parallel", "thread") and not together
        if at_once and conflict(moved, each, path[:position], [buffer]) is not None:
            reason = f"iterations of {each.kind} loop {each.var.name!r} would write the same parts of {buffer.name!r}"
            hint = f"move it outside of loop {each.var.name!r}, or before that is {each.kind}"
            raise refuse(before, primitive, block, reason, hint=hint)
    return moved


def _check_complete(func: PrimFunc, block: Block, source: Buffer, node: For, outer: Sequence[For]) -> None:
    """Refuse unless each iteration of the loops finishes its own part of `source` and nobody else's."""
    primitive = "reverse_compute_at"
    inside = blocks_in(node)
    strangers = [b for b in writers(func, source) if b not in inside]
    if strangers:
        reason = (
            f"{source.name!r}, which it reads, is written by {named(strangers)} outside of loop {node.var.name!r}, too"
        )
        raise refuse(func, primitive, block, reason)
    shared = {id(s) for s in block_path(func, block.name)}
    for position, loop in enumerate(outer):
        if id(loop) in shared:
            continue
        reducing = reduces_over(loop)
        if reducing is not None and any(s.buffer is source for s in accesses(reducing) if s.is_write):
            reason = f"{source.name!r}, which it reads, is complete only after loop {loop.var.name!r}"
            hint = f"legal, as far as that goes: {named(outer[:position])}"
            raise refuse(func, primitive, block, reason, at=node, hint=hint)
        if conflict(func, loop, outer[:position], [source]) is not None:
            reason = f"iterations of loop {loop.var.name!r} share parts of {source.name!r}, which it reads"
            hint = f"legal, as far as that goes: {named(outer[:position])}"
            raise refuse(func, primitive, block, reason, at=node, hint=hint)


def _span(
    func: PrimFunc, primitive: str, block: Block, indices: Sequence[Expr], node: For, outer: Sequence[For],
    group: Sequence[For] = (),
) -> Span:  # fmt: skip
    """The values that `indices` take while the loops inside `node`, and those of the `group`, run."""
    span = span_of(indices, outer, (*group, *loops_in(node.body)))
    if span is None:
        places = ", ".join(map(print_expr, indices))
        reason = f"what an iteration of loop {node.var.name!r} needs, at {places}, is no interval"
        raise refuse(func, primitive, block, reason, at=node, hint="move it before fusing, or take a loop further out")
    return span


def _loop_name(name: str) -> str:
    """What the loop over an iteration variable is called: `i` for `vi`."""
    bare = name.removeprefix("v")
    return bare if bare.isidentifier() else name


def _nest_over(block: Block, spans: dict[Var, Span], ranges: Ranges) -> Stmt:
    """New loops around `block`: over the spans given, and over the whole of its other iteration variables."""
    bindings: list[Expr] = []
    loops: list[tuple[Var, Expr]] = []
    limits: list[Expr] = []
    for it in block.iters:
        span = spans.get(it.var, Span(const(0), it.extent))
        var = Var(_loop_name(it.var.name))
        simplifier = Simplifier({**ranges, var: over(span.extent)})
        if is_one(span.extent):
            value = simplifier.simplify(span.start)
        else:
            loops.append((var, span.extent))
            value = simplifier.simplify(span.start + var)
        bindings.append(value)
        limits += [c for c in (value >= 0, value < it.extent) if not simplifier.prove(c)]
    predicate = logical_and(*limits)
    stmt: Stmt = replace(block, bindings=tuple(bindings), predicate=predicate)
    for var, extent in reversed(loops):
        stmt = For(var, extent, "serial", stmt)
    return stmt
