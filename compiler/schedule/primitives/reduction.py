"""Taking the initialisation out of a reduction."""

from __future__ import annotations

from dataclasses import replace

from kedge.compiler.schedule.nest import conjuncts, fresh_nest, loop_vars
from kedge.compiler.schedule.primitives.loops import simplify_bindings
from kedge.compiler.schedule.tree import (
    block_path,
    blocks_in,
    find_loop,
    loop_ranges,
    loops_on,
    refuse,
    swap,
    unique_name,
)
from kedge.compiler.tir.expr import Var, logical_and
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.stmt import Block, For, PrimFunc, Stmt
from kedge.compiler.tir.visitor import free_vars, seq


def decompose_reduction(func: PrimFunc, name: str, loop: Var) -> tuple[PrimFunc, str]:
    """`func` with the initialisation of reduction `name` as a block of its own just before `loop`.

    Returns that block's name.
    """
    primitive = "decompose_reduction"
    path = block_path(func, name)
    block, loops = path[-1], loops_on(path)
    assert isinstance(block, Block)
    if block.init is None:
        raise refuse(func, primitive, block, "it has no initialisation to take out")
    position = next((i for i, each in enumerate(loops) if each.var is loop), None)
    if position is None:
        raise refuse(func, primitive, block, f"loop {loop.name!r} is not around it")
    reducing = loop_vars(block, "reduce")
    for outer in loops[:position]:
        if outer.var in reducing:
            reason = f"loop {outer.var.name!r}, around {loop.name!r}, takes part in the reduction"
            raise refuse(func, primitive, block, reason)
    init = _init_nest(func, block, loops[position:])
    update = with_regions(replace(block, init=None))
    func = swap(func, block, update)
    node = find_loop(func, loop)
    assert node is not None
    init = simplify_bindings(init, loop_ranges(loops[:position]))
    return swap(func, node, seq(init, node)), blocks_in(init)[0].name


def _init_nest(func: PrimFunc, block: Block, loops: tuple[For, ...]) -> Stmt:
    """The loops that the output depends on, with fresh variables, around a block that only initialises."""
    spatial, reducing = loop_vars(block, "spatial"), loop_vars(block, "reduce")
    limits = []
    for conjunct in conjuncts(block.predicate):
        used = set(free_vars(conjunct))
        if used & reducing and used & spatial:
            raise refuse(func, "decompose_reduction", block, "its predicate mixes spatial and reduction loops")
        if not used & reducing:
            limits.append(conjunct)
    kept = [loop for loop in loops if loop.var in spatial]
    return fresh_nest(
        Block(
            unique_name(func, f"{block.name}_init"),
            tuple(it for it in block.iters if it.kind == "spatial"),
            tuple(b for it, b in zip(block.iters, block.bindings, strict=True) if it.kind == "spatial"),
            (),
            (),
            block.init or block.body,
            predicate=logical_and(*limits),
        ),
        kept,
    )
