"""Building nests: copies of loops around a block, and what a block's bindings and predicate depend on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

from kedge.compiler.schedule.tree import (
    before_blockize,
    block_path,
    blocks_in,
    condition_on,
    enclosing,
    loop_ranges,
    loops_on,
    named,
    refuse,
    unique,
)
from kedge.compiler.tir.expr import Binary, Combiner, Const, Expr, Load, Var, const, identity, maximum, minimum
from kedge.compiler.tir.flatten import flattened, holds_blocks
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.simplify import Ranges, Simplifier, conjuncts, prove, prove_equal, simplify
from kedge.compiler.tir.stmt import Block, For, IterKind, IterVar, PrimFunc, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, loads, map_stmt_children, map_stmt_exprs, stores, substitute_expr


def is_one(extent: Expr) -> bool:
    """Whether `extent` is the constant 1."""
    return isinstance(extent, Const) and extent.value == 1


def has_own_places(block: Block) -> bool:
    """Whether each place that the block stores to tells the values of all its spatial iteration variables."""
    wanted = [it.var for it in block.iters if it.kind == "spatial" and not is_one(it.extent)]
    return all(var in store.indices for store in stores(block) for var in wanted)


def loop_vars(block: Block, kind: IterKind) -> frozenset[Var]:
    """The loop variables in the bindings of the block's iteration variables of one kind."""
    pairs = zip(block.iters, block.bindings, strict=True)
    return frozenset(v for it, binding in pairs if it.kind == kind for v in free_vars(binding))


def resolved(func: PrimFunc, block: Block) -> Block:
    """`block` with bindings that are expressions of loops, where an outer block stands between it and some of these."""
    if enclosing(block_path(func, block.name)[:-1]) is None:
        return block
    return next((each for each in blocks_in(flattened(func.body)) if each.name == block.name), block)


def check_holds_no_blocks(func: PrimFunc, primitive: str, block: Block) -> None:
    """Refuse a block that holds others: they compute."""
    if holds_blocks(block):
        inside = [each for each in blocks_in(block) if each is not block]
        reason = f"it holds {named(inside)}, and this takes blocks that hold no other"
        hint = f"take block {inside[-1].name!r}; where that is refused, {before_blockize(primitive)}"
        raise refuse(func, primitive, block, reason, hint=hint)


def moving_together(block: Block, loops: Sequence[For]) -> tuple[Var, Var] | None:
    """Two iteration variables of which one cannot take all its values whatever the other's is, as far as is known.

    That is so where one loop moves both; digits of a fused loop are independent nevertheless.
    """
    extents = {loop.var: loop.extent for loop in loops}
    groups: list[tuple[list[IterVar], set[Var]]] = []
    for it, binding in zip(block.iters, block.bindings, strict=True):
        used = {var for var in free_vars(binding) if var in extents}
        touching = [group for group in groups if group[1] & used]
        groups = [group for group in groups if group not in touching]
        iters = [each for group in touching for each in group[0]]
        groups.append(([*iters, it], used.union(*(group[1] for group in touching))))
    for iters, used in groups:
        if len(iters) > 1 and not prove_equal(_product(it.extent for it in iters), _product(extents[v] for v in used)):
            return iters[0].var, iters[1].var
    return None


def _product(factors: Iterable[Expr]) -> Expr:
    result: Expr = const(1)
    for factor in factors:
        result = result * factor
    return result


def combiner_of(block: Block) -> Combiner | None:
    """How a reduction combines its values: into one element, from the combiner's identity on; None for any other."""
    body, init = block.body, block.init
    if not (isinstance(body, Store) and isinstance(init, Store) and isinstance(body.value, Binary)):
        return None
    op, into, value = body.value.op, body.value.a, body.value.b
    same = isinstance(into, Load) and into.buffer is body.buffer is init.buffer
    if op not in get_args(Combiner) or not same or not isinstance(init.value, Const):
        return None
    assert isinstance(into, Load)
    places = (into.indices, body.indices, init.indices)
    if len({tuple(map(expr_key, indices)) for indices in places}) > 1:
        return None
    combiner = cast(Combiner, op)
    neutral = expr_key(identity(combiner, body.buffer.dtype)) == expr_key(init.value)
    itself = any(load.buffer is body.buffer for load in loads(value))
    return combiner if neutral and not itself else None


def is_only_bounded(block: Block) -> bool:
    """Whether the block's predicate just keeps its iteration variables within their extents."""
    return all(expr_key(simplify(conjunct)) in _bounds(block) for conjunct in conjuncts(block.predicate))


def _bounds(block: Block) -> set[Key]:
    pairs = list(zip(block.iters, block.bindings, strict=True))
    kept = [bound for it, binding in pairs for bound in (binding < it.extent, binding >= 0)]
    return {expr_key(simplify(bound)) for bound in kept}


def _is_tail(conjunct: Expr, ranges: Ranges) -> bool:
    """Whether a condition ends loops early, as `split` has it where factors do not divide the extent."""
    if not isinstance(conjunct, Binary) or conjunct.op != "lt" or any(v in ranges for v in free_vars(conjunct.b)):
        return False
    index = conjunct.a
    steps = (substitute_expr(index, {v: v + 1}) - index for v in free_vars(index) if v in ranges)
    return all(prove(step >= 0, ranges) for step in steps)


