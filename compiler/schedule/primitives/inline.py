"""Primitives that make a block disappear into its consumers or its producer."""

from __future__ import annotations

from dataclasses import replace

from kedge.compiler.schedule.dependence import tied_to
from kedge.compiler.schedule.nest import check_unconditional, is_one
from kedge.compiler.schedule.order import before, overwritten_before, touched_since
from kedge.compiler.schedule.tree import (
    block_path,
    blocks_in,
    check_only_writer,
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
            raise refuse(func, "compute_inline", block, reason)
        changed = overwritten_before(func, block, consumer)
        if changed is not None:
            reason = (
                f"block {changed[0].name!r} writes {changed[1].name!r}, which it reads, before {consumer.name!r} ends"
            )
            raise refuse(func, "compute_inline", block, reason)
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
    axes = _axes(func, primitive, block, reads[0].indices, f"reads {source.name!r}")
    for load in reads[1:]:
        if _axes(func, primitive, block, load.indices, f"reads {source.name!r}") != axes:
            raise refuse(func, primitive, block, f"it reads several elements of {source.name!r} at once")
    extents = {it.var: it.extent for it in block.iters}
    for axis, dim in zip(axes, source.shape, strict=True):
        if axis is not None and not prove_equal(extents[axis], dim):
            size = f"its {axis.name!r} takes {print_expr(extents[axis])} values of {print_expr(as_expr(dim))}"
            raise refuse(func, primitive, block, f"it does not read all of {source.name!r}: {size}")
    check_only_writer(func, primitive, block, store.buffer)
    touched = touched_since(func, block, producer)
    if touched is not None:
        reason = f"block {touched[0].name!r} uses {touched[1].name!r}, which it writes, after {producer.name!r} begins"
        raise refuse(func, primitive, block, reason)
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
    if block.init is not None or any(it.kind == "reduce" for it in block.iters):
        hint = "cache_write it: the copy can be inlined" if primitive == "compute_inline" else None
        raise refuse(func, primitive, block, "it is a reduction, not one value for each element", hint=hint)
    if not isinstance(block.body, Store):
        raise refuse(func, primitive, block, "its body is more than one store")
    if any(load.buffer is block.body.buffer for load in loads(block.body)):
        raise refuse(func, primitive, block, "it updates a buffer in place")
    check_unconditional(func, primitive, block, block_path(func, name))
    tied = tied_to(func, block)
    if tied is not None:
        reason = f"{tied.name!r} in {tied.scope} scope, used anew in each iteration, ties it to the loops around it"
        raise refuse(func, primitive, block, reason, hint="inline it before caching")
    return block, block.body


def _check_hidden(func: PrimFunc, primitive: str, block: Block, buffer: Buffer) -> None:
    if not intermediate(func, buffer):
        hint = "reverse_compute_inline takes it into the block that it reads from"
        raise refuse(func, primitive, block, f"it computes the output {buffer.name!r}, which must be there", hint=hint)
    check_only_writer(func, primitive, block, buffer)


def _axes(func: PrimFunc, primitive: str, block: Block, indices: tuple[Expr, ...], what: str) -> tuple[Var | None, ...]:
    """The iteration variable that each index is; None for the index 0. All variables must be there, each once."""
    axes = tuple(index if isinstance(index, Var) else None for index in indices)
    named = [axis for axis in axes if axis is not None]
    plain = all(a is not None or _is_zero(i) for a, i in zip(axes, indices, strict=True))
    if not plain or len(set(named)) < len(named):
        at = ", ".join(map(print_expr, indices))
        reason = f"it {what} at [{at}]: each index must be an iteration variable of its own, or 0"
        raise refuse(func, primitive, block, reason)
    for it in block.iters:
        if it.var not in named and not is_one(it.extent):
            at = ", ".join(map(print_expr, indices))
            raise refuse(func, primitive, block, f"it {what} at [{at}], the same for all values of {it.var.name!r}")
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
        raise refuse(func, primitive, block, reason)
    reason, hint = "", None
    for producer, buffer in candidates:
        if producer.init is not None or any(it.kind == "reduce" for it in producer.iters):
            reason = f"its producer {producer.name!r} is a reduction"
            hint = "cache_write the reduction, then inline into the copy"
        elif not isinstance(producer.body, Store):
            reason = f"its producer {producer.name!r} is more than one store"
        elif any(load.buffer is buffer for load in loads(producer.body)):
            reason = f"its producer {producer.name!r} updates {buffer.name!r} in place"
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
                raise refuse(func, "reverse_compute_inline", block, reason)


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
