"""Accumulating in a small buffer near the core, copied out when it is done."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from itertools import takewhile

from kedge.compiler.schedule.nest import check_holds_no_blocks, fresh_nest, limits_of_output, loop_vars, resolved
from kedge.compiler.schedule.primitives.inline import IN_PLACE, ONE_STORE
from kedge.compiler.schedule.primitives.loops import simplify_bindings
from kedge.compiler.schedule.primitives.storage import check_allocation
from kedge.compiler.schedule.redirect import Place, redirected
from kedge.compiler.schedule.tree import (
    before_blockize,
    block_name,
    block_path,
    blocks_in,
    buffer_name,
    check_only_writer,
    condition_on,
    enclosing,
    handle,
    loop_ranges,
    loops_on,
    passing,
    position_around,
    readers,
    refuse,
    swap,
)
from kedge.compiler.tir.expr import Const, Expr, Load, Var, const, logical_and
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Simplifier
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Range, Scope, Seq, Stmt, Store
from kedge.compiler.tir.structural import expr_equal
from kedge.compiler.tir.visitor import free_vars, loads, map_stmt, seq, substitute_expr


def cache_write(func: PrimFunc, name: str, loop: Var, scope: Scope) -> tuple[PrimFunc, str]:
    """`func` with block `name` writing a small buffer of `scope` under `loop`, copied out after `loop`'s inner nest.

    The buffer holds what one iteration of `loop` writes. Returns the name of the block that copies.
    """
    primitive = "cache_write"
    path = block_path(func, name)
    block, loops = path[-1], loops_on(path)
    assert isinstance(block, Block)
    check_holds_no_blocks(func, primitive, block)
    reducing = loop_vars(resolved(func, block), "reduce")
    fitting = list(takewhile(lambda each: each.var not in reducing, loops))
    position = position_around(func, primitive, block, loops, loop, fitting)
    outer, inner = loops[: position + 1], loops[position + 1 :]
    lanes = next((each for each in outer if each.kind == "vectorized"), None)
    if lanes is not None:
        reason = "it is vectorized: its lanes would share the copy"
        raise refuse(func, primitive, lanes.var, reason, hint="in a new Schedule, sch.cache_write before sch.vectorize")
    target, axes = _written(func, block, outer, reducing)
    offsets, extents = _tile(func, block, axes, loop, inner)
    cache = Buffer(buffer_name(func, f"{target.name}_{scope}"), tuple(extents), target.dtype, scope)
    func = replace(func, allocs=(*func.allocs, cache))
    copy = _copy_nest(func, block, target, cache, offsets, inner)
    moved = _redirected(block, target, cache, offsets)
    node = loops[position]
    # The copy comes right after the statement that fills the cache, before anything that reads the result.
    filled = next(s for s in path[path.index(node) + 1 :] if not isinstance(s, Seq))
    if any(each in blocks_in(filled) for each in readers(func, target)):
        reason = f"{target.name!r} is read inside the loops under {loop.name!r}, before it would be copied out"
        raise refuse(func, primitive, block, reason, hint="take a loop further in")
    new = map_stmt(filled, lambda s: moved if s is block else s)
    statements = node.body.stmts if isinstance(node.body, Seq) else (node.body,)
    new_body = seq(*(part for s in statements for part in ((new, copy) if s is filled else (s,))))
    new_loop = simplify_bindings(replace(node, body=new_body), loop_ranges(loops[:position]))
    new_func = swap(func, node, new_loop)
    call = f"sch.cache_write({name}, {loop.name}, {{}})"
    check_allocation(func, new_func, primitive, block, cache, call)
    return new_func, blocks_in(copy)[0].name


def _written(
    func: PrimFunc, block: Block, outer: tuple[For, ...], reducing: Collection[Var]
) -> tuple[Buffer, tuple[int | None, ...]]:
    """The buffer that `block` writes, and for each of its dims the iteration variable (by number) that indexes it."""
    primitive = "cache_write"
    body = block.body
    if not isinstance(body, Store):
        raise refuse(func, primitive, block, "its body is more than one store", hint=ONE_STORE)
    for loop in outer:
        if loop.var in reducing:
            reason = f"loop {loop.var.name!r} around the copy takes part in the reduction"
            legal = list(takewhile(lambda each: each.var not in reducing, outer))
            inside = enclosing(block_path(func, block.name)[:-1]) is not None
            raise refuse(func, primitive, block, reason, hint=before_blockize(primitive) if inside else passing(legal))
    condition = condition_on(block_path(func, block.name))
    if condition is not None:
        reason = f"it runs only if {print_expr(condition.condition)}, and its copy would always run"
        raise refuse(func, primitive, block, reason, hint="write the condition as te.select in the value")
    check_only_writer(func, primitive, block, body.buffer)
    if block.init is None and any(load.buffer is body.buffer for load in loads(body)):
        raise refuse(func, primitive, block, f"it updates {body.buffer.name!r} in place", hint=IN_PLACE)
    read = (load.indices for load in loads(body.value) if load.buffer is body.buffer)
    if any(not all(map(expr_equal, indices, body.indices)) for indices in read):
        reason = f"it reads other elements of {body.buffer.name!r} than the one it writes"
        raise refuse(func, primitive, block, reason, hint="have it write another buffer than it reads")
    numbers = {it.var: i for i, it in enumerate(block.iters)}
    axes: list[int | None] = []
    for index in body.indices:
        plain = isinstance(index, Const) or (isinstance(index, Var) and index in numbers)
        if not plain:
            at = ", ".join(map(print_expr, body.indices))
            reason = f"it writes {body.buffer.name!r} at [{at}]: each index must be an iteration variable or 0"
            hint = "write it with te.compute, which stores at its iteration variables"
            raise refuse(func, primitive, block, reason, hint=hint)
        axes.append(numbers[index] if isinstance(index, Var) else None)
    return body.buffer, tuple(axes)


def _tile(
    func: PrimFunc, block: Block, axes: tuple[int | None, ...], loop: Var, inner: tuple[For, ...]
) -> tuple[list[Expr | None], list[int]]:
    """Per dim of the buffer: the position within the cache (None: always 0) in terms of inner loops, and its size."""
    ranges: dict[Var, Range] = loop_ranges(inner)
    simplifier = Simplifier(ranges)
    offsets: list[Expr | None] = []
    extents: list[int] = []
    for axis in axes:
        if axis is None:
            offsets.append(None)
            extents.append(1)
            continue
        offset = simplifier.simplify(_inner_part(block.bindings[axis], inner))
        low, high = simplifier.bounds(offset)
        if low != 0 or high is None or not _splits(block.bindings[axis], inner):
            name = block.iters[axis].var.name
            binding = print_expr(block.bindings[axis])
            reason = (
                f"the copy would have a size that is not constant: under loop {loop.name!r}, {name!r} = {binding} does "
                "not run over a constant number of values"
            )
            free = next((each for each in inner if each.var in free_vars(block.bindings[axis])), inner[0])
            hint = f"do this before sch.split of loop {free.var.name!r}, or take a loop further in"
            if not isinstance(free.extent, Const):
                part = f"{free.var.name}_0"
                hint = (
                    f"{part}, {free.var.name}_1 = sch.split({handle(func, free, free)}, [None, 16]); "
                    f"sch.cache_write({block.name}, {part})"
                )
            raise refuse(func, "cache_write", block, reason, hint=hint)
        extents.append(high + 1)
        offsets.append(None if high == 0 else offset)
    return offsets, extents


def _inner_part(binding: Expr, inner: tuple[For, ...]) -> Expr:
    """How far the inner loops take `binding` from its start, with all other loops at 0."""
    names = {loop.var for loop in inner}
    # Free dims, which have a least value, stay.
    part = substitute_expr(binding, {v: const(0) for v in free_vars(binding) if v not in names and v.lower is None})
    return part - substitute_expr(part, dict.fromkeys(names, const(0)))


def _splits(binding: Expr, inner: tuple[For, ...]) -> bool:
    """Whether `binding` is a part of the outer loops plus a part of the inner ones."""
    outer_part = substitute_expr(binding, {loop.var: const(0) for loop in inner})
    simplifier = Simplifier(loop_ranges(inner))
    return simplifier.prove_equal(binding, outer_part + _inner_part(binding, inner))


def _redirected(block: Block, target: Buffer, cache: Buffer, offsets: list[Expr | None]) -> Block:
    """`block` writing the cache, at iteration variables added for the positions within it."""
    extra, bindings, position = _positions(cache, offsets)

    def move(buffer: Buffer, indices: tuple[Expr, ...]) -> Place | None:
        return (cache, position) if buffer is target else None

    wider = replace(block, iters=(*block.iters, *extra), bindings=(*block.bindings, *bindings))
    return redirected(wider, move)


def _positions(
    cache: Buffer, offsets: list[Expr | None]
) -> tuple[tuple[IterVar, ...], tuple[Expr, ...], tuple[Expr, ...]]:
    """Iteration variables for the positions within the cache, their bindings, and the cache's indices."""
    extra: list[IterVar] = []
    bindings: list[Expr] = []
    indices: list[Expr] = []
    for dim, (offset, size) in enumerate(zip(offsets, cache.shape, strict=True)):
        if offset is None or not isinstance(size, int):
            indices.append(const(0))
            continue
        it = IterVar(Var(f"r{dim}"), const(size), "spatial")
        extra.append(it)
        bindings.append(offset)
        indices.append(it.var)
    return tuple(extra), tuple(bindings), tuple(indices)


def _copy_nest(
    func: PrimFunc, block: Block, target: Buffer, cache: Buffer, offsets: list[Expr | None], inner: tuple[For, ...]
) -> Stmt:
    """The loops that copy the cache out, and their block."""
    body = block.body
    assert isinstance(body, Store)
    spatial, limits = loop_vars(block, "spatial"), limits_of_output(func, "cache_write", block)
    extra, bindings, position = _positions(cache, offsets)
    pairs = [(it, b) for it, b in zip(block.iters, block.bindings, strict=True) if it.kind == "spatial"]
    copy = Block(
        block_name(func, f"{block.name}_{cache.scope}"),
        (*(it for it, _ in pairs), *extra),
        (*(b for _, b in pairs), *bindings),
        (),
        (),
        Store(target, body.indices, Load(cache, position)),
        predicate=logical_and(*limits),
    )
    needed = spatial | {v for limit in limits for v in free_vars(limit)}
    return fresh_nest(copy, [loop for loop in inner if loop.var in needed])
