"""Moving a block into a loop of its consumer (compute_at) or of its producer (reverse_compute_at)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kedge.compiler.schedule.dependence import conflict, fetched_alike, group_loops, reduces_over, tied_to
from kedge.compiler.schedule.nest import (
    Span,
    check_holds_no_blocks,
    check_unconditional,
    is_one,
    moving_together,
    span_of,
)
from kedge.compiler.schedule.order import before, overwritten_before, touched_since
from kedge.compiler.schedule.primitives.inline import IN_PLACE, ONE_STORE
from kedge.compiler.schedule.remedies import consumers_outside, loops_around, other_way, why_tied
from kedge.compiler.schedule.tree import (
    accepted,
    accesses,
    block_path,
    blocks_in,
    check_only_writer,
    enclosing,
    find_loop,
    handle,
    intermediate,
    kind_of,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    named,
    of_kind,
    passing,
    placed,
    readers,
    refuse,
    remove,
    setter,
    swap,
    writers,
)
from kedge.compiler.tir.expr import Const, Expr, Var, as_expr, const, logical_and
from kedge.compiler.tir.flatten import flattened
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Ranges, Simplifier, over, prove_equal
from kedge.compiler.tir.stmt import Block, Buffer, For, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, loads, seq, stores

_PLAIN = "write it with te.compute, which stores at its iteration variables"
_STAYS = "leave it where it is, or move the block that stands between the two first"


def compute_at(func: PrimFunc, name: str, loop: Var) -> PrimFunc:
    """`func` with block `name` computed inside `loop`, at the start of its body: just what its consumers read there.

    All consumers must be under `loop`. What iterations share is computed again in each; in shared scope, threads of a
    group share what all of them need, as far as loops are bound to threads already.
    """
    primitive = "compute_at"
    block, store = _movable(func, primitive, name, loop)
    buffer = store.buffer
    if not intermediate(func, buffer):
        maker = _last_maker(func, block)
        hint = "an output that reads only arguments stays in its own loops"
        if maker is not None:
            hint = f"move it to what it reads: sch.reverse_compute_at({block.name}, {handle(func, maker)})"
        raise refuse(func, primitive, block, f"it computes the output {buffer.name!r}, which no block reads", hint=hint)
    check_only_writer(func, primitive, block, buffer)
    node = find_loop(func, loop)
    assert node is not None
    inside = blocks_in(node)
    consumers = readers(func, buffer)
    outside = [each.name for each in consumers if each not in inside]
    if outside or not consumers:
        if not consumers:
            hint = "leave it where it is: it moves to where its buffer is read"
            raise refuse(func, primitive, block, f"nothing reads {buffer.name!r}, which it computes", hint=hint)
        reason = f"its consumer {outside[0]!r} is not under {placed(node)}"
        raise refuse(func, primitive, block, reason, hint=_around_consumers(func, block, node, consumers))
    early = next((each for each in consumers if before(func, each, block)), None)
    if early is not None:
        raise refuse(
            func, primitive, block, f"its consumer {early.name!r} runs before it, on older values", hint=_STAYS
        )
    changed = overwritten_before(func, block, node)
    if changed is not None:
        reason = f"block {changed[0].name!r} writes {changed[1].name!r}, which it reads, before loop {loop.name!r} ends"
        raise refuse(func, primitive, block, reason, hint=_STAYS)
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
                further = "take a loop further out" if len(outer) > 1 else f"leave it behind loop {loop.name!r}"
                raise refuse(func, primitive, block, reason, at=node, hint=further)
    missing = [it for it in block.iters if it.var not in spans and not is_one(it.extent)]
    if missing and not all(it.kind == "reduce" or it.var in _stored(store) for it in missing):
        reason = f"its {missing[0].var.name!r} indexes neither what is made there nor its output"
        hint = f"write the block without {missing[0].var.name!r}, or with an output that it indexes"
        raise refuse(func, primitive, block, reason, hint=hint)
    check_only_writer(func, primitive, block, store.buffer)
    touched = touched_since(func, block, node)
    if touched is not None:
        reason = f"block {touched[0].name!r} uses {touched[1].name!r}, which it writes, after loop {loop.name!r} begins"
        raise refuse(func, primitive, block, reason, hint=f"take a loop behind block {touched[0].name!r}, or leave it")
    nest = _nest_over(block, spans, loop_ranges(outer))
    func = remove(func, block)
    moved_into = find_loop(func, loop)
    assert moved_into is not None
    moved = swap(func, moved_into, replace(moved_into, body=seq(moved_into.body, nest)))
    return _checked(func, moved, primitive, block, store.buffer, loop)


def _last_maker(func: PrimFunc, block: Block) -> For | None:
    """The outermost loop around the last block that computes what `block` reads."""
    read = {load.buffer for load in loads(block.body)}
    makers = [b for b in blocks_in(func.body) if b is not block and any(s.buffer in read for s in stores(b))]
    around = loops_around(func, makers[-1]) if makers else ()
    return around[0] if around else None


def _into(func: PrimFunc, block: Block, loop: For) -> str:
    return f"sch.reverse_compute_at({block.name}, {handle(func, loop)})"


def _around_consumers(func: PrimFunc, block: Block, node: For, consumers: Sequence[Block]) -> str:
    """The hint where consumers are outside of the loop: a loop around all, or they move into it first."""
    name = handle(func, node)
    others = consumers_outside(func, node, block)
    if others:
        first = "; ".join(f"sch.compute_at({each.name}, {name})" for each in others)
        return f"move {named(others)} there first: {first}; sch.compute_at({block.name}, {name})"
    around = [each for each in loops_in(func.body) if all(c in blocks_in(each) for c in consumers)]
    if not around:
        return f"no loop is around all of its consumers, {named(consumers)}"
    return (
        f"around {named(consumers)} there is {named(around)}: sch.compute_at({block.name}, {handle(func, around[0])})"
    )


def _after_the_others(func: PrimFunc, block: Block, node: For) -> str:
    """The hint where what a block reads is computed after the loop: these blocks first, or a loop of the last one."""
    order = blocks_in(func.body)
    between = order[order.index(blocks_in(node)[-1]) + 1 : order.index(block)]
    name = handle(func, node)
    needed = [block]
    for each in reversed(between):
        read = {load.buffer for one in needed for load in loads(one.body)}
        if any(store.buffer in read for store in stores(each)):
            needed.insert(0, each)
    ways = []
    if len(needed) > 1 and accepted(lambda: _moved(func, needed, node)):
        calls = "; ".join(f"sch.reverse_compute_at({each.name}, {name})" for each in needed)
        ways.append(f"move {named(needed[:-1])} there first: {calls}")
    maker = _last_maker(func, block)
    if maker is not None and accepted(lambda: reverse_compute_at(func, block.name, maker.var)):
        ways.append(_into(func, block, maker))
    return "; or ".join(ways) if ways else "leave it behind all that it reads"


def _moved(func: PrimFunc, blocks: Sequence[Block], node: For) -> PrimFunc:
    for each in blocks:
        func = reverse_compute_at(func, each.name, node.var)
    return func


def _stored(store: Store) -> frozenset[Var]:
    return frozenset(v for index in store.indices for v in free_vars(index))


def _movable(func: PrimFunc, primitive: str, name: str, loop: Var) -> tuple[Block, Store]:
    """The block and its store, if it may leave its loops."""
    path = block_path(func, name)
    block = path[-1]
    assert isinstance(block, Block)
    check_holds_no_blocks(func, primitive, block)
    if any(each.var is loop for each in loops_on(path)):
        whose = "of its consumers" if primitive == "compute_at" else "of the blocks that it reads from"
        hint = f"it takes a loop {whose}"
        raise refuse(func, primitive, block, f"it is under loop {loop.name!r} already", hint=hint)
    if not isinstance(block.body, Store):
        raise refuse(func, primitive, block, "its body is more than one store", hint=ONE_STORE)
    if block.init is None and any(load.buffer is block.body.buffer for load in loads(block.body)):
        raise refuse(func, primitive, block, "it updates a buffer in place", hint=IN_PLACE)
    lost = next((each for each in loops_on(path) if each.kind != "serial" and blocks_in(each) == (block,)), None)
    if lost is not None:
        reason = f"its loop {lost.var.name!r} is {kind_of(lost)}, and its new loops would be serial"
        call = f"sch.{primitive} before sch.{setter(lost)}, which then takes one of its new loops"
        raise refuse(func, primitive, block, reason, hint=f"in a new Schedule, {call}")
    check_unconditional(func, primitive, block, path)
    tied = tied_to(func, block)
    if tied is not None:
        reason, hint = why_tied(func, primitive, block, tied)
        raise refuse(func, primitive, block, reason, hint=hint)
    together = moving_together(block, loops_on(path))
    if together is not None:
        names = " and ".join(repr(var.name) for var in together)
        reason = f"one loop drives both its {names}: it is not known which values they would take elsewhere"
        hint = f"in a new Schedule, sch.{primitive} before sch.fuse of its loops or sch.cache_read"
        raise refuse(func, primitive, block, reason, hint=hint)
    around = enclosing(loop_path(func, loop))
    if around is not None:
        reason = f"it stands inside block {around.name!r}, which sees nothing of the loops around it"
        raise refuse(func, primitive, loop, reason, hint="take a loop outside of all blocks")
    node = find_loop(func, loop)
    if node is not None and node.kind in ("vectorized", "unrolled"):
        hint = f"in a new Schedule, sch.{primitive} before sch.{setter(node)}"
        raise refuse(func, primitive, loop, f"it is {node.kind}", hint=hint)
    return block, block.body


def _axis(func: PrimFunc, primitive: str, block: Block, buffer: Buffer, index: Expr) -> Var | None:
    """The spatial iteration variable that `index` is, or None for the index 0."""
    if isinstance(index, Const) and index.value == 0:
        return None
    if isinstance(index, Var) and any(it.var is index for it in block.iters):
        return index
    reason = f"it indexes {buffer.name!r} by {print_expr(index)}, which is none of its iteration variables"
    hint = other_way(func, buffer) if primitive == "reverse_compute_at" else _PLAIN
    raise refuse(func, primitive, block, reason, hint=hint)


def _index_axes(func: PrimFunc, primitive: str, block: Block, store: Store) -> list[Var | None]:
    axes = [_axis(func, primitive, block, store.buffer, index) for index in store.indices]
    named = [axis for axis in axes if axis is not None]
    spatial = [it.var for it in block.iters if it.kind == "spatial" and not is_one(it.extent)]
    if len(set(named)) < len(named) or any(var not in named for var in spatial):
        reason = f"its iteration variables do not each index {store.buffer.name!r}, which it writes, just once"
        raise refuse(func, primitive, block, reason, hint=_PLAIN)
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
            hint = _after_the_others(func, block, node)
            raise refuse(func, "reverse_compute_at", block, reason, hint=hint)
    if not sources:
        reason = f"nothing it reads is written under {placed(node)}"
        read = {load.buffer for load in loads(block.body)}
        makers = [b for b in order if b is not block and any(a.is_write and a.buffer in read for a in accesses(b))]
        around = [each for each in loops_in(func.body) if any(b in blocks_in(each) for b in makers)]
        hint = "no loop writes what it reads"
        if around:
            hint = f"what it reads is written under {named(around)}: {_into(func, block, around[0])}"
        elif any(a.buffer is store.buffer for store in stores(block) for b in inside for a in accesses(b)):
            user = next(b for b in inside for s in stores(block) if any(a.buffer is s.buffer for a in accesses(b)))
            hint = f"block {user.name!r} reads it there: sch.compute_at({block.name}, {handle(func, node)})"
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
            reason = f"it reads several elements of {source.name!r} at once"
            raise refuse(func, primitive, block, reason, hint=other_way(func, source))
    made = [a for a in accesses(node.body) if a.buffer is source and a.is_write]
    extents = {it.var: it.extent for it in block.iters}
    spans: dict[Var, Span] = {}
    for dim, axis in enumerate(axes):
        if axis is None:
            continue
        if not prove_equal(extents[axis], source.shape[dim]):
            whole = print_expr(as_expr(source.shape[dim]))
            size = f"its {axis.name!r} takes {print_expr(extents[axis])} values of {whole}"
            reason = f"it does not read all of {source.name!r}: {size}"
            raise refuse(func, primitive, block, reason, hint=other_way(func, source))
        span = _span(func, primitive, block, [a.indices[dim] for a in made], node, outer)
        if not _same_span(spans.setdefault(axis, span), span):
            reason = f"it reads {source.name!r} at the same index in two dims"
            raise refuse(func, primitive, block, reason, hint=other_way(func, source))
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
            reason = f"iterations of {of_kind(before, each)} would write the same parts of {buffer.name!r}"
            hint = f"take a loop outside of loop {each.var.name!r}"
            node = find_loop(before, each.var)
            if each.var is loop and node is not None and primitive == "compute_at":
                user = readers(before, buffer)[0]
                name = f"sch.get_loops({user.name})[{loops_around(before, user).index(node)}]"
                kind = f'sch.bind({name}, "{each.thread}")' if each.kind == "thread" else f"sch.parallel({name})"
                hint = (
                    f"in a new Schedule, give each iteration its own: sch.compute_at({block.name}, {name}); "
                    f'sch.set_scope({block.name}, "local"); {kind}'
                )
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
        raise refuse(func, primitive, block, reason, hint=f"leave it behind {named(strangers)} and that loop")
    shared = {id(s) for s in block_path(func, block.name)}
    for position, loop in enumerate(outer):
        if id(loop) in shared:
            continue
        reducing = reduces_over(loop)
        if reducing is not None and any(s.buffer is source for s in accesses(reducing) if s.is_write):
            reason = f"{source.name!r}, which it reads, is complete only after loop {loop.var.name!r}"
            raise refuse(func, primitive, block, reason, at=node, hint=passing(outer[:position]))
        if conflict(func, loop, outer[:position], [source]) is not None:
            reason = f"iterations of loop {loop.var.name!r} share parts of {source.name!r}, which it reads"
            raise refuse(func, primitive, block, reason, at=node, hint=passing(outer[:position]))


def _span(
    func: PrimFunc, primitive: str, block: Block, indices: Sequence[Expr], node: For, outer: Sequence[For],
    group: Sequence[For] = (),
) -> Span:  # fmt: skip
    """The values that `indices` take while the loops inside `node`, and those of the `group`, run."""
    span = span_of(indices, outer, (*group, *loops_in(flattened(node.body))))
    if span is None:
        places = ", ".join(map(print_expr, indices))
        reason = f"what an iteration of loop {node.var.name!r} needs, at {places}, is not a contiguous range"
        hint = f"take a loop further out; or, in a new Schedule, sch.{primitive} before sch.fuse"
        raise refuse(func, primitive, block, reason, at=node, hint=hint)
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
