"""Primitives that make a block disappear into its consumers or its producer."""

from __future__ import annotations

from dataclasses import replace

from kedge.compiler.schedule.dependence import tied_to
from kedge.compiler.schedule.nest import check_holds_no_blocks, check_unconditional, is_one
from kedge.compiler.schedule.order import before, overwritten_before, touched_since
from kedge.compiler.schedule.remedies import inline_call, loops_around, merge_call, other_way, why_tied
from kedge.compiler.schedule.tree import (
    block_path,
    blocks_in,
    check_only_writer,
    handle,
    intermediate,
    readers,
    refuse,
    remove,
    swap,
    writers,
)
from kedge.compiler.tir.expr import Const, Expr, Load, Var, as_expr, const
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.simplify import Simplifier, over, prove_equal
from kedge.compiler.tir.stmt import Block, Buffer, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import loads, map_expr, map_stmt, map_stmt_exprs, substitute_expr

ONE_STORE = "it takes blocks that store one element: write the other store as a te.compute of its own"
IN_PLACE = "in a new Schedule, do this before sch.decompose_reduction, or have the block write another buffer"
_STAYS = "leave it where it is, or do this to the block that stands between the two first"


def compute_inline(func: PrimFunc, name: str) -> PrimFunc:
    """`func` without block `name`: its consumers compute what they read of it. For blocks without a reduction."""
    block, store = _simple_block(func, "compute_inline", name)
    buffer = store.buffer
    _check_hidden(func, "compute_inline", block, buffer)
    axes = _axes(func, "compute_inline", block, store.indices, f"writes {buffer.name!r}")
    consumers = readers(func, buffer)
    for consumer in consumers:
        if before(func, consumer, block):
            reason = f"its consumer {consumer.name!r} runs before it, on older values"
            raise refuse(func, "compute_inline", block, reason, hint=_STAYS)
        changed = overwritten_before(func, block, consumer)
        if changed is not None:
            reason = (
                f"block {changed[0].name!r} writes {changed[1].name!r}, which it reads, before {consumer.name!r} ends"
            )
            raise refuse(func, "compute_inline", block, reason, hint=_STAYS)
    value = substitute_expr(store.value, {it.var: const(0) for it in block.iters if it.var not in axes})
    func = remove(func, block)
    for consumer in consumers:
        found = next(b for b in blocks_in(func.body) if b.name == consumer.name)
        func = swap(func, found, _inlined_into(found, buffer, axes, value))
    return _drop_alloc(func, buffer)


def reverse_compute_inline(func: PrimFunc, name: str) -> PrimFunc:
    """`func` without block `name`: the only producer of what it reads stores the result itself."""
    primitive = "reverse_compute_inline"
    block, store = _simple_block(func, primitive, name)
    producer, source = _only_producer(func, block)
    made = producer.body
    assert isinstance(made, Store)
    reads = [load for load in loads(store.value) if load.buffer is source]
    _check_early(func, block, producer, source)
    axes = _axes(func, primitive, block, reads[0].indices, f"reads {source.name!r}", source)
    for load in reads[1:]:
        if _axes(func, primitive, block, load.indices, f"reads {source.name!r}", source) != axes:
            reason = f"it reads several elements of {source.name!r} at once"
            raise refuse(func, primitive, block, reason, hint=other_way(func, source))
    extents = {it.var: it.extent for it in block.iters}
    for axis, dim in zip(axes, source.shape, strict=True):
        if axis is not None and not prove_equal(extents[axis], dim):
            size = f"its {axis.name!r} takes {print_expr(extents[axis])} values of {print_expr(as_expr(dim))}"
            reason = f"it does not read all of {source.name!r}: {size}"
            raise refuse(func, primitive, block, reason, hint=other_way(func, source))
    check_only_writer(func, primitive, block, store.buffer)
    touched = touched_since(func, block, producer)
    if touched is not None:
        reason = f"block {touched[0].name!r} uses {touched[1].name!r}, which it writes, after {producer.name!r} begins"
        raise refuse(func, primitive, block, reason, hint=_STAYS)
    values: dict[Var, Expr] = {a: i for a, i in zip(axes, made.indices, strict=True) if a is not None}
    values.update({it.var: const(0) for it in block.iters if it.var not in values})

    def use(expr: Expr) -> Expr:
        return map_expr(
            substitute_expr(expr, values),
            lambda e: made.value if isinstance(e, Load) and e.buffer is source else e,
        )

    simplifier = _simplifier(producer)
    indices = tuple(simplifier.simplify(use(i)) for i in store.indices)
    fused = Store(store.buffer, indices, simplifier.simplify(use(store.value)))
    func = remove(func, block)
    found = next(b for b in blocks_in(func.body) if b.name == producer.name)
    return _drop_alloc(swap(func, found, with_regions(replace(found, body=fused))), source)


