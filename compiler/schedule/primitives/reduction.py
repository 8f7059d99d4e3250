"""Taking the initialisation out of a reduction."""

from __future__ import annotations

from dataclasses import replace

from kedge.compiler.schedule.dependence import PRIVATE_SCOPES
from kedge.compiler.schedule.nest import fresh_nest, loop_vars, spatial_conjuncts
from kedge.compiler.schedule.primitives.loops import simplify_bindings
from kedge.compiler.schedule.tree import (
    block_name,
    block_path,
    blocks_in,
    find_loop,
    loop_ranges,
    loops_on,
    refuse,
    swap,
)
from kedge.compiler.tir.expr import Var, logical_and
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.stmt import Block, For, PrimFunc, Stmt
from kedge.compiler.tir.visitor import free_vars, loads, seq, stores


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
    spatial, limits = loop_vars(block, "spatial"), spatial_conjuncts(block)
    if limits is None:
        raise refuse(func, "decompose_reduction", block, "its predicate mixes spatial and reduction loops")
    assert block.init is not None
    pairs = [(it, b) for it, b in zip(block.iters, block.bindings, strict=True) if it.kind == "spatial"]
    if (
        all(store.buffer.scope in PRIVATE_SCOPES for store in stores(block.init))
        and next(loads(block.init), None) is None
    ):
        # A private buffer is there in full: its parts that no instance fills may be set as well, without a test.
        used = {v for store in stores(block.init) for index in store.indices for v in free_vars(index)}
        reused = spatial - {v for it, b in pairs if it.var in used for v in free_vars(b)}
        again = next((loop.var.name for loop in loops if loop.var in reused), None)
        if again is not None:
            reason = f"each iteration of loop {again!r} uses the accumulator afresh"
            raise refuse(func, "decompose_reduction", block, reason, hint="take a loop further in")
        pairs, limits = [(it, b) for it, b in pairs if it.var in used], ()
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
