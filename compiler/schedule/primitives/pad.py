"""Whole tiles: a sum of products over padded operands, whose padding adds nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kedge.compiler.schedule.nest import check_holds_no_blocks, combiner_of
from kedge.compiler.schedule.redirect import Place, redirected
from kedge.compiler.schedule.tree import LARGEST_INDEX, block_name, block_path, buffer_name, loops_on, refuse, swap
from kedge.compiler.tir.expr import Binary, Cast, Const, Dim, Expr, Load, Var, const, logical_and, select
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.simplify import prove, prove_equal, simplify, simplify_dim
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import seq

_HINT = "it takes sums of products of elements, such as c[i, j] += a[i, k] * b[k, j]"


def pad_einsum(func: PrimFunc, name: str, padding: Sequence[int]) -> PrimFunc:
    """`func` with the extents of block `name` rounded up to multiples, one per iteration variable.

    Operands get copies with zeros at their ends, the output one that is cut.
    """
    primitive = "pad_einsum"
    path = block_path(func, name)
    block, loops = path[-1], loops_on(path)
    assert isinstance(block, Block)
    check_holds_no_blocks(func, primitive, block)
    if len(padding) != len(block.iters) or not all(1 <= step <= LARGEST_INDEX for step in padding):
        names = ", ".join(it.var.name for it in block.iters)
        reason = f"padding {list(padding)}: it takes one number from 1 on for each of {names}"
        hint = f"1 leaves an extent as it is: sch.pad_einsum({block.name}, {[1] * len(block.iters)})"
        raise refuse(func, primitive, block, reason, hint=hint)
    _check_plain(func, block, loops)
    operands = _check_einsum(func, block)
    extents = {
        it.var: simplify((it.extent + (step - 1)) // step * step) for it, step in zip(block.iters, padding, strict=True)
    }
    grown = {it.var for it in block.iters if not prove_equal(it.extent, extents[it.var])}
    _check_zeros(func, block, operands, grown)
    if not grown:
        return func
    sizes = {it.var: it.extent for it in block.iters}
    made: dict[tuple[Buffer, tuple[Expr, ...]], Buffer] = {}
    before: list[Stmt] = []
    for load in operands:
        operand = (load.buffer, load.indices)  # one buffer may be two operands
        if operand not in made and any(index in grown for index in load.indices):
            func, made[operand], fill = _padded_copy(func, load, extents, sizes)
            before.append(fill)
    func, nest, after = _grown_nest(func, block, loops, extents, grown, made)
    return swap(func, loops[0], seq(*before, nest, *after))


def _check_plain(func: PrimFunc, block: Block, loops: Sequence[For]) -> None:
    """Refuse unless the block stands alone in loops of its own, as lowering made them."""
    own = [id(loop.var) for loop in loops] == [id(binding) for binding in block.bindings]
    alone = bool(loops) and all(a.body is b for a, b in zip(loops, (*loops[1:], block), strict=True))
    if not (own and alone and all(loop.kind == "serial" for loop in loops)):
        hint = "in a new Schedule, sch.pad_einsum before anything else is done to the block"
        raise refuse(func, "pad_einsum", block, "its loops are not one serial loop per iteration variable", hint=hint)


def _check_einsum(func: PrimFunc, block: Block) -> tuple[Load, ...]:
    """The operands of the sum of products that the block computes."""
    body = block.body
    if combiner_of(block) != "add":
        raise refuse(func, "pad_einsum", block, "it is no sum that begins at 0: padding would change it", hint=_HINT)
    assert isinstance(body, Store) and isinstance(body.value, Binary)
    operands = _factors(body.value.b)
    if operands is None:
        reason = "what it sums is no product of elements: zeros would not stay zeros"
        raise refuse(func, "pad_einsum", block, reason, hint=_HINT)
    for load in (*operands, Load(body.buffer, body.indices)):
        moving = [index for index in load.indices if not _is_zero(index)]
        if len(set(moving)) < len(moving) or not all(isinstance(index, Var) for index in moving):
            at = ", ".join(map(print_expr, load.indices))
            reason = f"it uses {load.buffer.name!r} at [{at}]: each index must be an iteration variable of its own or 0"
            raise refuse(func, "pad_einsum", block, reason, hint=_HINT)
    return operands


def _is_zero(index: Expr) -> bool:
    return isinstance(index, Const) and index.value == 0


def _factors(value: Expr) -> tuple[Load, ...] | None:
    match value:
        case Load():
            return (value,)
        case Cast(value=inner):
            return _factors(inner)
        case Binary(op="mul", a=a, b=b):
            left, right = _factors(a), _factors(b)
            return None if left is None or right is None else (*left, *right)
    return None


def _check_zeros(func: PrimFunc, block: Block, operands: Sequence[Load], grown: set[Var]) -> None:
    """Refuse unless every added term is a product of zeros alone: infinity times zero would not be nothing."""
    for it in block.iters:
        if it.kind == "reduce" and it.var in grown:
            other = next((load.buffer.name for load in operands if it.var not in load.indices), None)
            if other is not None:
                reason = f"{other!r} does not depend on {it.var.name!r}: its infinities would meet the padding's zeros"
                padding = [1 if other_it.kind == "reduce" else 8 for other_it in block.iters]
                hint = f"leave {it.var.name!r} as it is: sch.pad_einsum({block.name}, {padding})"
                raise refuse(func, "pad_einsum", block, reason, hint=hint)


def _padded_copy(
    func: PrimFunc, load: Load, extents: Mapping[Var, Expr], sizes: Mapping[Var, Expr]
) -> tuple[PrimFunc, Buffer, Stmt]:
    """An allocation as large as the padded loops need, and the loops that fill it: with zeros beyond `sizes`."""
    source = load.buffer
    axes = [index for index in load.indices if isinstance(index, Var)]
    copy = Buffer(buffer_name(func, f"{source.name}_pad"), _grown_shape(load.indices, extents), source.dtype)
    iters = tuple(IterVar(Var(axis.name), extents[axis], "spatial") for axis in axes)
    at = _replaced(load.indices, iters)
    limits = [c for it, axis in zip(iters, axes, strict=True) for c in _limits(it, sizes[axis])]
    value: Expr = Load(source, at)
    if limits:
        value = select(logical_and(*limits), value, const(0, source.dtype))
    nest = _nest(block_name(func, copy.name), iters, Store(copy, at, value))
    return replace(func, allocs=(*func.allocs, copy)), copy, nest


def _grown_shape(indices: tuple[Expr, ...], extents: Mapping[Var, Expr]) -> tuple[Dim, ...]:
    """The dims of a buffer used at `indices`: one element where the index is 0."""
    return tuple(simplify_dim(extents[index]) if isinstance(index, Var) else 1 for index in indices)


def _replaced(indices: tuple[Expr, ...], iters: Sequence[IterVar]) -> tuple[Expr, ...]:
    """`indices` with their variables replaced, in order, by those of `iters`."""
    new = iter(iters)
    return tuple(next(new).var if isinstance(index, Var) else index for index in indices)


def _limits(it: IterVar, size: Expr) -> list[Expr]:
    return [] if prove(it.extent <= size) else [it.var < size]


def _grown_nest(
    func: PrimFunc,
    block: Block,
    loops: Sequence[For],
    extents: Mapping[Var, Expr],
    grown: set[Var],
    made: Mapping[tuple[Buffer, tuple[Expr, ...]], Buffer],
) -> tuple[PrimFunc, Stmt, list[Stmt]]:
    """The block over the padded operands, and what cuts its output where that has grown."""
    body = block.body
    assert isinstance(body, Store)
    target, after = body.buffer, []
    if any(index in grown for index in body.indices):
        shape = _grown_shape(body.indices, extents)
        target = Buffer(buffer_name(func, f"{body.buffer.name}_pad"), shape, body.buffer.dtype)
        func = replace(func, allocs=(*func.allocs, target))
        after.append(_cut(func, block, body, target))

    def move(buffer: Buffer, indices: tuple[Expr, ...]) -> Place | None:
        return (target if buffer is body.buffer else made.get((buffer, indices), buffer)), indices

    iters = tuple(replace(it, extent=extents[it.var]) for it in block.iters)
    new: Stmt = redirected(replace(block, iters=iters), move)
    for loop, it in zip(reversed(loops), reversed(block.iters), strict=True):
        new = replace(loop, extent=extents[it.var], body=new)
    return func, new, after


def _cut(func: PrimFunc, block: Block, body: Store, padded: Buffer) -> Stmt:
    """The loops that copy what is wanted of the padded output."""
    extents = {it.var: it.extent for it in block.iters}
    iters = tuple(IterVar(Var(i.name), extents[i], "spatial") for i in body.indices if isinstance(i, Var))
    at = _replaced(body.indices, iters)
    return _nest(block_name(func, f"{block.name}_cut"), iters, Store(body.buffer, at, Load(padded, at)))


def _nest(name: str, iters: tuple[IterVar, ...], store: Store) -> Stmt:
    """One loop per iteration variable around a block of one store."""
    variables = tuple(Var(it.var.name.removeprefix("v") or it.var.name) for it in iters)
    stmt: Stmt = with_regions(Block(name, iters, variables, (), (), store))
    for var, it in zip(reversed(variables), reversed(iters), strict=True):
        stmt = For(var, it.extent, "serial", stmt)
    return stmt