def _simple_block(func: PrimFunc, primitive: str, name: str) -> tuple[Block, Store]:
    """The block `name`, which must compute one element of one buffer from others, and that store."""
    block = next(b for b in blocks_in(func.body) if b.name == name)
    check_holds_no_blocks(func, primitive, block)
    if block.init is not None or any(it.kind == "reduce" for it in block.iters):
        hint = _for_reductions(func, primitive, block)
        raise refuse(func, primitive, block, "it is a reduction, not one value for each element", hint=hint)
    if not isinstance(block.body, Store):
        raise refuse(func, primitive, block, "its body is more than one store", hint=ONE_STORE)
    if any(load.buffer is block.body.buffer for load in loads(block.body)):
        raise refuse(func, primitive, block, "it updates a buffer in place", hint=IN_PLACE)
    check_unconditional(func, primitive, block, block_path(func, name))
    tied = tied_to(func, block)
    if tied is not None:
        reason, hint = why_tied(func, primitive, block, tied)
        raise refuse(func, primitive, block, reason, hint=hint)
    return block, block.body


def _check_hidden(func: PrimFunc, primitive: str, block: Block, buffer: Buffer) -> None:
    if not intermediate(func, buffer):
        merged = merge_call(func, block)
        hint = "an output stays: inline what it reads"
        if merged is not None:
            hint = f"merge it into block {merged[1].name!r}, which computes what it reads: {merged[0]}"
        reason = f"{buffer.name!r}, which it computes, is an output of the function and must be there"
        raise refuse(func, primitive, block, reason, hint=hint)
    check_only_writer(func, primitive, block, buffer)


def _for_reductions(func: PrimFunc, primitive: str, block: Block) -> str:
    """What to do with a reduction instead of inlining it."""
    if primitive == "reverse_compute_inline":
        calls = [call for load in loads(block.body) if (call := inline_call(func, load.buffer)) is not None]
        return f"take what it reads into it: {calls[0]}" if calls else "it stays; its loops can be changed"
    if block.init is None:
        return "in a new Schedule, sch.compute_at before sch.decompose_reduction moves it to where it is read"
    written = block.body.buffer if isinstance(block.body, Store) else None
    users = [] if written is None else readers(func, written)
    ways = []
    around = loops_around(func, users[0]) if len(users) == 1 else ()
    if around:
        ways.append(f"move it to where it is read: sch.compute_at({block.name}, {handle(func, around[-1])})")
    merged = merge_call(func, users[0]) if len(users) == 1 else None
    if merged is not None:
        ways.append(f"merge block {users[0].name!r} into it: {merged[0]}")
    return "; or ".join(ways) if ways else "sch.compute_at moves it to where it is read"


