"""Reading from a small buffer near the core, filled where a loop's iteration begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kedge.compiler.schedule.dependence import group_loops
from kedge.compiler.schedule.nest import check_holds_no_blocks, loop_vars, span_of
from kedge.compiler.schedule.primitives.loops import before_fusing, simplify_bindings
from kedge.compiler.schedule.primitives.storage import check_allocation
from kedge.compiler.schedule.redirect import Place, redirected
from kedge.compiler.schedule.remedies import cache_write_call
from kedge.compiler.schedule.tree import (
    accesses,
    block_name,
    block_path,
    blocks_in,
    buffer_name,
    handle,
    loop_ranges,
    loops_on,
    named,
    position_around,
    refuse,
    setter,
    swap,
    writers,
)
from kedge.compiler.tir.expr import Const, Dim, Expr, Load, Var, as_expr, const, logical_and
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.simplify import Simplifier, simplify_dim
from kedge.compiler.tir.stmt import Block, Buffer, For, IterKind, IterVar, PrimFunc, Scope, Seq, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, loads, map_stmt, seq, stores, substitute_expr, walk_expr


def cache_read(func: PrimFunc, name: str, source_name: str, loop: Var, scope: Scope) -> tuple[PrimFunc, str]:
    """`func` with block `name` reading a copy of a part of a buffer, made at the start of the body of `loop`.

    The copy holds what the block reads in one iteration of `loop`; in shared scope, what all threads of a group read
    then, as far as loops are bound to threads already. Returns the name of the block that copies.
    """
    primitive = "cache_read"
    path = block_path(func, name)
    block, loops = path[-1], loops_on(path)
    assert isinstance(block, Block)
    check_holds_no_blocks(func, primitive, block)
    fitting = [each for each in loops if each.kind not in ("vectorized", "unrolled")]
    position = position_around(func, primitive, block, loops, loop, fitting)
    node, outer, inner = loops[position], loops[: position + 1], loops[position + 1 :]
    if node.kind in ("vectorized", "unrolled"):
        hint = f"in a new Schedule, sch.cache_read before sch.{setter(node)}"
        raise refuse(func, primitive, loop, f"it is {node.kind}", hint=hint)
    source = _source(func, block, source_name, node)
    # Threads of a group share the copy: it holds what all of them read.
    group = group_loops(outer, scope)
    apart = tuple(each for each in outer if each not in group)
    starts, shape = _part_read(func, block, source, apart, (*group, *inner))
    copy = Buffer(buffer_name(func, f"{source.name}_{scope}"), shape, source.dtype, scope)
    nest = _fill_nest(func, source, copy, starts)
    redirected = _reading(func, block, source, copy, starts, outer, inner)
    below = map_stmt(node.body, lambda s: redirected if s is block else s)
    new_loop = simplify_bindings(replace(node, body=seq(nest, below)), loop_ranges(outer[:-1]))
    new = swap(replace(func, allocs=(*func.allocs, copy)), node, new_loop)
    call = f'sch.cache_read({name}, "{source_name}", {loop.name}, {{}})'
    check_allocation(func, new, primitive, block, copy, call)
    return new, blocks_in(nest)[0].name


def _source(func: PrimFunc, block: Block, name: str, node: For) -> Buffer:
    """The buffer called `name`, which `block` reads and nothing under the loop writes."""
    read = tuple(dict.fromkeys(load.buffer for load in loads(block)))
    source = next((buffer for buffer in read if buffer.name == name), None)
    if source is None:
        own = {store.buffer for store in stores(block)}
        others = [buffer.name for buffer in read if buffer not in own]
        hint = f"it reads {', '.join(map(repr, others)) or 'no other buffer'}"
        if others:
            hint += f": sch.cache_read({block.name}, {others[0]!r}, {handle(func, node, node)})"
        raise refuse(func, "cache_read", block, f"it does not read {name!r}", hint=hint)
    writer = next((each for each in writers(func, source) if each in blocks_in(node)), None)
    if writer is not None:
        if writer is block:
            reason = f"it writes {name!r} itself, and a copy made before would miss that"
            call = cache_write_call(func, block)
            hint = f"{call} has it write a small buffer" if call is not None else "sch.cache_write is for that"
            raise refuse(func, "cache_read", block, reason, hint=hint)
        reason = f"block {writer.name!r} under loop {node.var.name!r} writes {name!r}: the copy would be too old"
        inner = [each for each in loops_on(block_path(func, block.name)) if writer not in blocks_in(each)]
        hint = f"take a loop that does not hold block {writer.name!r}: {named(inner)}"
        raise refuse(func, "cache_read", block, reason, hint=hint)
    return source


def _part_read(
    func: PrimFunc, block: Block, source: Buffer, outer: Sequence[For], inner: Sequence[For]
) -> tuple[tuple[Expr, ...], tuple[Dim, ...]]:
    """Where the part begins that is read while the `inner` loops run, and its size, per dim."""
    wanted = [access.indices for access in accesses(block) if access.buffer is source]
    starts: list[Expr] = []
    shape: list[Dim] = []
    for dim in range(len(source.shape)):
        span = span_of((indices[dim] for indices in wanted), outer, inner)
        if span is None:
            at = ", ".join({print_expr(indices[dim]) for indices in wanted})
            reason = (
                f"what it reads of dim {dim} of {source.name!r} in one iteration, at {at}, is not a contiguous range"
            )
            index = next((e for one in wanted for e in walk_expr(one[dim]) if isinstance(e, Load)), None)
            hint = "in a new Schedule, sch.cache_read before sch.fuse of its loops"
            if index is not None:
                loop_name = handle(func, outer[-1], outer[-1])
                hint = (
                    f"that is read from {index.buffer.name!r}, so nothing is known of it; instead of the values, cache "
                    f'where they are: sch.cache_read({block.name}, "{index.buffer.name}", {loop_name})'
                )
            raise refuse(func, "cache_read", block, reason, hint=hint)
        loop = next((var for var in free_vars(span.extent) if var not in func.symbols), None)
        if loop is not None:
            what = "loop" if any(each.var is loop for each in outer) else "iteration variable"
            reason = f"how much it reads of dim {dim} of {source.name!r} depends on {what} {loop.name!r}"
            varies = next((each for each in inner if loop in free_vars(each.extent)), None)
            hint = "split the loop whose extent varies by a constant, and cache inside"
            if varies is not None:
                part, rest = f"{varies.var.name}_0", f"{varies.var.name}_1"
                hint = (
                    f"{part}, {rest} = sch.split({handle(func, varies, varies)}, [None, 8]); "
                    f'sch.cache_read({block.name}, "{source.name}", {part})'
                )
            raise refuse(func, "cache_read", block, reason, hint=hint)
        starts.append(span.start)
        shape.append(simplify_dim(span.extent))
    return tuple(starts), tuple(shape)


def _fill_nest(func: PrimFunc, source: Buffer, copy: Buffer, starts: Sequence[Expr]) -> Stmt:
    """Loops that copy the part of `source` from `starts` on, as far as there is one, and their block."""
    loops = [For(Var(f"c{dim}"), as_expr(extent), "serial", Seq(())) for dim, extent in enumerate(copy.shape)]
    own = [IterVar(Var(f"v{dim}"), as_expr(extent), "spatial") for dim, extent in enumerate(source.shape)]
    places = [IterVar(Var(f"r{dim}"), as_expr(extent), "spatial") for dim, extent in enumerate(copy.shape)]
    steps = [const(0) if extent == 1 else loop.var for loop, extent in zip(loops, copy.shape, strict=True)]
    bindings = [start + step for start, step in zip(starts, steps, strict=True)]
    limits = [c for b, dim in zip(bindings, source.shape, strict=True) for c in (b >= 0, b < as_expr(dim))]
    stmt: Stmt = with_regions(
        Block(
            block_name(func, copy.name),
            (*own, *places),
            (*bindings, *steps),
            (),
            (),
            Store(copy, tuple(it.var for it in places), Load(source, tuple(it.var for it in own))),
            predicate=logical_and(*limits),
        )
    )
    for loop in reversed([loop for loop in loops if loop.var in steps]):
        stmt = replace(loop, body=stmt)
    return stmt


def _reading(
    func: PrimFunc,
    block: Block,
    source: Buffer,
    copy: Buffer,
    starts: Sequence[Expr],
    outer: Sequence[For],
    inner: Sequence[For],
) -> Block:
    """`block` reading the copy, at positions given by iteration variables of their own."""
    bindings = dict(zip((it.var for it in block.iters), block.bindings, strict=True))
    mixed_loops = loop_vars(block, "reduce") & loop_vars(block, "spatial")
    reducing = loop_vars(block, "reduce")
    simplifier = Simplifier(loop_ranges((*outer, *inner)))
    added: dict[Key, tuple[IterVar, Expr]] = {}

    def part(dim: int, value: Expr, kind: IterKind) -> Expr:
        if isinstance(value, Const) and value.value == 0:
            return const(0)
        key = (dim, kind, expr_key(value))
        if key not in added:
            added[key] = IterVar(Var(f"{source.name}_{dim}"), as_expr(copy.shape[dim]), kind), value
        return added[key][0].var

    def position(dim: int, index: Expr) -> Expr:
        """What the index is within the copy: a part that reductions have no influence on, and the rest."""
        offset = simplifier.simplify(substitute_expr(index, bindings) - starts[dim])
        both = next((var.name for var in free_vars(offset) if var in mixed_loops), None)
        if both is not None:
            reason = f"loop {both!r} drives both its output and its reduction"
            raise refuse(func, "cache_read", block, reason, hint=before_fusing("cache_read"))
        spatial = simplifier.simplify(substitute_expr(offset, {var: const(0) for var in reducing}))
        rest = simplifier.simplify(offset - spatial)
        mixed = next((var.name for var in free_vars(rest) if var not in reducing), None)
        if mixed is not None:
            reason = f"the index of dim {dim} of {source.name!r} multiplies loop {mixed!r} with one of its reduction"
            last = (*outer, *inner)[-1]
            hint = f'sch.cache_read({block.name}, "{source.name}", {handle(func, last, last)})'
            raise refuse(func, "cache_read", block, reason, hint=hint)
        return simplifier.simplify(part(dim, spatial, "spatial") + part(dim, rest, "reduce"))

    def move(buffer: Buffer, indices: tuple[Expr, ...]) -> Place | None:
        return (copy, tuple(map(position, range(len(indices)), indices))) if buffer is source else None

    new = redirected(block, move)
    iters = tuple(it for it, _ in added.values())
    values = tuple(value for _, value in added.values())
    return replace(new, iters=(*block.iters, *iters), bindings=(*block.bindings, *values))
