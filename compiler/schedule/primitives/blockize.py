"""A nest of loops as one block, whose iteration variables count its tiles."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from kedge.compiler.schedule.intrinsics import nest_of
from kedge.compiler.schedule.nest import index_ends
from kedge.compiler.schedule.tree import (
    block_name,
    handle,
    held_by,
    loop_path,
    loop_ranges,
    loops_in,
    loops_on,
    parts_of,
    refuse,
    swap,
)
from kedge.compiler.tir.expr import INDEX_DTYPE, Binary, Expr, Var, const, logical_and
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.simplify import Ranges, Simplifier, conjuncts, over, simplify
from kedge.compiler.tir.stmt import Block, For, IterVar, PrimFunc, Stmt
from kedge.compiler.tir.visitor import free_vars, loads, substitute_expr


def blockize(func: PrimFunc, loop: Var) -> tuple[PrimFunc, str]:
    """`func` with the nest at `loop` inside of a block of its own; returns the name of that block.

    Each iteration variable of the block inside gets one outside, of the same kind: the number of the tile, where the
    nest runs over whole tiles of it, else where the nest begins; 0, of extent 1, where loops inside alone move it.
    """
    primitive = "blockize"
    path = loop_path(func, loop)
    node = path[-1]
    assert isinstance(node, For)
    chain, block = nest_of(node)
    if not isinstance(block, Block):
        raise refuse(
            func, primitive, loop, f"it holds {held_by(chain[-1])}: not one nest around one block", at=node,
            hint=_nest_inside(func, chain[-1]),
        )  # fmt: skip
    around = [it for each in path if isinstance(each, Block) for it in each.iters]
    known = {*func.symbols, *(it.var for it in around), *(each.var for each in chain)}
    for each in chain:
        other = next((var for var in free_vars(each.extent) if var not in known), None)
        if other is not None:
            reason = f"the extent {print_expr(each.extent)} of loop {each.var.name!r} depends on loop {other.name!r}"
            hint = (
                f"a block sees nothing of the loops around it: sch.blockize({handle(func, _loop(path, other), node)})"
            )
            raise refuse(func, primitive, loop, f"{reason} outside", at=node, hint=hint)
    ranges = {**loop_ranges((*loops_on(path[:-1]), *chain)), **{it.var: over(it.extent) for it in around}}
    tiles: list[_Tile] = []
    for it, binding in zip(block.iters, block.bindings, strict=True):
        tile = _taken_apart(it, binding, chain, ranges, func.symbols)
        if tile is None:
            reason = (
                f"{it.var.name} = {print_expr(binding)} of block {block.name!r} is not known to be a sum of a part of "
                "the loops outside and one of those inside"
            )
            raise refuse(func, primitive, loop, reason, at=node, hint=_elsewhere(chain))
        tiles.append(tile)
    outside, inside = _conditions(func, block, tiles, chain, node)
    outer_iters = tuple(tile.outer for tile in tiles)
    for tile in tiles:
        simplifier = Simplifier(ranges)
        limits = (tile.binding >= 0, tile.binding < tile.outer.extent)
        outside += [limit for limit in limits if not simplifier.prove(limit)]
    below = Simplifier({**loop_ranges(chain), **{it.var: over(it.extent) for it in outer_iters}})
    nest: Stmt = replace(
        block,
        bindings=tuple(below.simplify(tile.inner) for tile in tiles),
        predicate=below.simplify(logical_and(*inside)),
    )
    for each in reversed(chain):
        nest = replace(each, body=nest)
    outer = Block(
        block_name(func, f"{block.name}_o"),
        outer_iters,
        tuple(tile.binding for tile in tiles),
        (),
        (),
        nest,
        predicate=simplify(logical_and(*outside), ranges),
    )
    return swap(func, node, with_regions(outer)), outer.name


@dataclass(frozen=True, slots=True)
class _Tile:
    """One iteration variable in two: the outer one with its binding, and the binding of the inner one.

    Inside, `start` of the loops outside is `place` of the outer iteration variable.
    """

    outer: IterVar
    binding: Expr
    inner: Expr
    start: Expr
    place: Expr


def _taken_apart(
    it: IterVar, binding: Expr, chain: Sequence[For], ranges: Ranges, symbols: Collection[Var]
) -> _Tile | None:
    """The parts of a binding that loops outside and those of `chain` have in it; None where they are not known."""
    if next(loads(binding), None) is not None:
        return None
    simplifier = Simplifier(ranges)
    own = {loop.var for loop in chain}
    start = simplifier.simplify(substitute_expr(binding, dict.fromkeys(own, const(0))))
    rest = simplifier.simplify(binding - start)
    if any(var not in own and var not in symbols for var in free_vars(rest)):
        return None
    var = Var(f"{it.var.name}_o")
    if all(each in symbols for each in free_vars(start)):
        return _Tile(IterVar(var, const(1), it.kind), const(0), start + rest, start, start)
    ends = index_ends(rest, chain, ranges)
    if ends is None:
        least, most = simplifier.bounds(rest)
        ends = None if least is None or most is None else (const(least), const(most))
    if ends is None or any(each not in symbols for end in ends for each in free_vars(end)):
        return None
    start, rest = simplifier.simplify(start + ends[0]), simplifier.simplify(rest - ends[0])
    size = simplifier.simplify(ends[1] - ends[0] + 1)
    number = simplifier.simplify(start // size)
    if simplifier.prove(size >= 1) and simplifier.prove_equal(number * size, start):
        # Of an instance that runs, the tile's number is in range: its value is, and less than a tile away.
        tiles = IterVar(var, simplifier.simplify((it.extent + size - 1) // size), it.kind)
        return _Tile(tiles, number, var * size + rest, start, var * size)
    # It begins anywhere, perhaps in front of the first value: as far as loops go, never further than `first`.
    first = 0 if simplifier.prove(start >= 0) else simplifier.bounds(start)[0]
    if first is None:
        return None
    first = min(first, 0)
    begins = IterVar(var, simplifier.simplify(it.extent - first), it.kind)
    return _Tile(begins, simplifier.simplify(start - first), var + first + rest, start, var + first)


def _conditions(
    func: PrimFunc, block: Block, tiles: Sequence[_Tile], chain: Sequence[For], node: For
) -> tuple[list[Expr], list[Expr]]:
    """The conditions of the block's predicate that hold the outer block back, and those that stay inside."""
    own = {loop.var for loop in chain}
    outside: list[Expr] = []
    inside: list[Expr] = []
    for condition in conjuncts(block.predicate):
        used = set(free_vars(condition))
        if used.isdisjoint(own) and next(loads(condition), None) is None:
            outside.append(condition)
            continue
        known = own.union(func.symbols)
        found = condition if used <= known else _in_tiles(condition, tiles, known)
        if found is None:
            reason = (
                f"block {block.name!r} runs only where {print_expr(condition)}, and neither the loops outside nor the "
                "iteration variables of a block here tell that"
            )
            raise refuse(func, "blockize", node.var, reason, at=node, hint=_elsewhere(chain))
        inside.append(found)
    return outside, inside