def _axes(
    func: PrimFunc, primitive: str, block: Block, indices: tuple[Expr, ...], what: str, source: Buffer | None = None
) -> tuple[Var | None, ...]:
    """The iteration variable that each index is; None for the index 0. All variables must be there, each once."""
    hint = "write it with te.compute, which stores at plain indices" if source is None else other_way(func, source)
    axes = tuple(index if isinstance(index, Var) else None for index in indices)
    named = [axis for axis in axes if axis is not None]
    plain = all(a is not None or _is_zero(i) for a, i in zip(axes, indices, strict=True))
    if not plain or len(set(named)) < len(named):
        at = ", ".join(map(print_expr, indices))
        reason = f"it {what} at [{at}]: each index must be an iteration variable of its own, or 0"
        raise refuse(func, primitive, block, reason, hint=hint)
    for it in block.iters:
        if it.var not in named and not is_one(it.extent):
            at = ", ".join(map(print_expr, indices))
            reason = f"it {what} at [{at}], the same for all values of {it.var.name!r}"
            raise refuse(func, primitive, block, reason, hint=hint)
    return axes


def _is_zero(expr: Expr) -> bool:
    return isinstance(expr, Const) and expr.value == 0


def _only_producer(func: PrimFunc, block: Block) -> tuple[Block, Buffer]:
    """The block into which `block` can go, and the buffer between the two."""
    primitive = "reverse_compute_inline"
    candidates = [
        (made[0], buffer)
        for buffer in dict.fromkeys(load.buffer for load in loads(block.body))
        if intermediate(func, buffer) and len(made := writers(func, buffer)) == 1
        if readers(func, buffer) == (block,)
    ]
    if not candidates:
        reason = "it reads no intermediate buffer that is written by one block alone and read by it alone"
        calls = [call for load in loads(block.body) if (call := inline_call(func, load.buffer)) is not None]
        hint = f"take what it reads into it: {calls[0]}" if calls else "it reads nothing that it could be merged into"
        raise refuse(func, primitive, block, reason, hint=hint)
    reason, hint = "", ""
    for producer, buffer in candidates:
        if producer.init is not None or any(it.kind == "reduce" for it in producer.iters):
            reason = f"its producer {producer.name!r} is a reduction"
            merged = merge_call(func, block)
            hint = "a reduction stays as it is" if merged is None else f"merge it into a copy: {merged[0]}"
        elif not isinstance(producer.body, Store):
            reason = f"its producer {producer.name!r} is more than one store"
            hint = ONE_STORE
        elif any(load.buffer is buffer for load in loads(producer.body)):
            reason = f"its producer {producer.name!r} updates {buffer.name!r} in place"
            hint = IN_PLACE
        else:
            return producer, buffer
    raise refuse(func, primitive, block, reason, hint=hint)


def _check_early(func: PrimFunc, block: Block, producer: Block, source: Buffer) -> None:
    """Refuse if something else that `block` reads is not computed yet where its producer runs."""
    order = blocks_in(func.body)
    for buffer in dict.fromkeys(load.buffer for load in loads(block.body) if load.buffer is not source):
        for writer in writers(func, buffer):
            if order.index(writer) >= order.index(producer):
                reason = f"it reads {buffer.name!r}, which block {writer.name!r} computes after {producer.name!r}"
                raise refuse(func, "reverse_compute_inline", block, reason, hint=other_way(func, source))


def _inlined_into(consumer: Block, buffer: Buffer, axes: tuple[Var | None, ...], value: Expr) -> Block:
    simplifier = _simplifier(consumer)

    def use(expr: Expr) -> Expr:
        if not (isinstance(expr, Load) and expr.buffer is buffer):
            return expr
        mapping = {axis: index for axis, index in zip(axes, expr.indices, strict=True) if axis is not None}
        return simplifier.simplify(substitute_expr(value, mapping))

    def visit(stmt: Stmt) -> Stmt:
        return map_stmt_exprs(stmt, lambda e: map_expr(e, use)) if not isinstance(stmt, Block) else stmt

    body = map_stmt(consumer.body, visit)
    init = None if consumer.init is None else map_stmt(consumer.init, visit)
    return with_regions(replace(consumer, body=body, init=init))


def _simplifier(block: Block) -> Simplifier:
    return Simplifier({it.var: over(as_expr(it.extent)) for it in block.iters})


def _drop_alloc(func: PrimFunc, buffer: Buffer) -> PrimFunc:
    return replace(func, allocs=tuple(b for b in func.allocs if b is not buffer))