def check_unconditional(func: PrimFunc, primitive: str, block: Block, path: Sequence[Stmt]) -> None:
    """Refuse a block that runs only under a condition, or inside another block: elsewhere it would lose these.

    `path` leads to it.
    """
    outer = enclosing(path[:-1])
    if outer is not None:
        reason = f"it stands inside block {outer.name!r}, whose iteration variables it may use"
        raise refuse(func, primitive, block, reason, hint=f"leave it there; or, {before_blockize(primitive)}")
    condition = condition_on(path)
    if condition is not None:
        reason = f"it runs only if {print_expr(condition.condition)}, and would lose that condition elsewhere"
        raise refuse(func, primitive, block, reason, hint="write the condition as te.select in the value")
    bounds, ranges = _bounds(block), loop_ranges(loops_on(path))
    if not all(expr_key(simplify(c)) in bounds or _is_tail(c, ranges) for c in conjuncts(block.predicate)):
        reason = f"it runs only where {print_expr(block.predicate)}, and would lose that condition elsewhere"
        raise refuse(func, primitive, block, reason, hint="write the condition as te.select in the value")


def spatial_conjuncts(block: Block, symbols: Collection[Var]) -> tuple[Expr, ...] | None:
    """The conditions of the block's predicate that do not depend on the loops of its reduction.

    None if one depends on others, too, so that it cannot be told apart: on those of the output, or on such as do
    nothing but run idle. `symbols` are those of the function.
    """
    reducing, spatial = loop_vars(block, "reduce"), loop_vars(block, "spatial")
    found = []
    for conjunct in conjuncts(block.predicate):
        used = set(free_vars(conjunct)).difference(symbols)
        if used & reducing and not used <= reducing - spatial:
            return None
        if not used & reducing:
            found.append(conjunct)
    return tuple(found)


def limits_of_output(func: PrimFunc, primitive: str, block: Block) -> tuple[Expr, ...]:
    """`spatial_conjuncts`, or a refusal where they cannot be told apart."""
    limits = spatial_conjuncts(block, func.symbols)
    if limits is None:
        reason = f"its condition {print_expr(block.predicate)} mixes loops of its reduction with others"
        raise refuse(
            func, primitive, block, reason, hint=f"in a new Schedule, sch.{primitive} before sch.fuse of these loops"
        )
    return limits


def fresh_names(func: PrimFunc) -> Callable[[str], str]:
    """Names for copies of blocks: each call gives one that is taken neither in `func` nor by an earlier call."""
    taken = {block.name for block in blocks_in(func.body)}

    def name(wanted: str) -> str:
        found = unique(wanted, taken)
        taken.add(found)
        return found

    return name


def fresh(stmt: Stmt, env: Mapping[Var, Expr], name: Callable[[str], str] = str) -> Stmt:
    """A copy of `stmt` with loops and iteration variables of its own, its blocks called what `name` makes of theirs.

    The variables in `env` are replaced. The blocks' regions are worked out.
    """
    if isinstance(stmt, For):
        var = Var(stmt.var.name)
        body = fresh(stmt.body, {**env, stmt.var: var}, name)
        return replace(stmt, var=var, extent=substitute_expr(stmt.extent, env), body=body)
    if not isinstance(stmt, Block):
        new = map_stmt_children(stmt, lambda child: fresh(child, env, name))
        return map_stmt_exprs(new, lambda e: substitute_expr(e, env))
    iters = tuple(IterVar(Var(it.var.name), substitute_expr(it.extent, env), it.kind) for it in stmt.iters)
    inside = {**env, **{old.var: own.var for old, own in zip(stmt.iters, iters, strict=True)}}
    return with_regions(
        replace(
            stmt,
            name=name(stmt.name),
            iters=iters,
            bindings=tuple(substitute_expr(binding, env) for binding in stmt.bindings),
            predicate=substitute_expr(stmt.predicate, env),
            body=fresh(stmt.body, inside, name),
            init=None if stmt.init is None else fresh(stmt.init, inside, name),
        )
    )


def fresh_nest(block: Block, loops: Sequence[For]) -> Stmt:
    """`block` under copies of `loops` (outermost first), every variable new, its regions worked out."""
    nest: Stmt = block
    for loop in reversed(loops):
        nest = replace(loop, body=nest)
    return fresh(nest, {})


@dataclass(frozen=True, slots=True)
class Span:
    """The values `[start, start + extent)`, in terms of the loops around."""

    start: Expr
    extent: Expr


def span_of(indices: Iterable[Expr], outer: Sequence[For], inner: Sequence[For]) -> Span | None:
    """The values that all of `indices` take together while the `inner` loops run, in terms of the `outer` ones.

    None where they are not known to be an interval: an index that rises and falls, or that is read from memory.
    """
    around, ranges = Simplifier(loop_ranges(outer)), loop_ranges((*outer, *inner))
    ends: list[tuple[Expr, Expr]] = []
    for index in {expr_key(index): index for index in indices}.values():
        found = None if next(loads(index), None) is not None else index_ends(index, inner, ranges)
        if found is None:
            return None
        ends.append(found)
    low, high = ends[0]
    for other_low, other_high in ends[1:]:
        low, high = minimum(low, other_low), maximum(high, other_high)
    return Span(around.simplify(low), around.simplify(high - low + 1))


def index_ends(index: Expr, inner: Sequence[For], ranges: Ranges) -> tuple[Expr, Expr] | None:
    """The smallest and largest value of `index` over the `inner` loops, if it rises or falls with each of them."""
    simplifier = Simplifier(ranges)
    low = high = index = simplifier.simplify(index)
    for loop in reversed(inner):
        if loop.var not in free_vars(low) and loop.var not in free_vars(high):
            continue
        step = substitute_expr(index, {loop.var: loop.var + 1}) - index
        first: dict[Var, Expr] = {loop.var: const(0)}
        last: dict[Var, Expr] = {loop.var: loop.extent - 1}
        if simplifier.prove(step >= 0):
            low, high = substitute_expr(low, first), substitute_expr(high, last)
        elif simplifier.prove(step <= 0):
            low, high = substitute_expr(low, last), substitute_expr(high, first)
        else:
            return None
    return simplifier.simplify(low), simplifier.simplify(high)