def _in_tiles(condition: Expr, tiles: Sequence[_Tile], known: Collection[Var]) -> Expr | None:
    """A comparison of indices that asks the iteration variables of the outer block instead of loops outside."""
    if not isinstance(condition, Binary) or condition.op not in ("lt", "le", "gt", "ge"):
        return None
    if condition.a.dtype != INDEX_DTYPE or next(loads(condition), None) is not None:
        return None
    difference = simplify(condition.a - condition.b)
    inside: Mapping[Var, Expr] = {tile.outer.var: tile.outer.var for tile in tiles}
    for tile in tiles:
        for swapped in (difference - tile.start + tile.place, difference + tile.start - tile.place):
            found = simplify(swapped)
            if all(var in known or var in inside for var in free_vars(found)):
                return simplify(Binary(condition.op, found, const(0)))
    return None


def _elsewhere(chain: Sequence[For]) -> str:
    inner = f"take a loop inside of loop {chain[0].var.name!r}, or " if len(chain) > 1 else "take "
    return f"{inner}one further out; or, in a new Schedule, sch.blockize before sch.fuse, or with a split that divides"


def _nest_inside(func: PrimFunc, holder: For) -> str:
    """The hint where a loop holds more than one nest: those that are."""
    for part in parts_of(holder):
        for each in loops_in(part):
            if isinstance(nest_of(each)[1], Block):
                return f"take a loop around one block alone: sch.blockize({handle(func, each, holder)})"
    return "in a new Schedule, sch.blockize before what put several blocks there"


def _loop(path: Sequence[Stmt], var: Var) -> For:
    return next(loop for loop in loops_on(path) if loop.var is var)
