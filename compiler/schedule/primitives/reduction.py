"""Taking a reduction apart: its initialisation, and partial results that are combined afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kedge.compiler.schedule.dependence import PRIVATE_SCOPES, conflict
from kedge.compiler.schedule.lifetime import is_free
from kedge.compiler.schedule.nest import (
    check_holds_no_blocks,
    combiner_of,
    fresh_nest,
    has_own_places,
    limits_of_output,
    loop_vars,
    resolved,
)
from kedge.compiler.schedule.order import before
from kedge.compiler.schedule.primitives.loops import before_fusing, simplify_bindings
from kedge.compiler.schedule.primitives.storage import check_allocation
from kedge.compiler.schedule.tree import (
    accesses,
    before_blockize,
    block_name,
    block_path,
    blocks_in,
    buffer_name,
    condition_on,
    enclosing,
    find_loop,
    handle,
    held_by,
    loop_ranges,
    loops_on,
    passing,
    position_around,
    refuse,
    swap,
    writers,
)
from kedge.compiler.tir.expr import Binary, Combiner, Expr, Load, Var, logical_and
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.simplify import Simplifier, conjuncts, simplify_dim
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, map_stmt, seq, stmt_exprs, stores, substitute_expr, walk_stmt

_EARLIER = (
    "in a new Schedule, sch.rfactor before sch.cache_read, sch.compute_at or sch.reverse_compute_at put them there"
)


def decompose_reduction(func: PrimFunc, name: str, loop: Var) -> tuple[PrimFunc, str]:
    """`func` with the initialisation of reduction `name` as a block of its own just before `loop`.

    Returns that block's name.
    """
    primitive = "decompose_reduction"
    path = block_path(func, name)
    block, loops = path[-1], loops_on(path)
    assert isinstance(block, Block)
    check_holds_no_blocks(func, primitive, block)
    if block.init is None:
        hint = "it takes reductions that have not been decomposed yet"
        raise refuse(func, primitive, block, "it has no initialisation to take out", hint=hint)
    whole = resolved(func, block)
    reducing = loop_vars(whole, "reduce")
    first = next((at for at, each in enumerate(loops) if each.var in reducing), len(loops) - 1)
    position = position_around(func, primitive, block, loops, loop, loops[: first + 1])
    condition = condition_on(path)
    if condition is not None:
        reason = f"it runs only if {print_expr(condition.condition)}, and its initialisation would always run"
        raise refuse(func, primitive, block, reason, hint="write the condition as te.select in the value")
    targets = tuple(dict.fromkeys(store.buffer for store in stores(block.init)))
    for user in blocks_in(loops[position]):
        used = next((a.buffer for a in accesses(user) if a.buffer in targets), None)
        if used is not None and before(func, user, block):
            reason = f"block {user.name!r} uses {used.name!r} before it under loop {loop.name!r}"
            raise refuse(func, primitive, block, reason, hint="take a loop further in")
    for outer in loops[:position]:
        if outer.var in reducing:
            reason = f"loop {outer.var.name!r}, around {loop.name!r}, takes part in the reduction"
            legal = loops[: loops.index(outer) + 1]
            hint = passing(legal) if enclosing(path[:-1]) is None else before_blockize(primitive)
            raise refuse(func, primitive, block, reason, hint=hint)
    for number, each in enumerate(loops[position:], position):
        if each.var in reducing and (each.var not in loop_vars(whole, "spatial") or has_own_places(block)):
            continue
        reused = conflict(func, each, loops[:number], targets)
        if reused is not None:
            reason = f"iterations of loop {each.var.name!r} use elements of {reused.name!r} one after the other"
            raise refuse(func, primitive, block, reason, hint="take a loop further in")
    private = all(target.scope in PRIVATE_SCOPES for target in targets)
    everywhere = private and all(is_free(func, block, target, loops, position) for target in targets)
    init = _init_nest(func, primitive, block, loops[position:], everywhere=everywhere)
    update = with_regions(replace(block, init=None))
    func = swap(func, block, update)
    node = find_loop(func, loop)
    assert node is not None
    init = simplify_bindings(init, loop_ranges(loops[:position]))
    return swap(func, node, seq(init, node)), blocks_in(init)[0].name


def rfactor(func: PrimFunc, name: str, loop: Var) -> tuple[PrimFunc, str]:
    """`func` with reduction `name` in two steps: partial results per iteration of `loop`, then these combined.

    The block `name` does the second; returns the name of the one that does the first (Suriana et al., "Parallel
    Associative Reductions in Halide", CGO 2017).
    """
    primitive = "rfactor"
    path = block_path(func, name)
    block, loops = path[-1], loops_on(path)
    assert isinstance(block, Block)
    check_holds_no_blocks(func, primitive, block)
    op = combiner_of(block)
    if op is None:
        reason = "it is no sum, product, largest or smallest of values that begins at the neutral one"
        hint = "it takes blocks such as te.sum, te.prod, te.max and te.min make"
        target = block.body.buffer if isinstance(block.body, Store) else None
        inits = [each for each in writers(func, target) if each is not block] if target is not None else []
        if block.init is None and inits:
            reason = f"its initialisation was taken out already (block {inits[0].name!r})"
            hint = "in a new Schedule, sch.rfactor before sch.decompose_reduction"
        raise refuse(func, primitive, block, reason, hint=hint)
    whole = resolved(func, block)
    reducing = loop_vars(whole, "reduce")
    legal = [each for each in loops if each.var in reducing]
    node = loops[position_around(func, primitive, block, loops, loop, legal)]
    if loop not in reducing:
        calls = ", or ".join(f"sch.rfactor({name}, {handle(func, each, each)})" for each in legal)
        raise refuse(func, primitive, loop, f"block {name!r} does not reduce over it", hint=calls)
    mixed = next((each.var for each in loops if each.var in reducing & loop_vars(whole, "spatial")), None)
    if mixed is not None:
        reason = f"it drives both the output and the reduction of block {name!r}"
        raise refuse(func, primitive, mixed, reason, hint=before_fusing("rfactor"))
    top = next(position for position, each in enumerate(loops) if each.var in reducing)
    for outer, inner in zip(loops[top:], (*loops[top + 1 :], block), strict=True):
        if outer.body is not inner:
            reason = f"it is not all that is in loop {outer.var.name!r}, which holds {held_by(outer)}"
            hint = before_blockize(primitive) if isinstance(outer.body, Block) else _EARLIER
            raise refuse(func, primitive, block, reason, hint=hint)
    store, limits = block.body, limits_of_output(func, primitive, block)
    assert isinstance(store, Store)
    if any(var not in func.symbols for var in free_vars(node.extent)):
        reason = f"its extent {print_expr(node.extent)} depends on other loops"
        hint = "take a loop whose extent is the same in all iterations of others"
        raise refuse(func, primitive, loop, reason, hint=hint)
    scope = store.buffer.scope
    shape = (*store.buffer.shape, simplify_dim(node.extent))
    partial = Buffer(buffer_name(func, f"{store.buffer.name}_rf"), shape, store.buffer.dtype, scope)
    first = _partial_block(func, block, partial, loops, loop)
    nest: Stmt = first
    for each in reversed(loops[top:]):
        nest = replace(each, body=nest)
    if len(limits) < len(tuple(conjuncts(block.predicate))):
        # A partial result may have no valid instance at all, and must be there nevertheless.
        init = _init_nest(func, primitive, replace(first, predicate=logical_and(*limits)), loops[top:])
        nest = seq(init, map_stmt(nest, lambda s: with_regions(replace(first, init=None)) if s is first else s))
    spatial = [each for each in loops[top:] if each.var not in reducing]
    second = _combining_nest(block, partial, op, node, limits, spatial)
    both = simplify_bindings(seq(nest, second), loop_ranges(loops[:top]))
    new = swap(replace(func, allocs=(*func.allocs, partial)), loops[top], both)
    check_allocation(func, new, primitive, block, partial)
    return new, first.name


def _partial_block(func: PrimFunc, block: Block, partial: Buffer, loops: Sequence[For], loop: Var) -> Block:
    """`block` storing one element more per iteration of `loop`, over iteration variables of the reduction's loops."""
    body, init = block.body, block.init
    assert isinstance(body, Store) and isinstance(init, Store) and isinstance(body.value, Binary)
    reducing = loop_vars(block, "reduce")
    own = {
        each.var: IterVar(Var(f"v{each.var.name}"), each.extent, "spatial" if each.var is loop else "reduce")
        for each in loops
        if each.var in reducing
    }
    pairs = list(zip(block.iters, block.bindings, strict=True))
    loop_to_iter: dict[Var, Expr] = {var: it.var for var, it in own.items()}
    values = {it.var: substitute_expr(b, loop_to_iter) for it, b in pairs if it.kind == "reduce"}
    place = (*body.indices, own[loop].var)
    value = Binary(body.value.op, Load(partial, place), substitute_expr(body.value.b, values))
    return with_regions(
        replace(
            block,
            name=block_name(func, f"{block.name}_rf"),
            iters=(*(it for it, _ in pairs if it.kind == "spatial"), *own.values()),
            bindings=(*(b for it, b in pairs if it.kind == "spatial"), *own),
            body=Store(partial, place, value),
            init=Store(partial, place, init.value),
        )
    )


def _combining_nest(
    block: Block, partial: Buffer, op: Combiner, node: For, limits: Sequence[Expr], spatial: Sequence[For]
) -> Stmt:
    """Loops over the outputs and over the partial results of each, around what combines these where `limits` hold."""
    body = block.body
    assert isinstance(body, Store)
    each = IterVar(Var(f"v{node.var.name}"), node.extent, "reduce")
    pairs = [(it, b) for it, b in zip(block.iters, block.bindings, strict=True) if it.kind == "spatial"]
    value = Binary(op, Load(body.buffer, body.indices), Load(partial, (*body.indices, each.var)))
    combining = replace(
        block,
        iters=(*(it for it, _ in pairs), each),
        bindings=(*(b for _, b in pairs), node.var),
        body=Store(body.buffer, body.indices, value),
        predicate=logical_and(*limits),
    )
    return fresh_nest(combining, [replace(loop, kind="serial", thread=None) for loop in (*spatial, node)])


def _init_nest(
    func: PrimFunc, primitive: str, block: Block, loops: tuple[For, ...], *, everywhere: bool = False
) -> Stmt:
    """The loops that the output depends on, with fresh variables, around a block that only initialises.

    `everywhere` allows it to do so where no instance of the block runs, too, as far as there are elements.
    """
    limits = limits_of_output(func, primitive, block)
    assert block.init is not None
    pairs = [(it, b) for it, b in zip(block.iters, block.bindings, strict=True) if it.kind == "spatial"]
    if all(store.buffer.scope in PRIVATE_SCOPES for store in stores(block.init)):
        # Where in the whole result a tile lies is not asked when it is set to one value.
        used = {v for part in walk_stmt(block.init) for e in stmt_exprs(part) for v in free_vars(e)}
        pairs = [(it, b) for it, b in pairs if it.var in used]
    if everywhere:
        simplifier = Simplifier(loop_ranges(loops_on(block_path(func, block.name))))
        limits = () if all(simplifier.prove(logical_and(b >= 0, b < it.extent)) for it, b in pairs) else limits
    needed = {v for e in (*(b for _, b in pairs), *limits) for v in free_vars(e)}
    init = Block(
        block_name(func, f"{block.name}_init"),
        tuple(it for it, _ in pairs),
        tuple(b for _, b in pairs),
        (),
        (),
        block.init,
        predicate=logical_and(*limits),
    )
    return fresh_nest(init, [loop for loop in loops if loop.var in needed])
