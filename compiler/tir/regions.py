"""What a block reads and writes, worked out from its body."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kedge.compiler.tir.expr import Dim, Expr, Load, Var, as_expr, const
from kedge.compiler.tir.poly import Poly
from kedge.compiler.tir.simplify import Simplifier, over
from kedge.compiler.tir.stmt import Block, Buffer, For, Range, Region, Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import free_vars, loads, stmt_children, stmt_exprs, stores, substitute_expr, walk_expr


def access_regions(body: Stmt, init: Stmt | None = None) -> tuple[tuple[Region, ...], tuple[Region, ...]]:
    """The regions that a block with this `body` and `init` reads and writes, each different access once.

    An index that is an expression of iteration variables gives exactly that element; one that depends on loops and
    blocks inside of the body all that it takes there, as far as that is known, and an index that depends on data its
    whole dim. With an `init` the block defines its output from nothing, so reading back the accumulator is no read of
    the block.
    """
    written = [each for each in _accesses(body, {}, {}) if each.is_write]
    own = {store.buffer for store in stores(body)} if init is not None else set()
    read = [each for each in _accesses(body, {}, {}) if not each.is_write and each.buffer not in own]
    if init is not None:
        read += [each for each in _accesses(init, {}, {}) if not each.is_write]
    return _regions(read), _regions(written)


def with_regions(block: Block) -> Block:
    """`block` with its reads and writes worked out afresh."""
    reads, writes = access_regions(block.body, block.init)
    return replace(block, reads=reads, writes=writes)


@dataclass(frozen=True, slots=True)
class _Access:
    """A load or store, in terms of what is outside and of the `loops` inside, outermost first, with their extents."""

    buffer: Buffer
    indices: tuple[Expr, ...]
    is_write: bool
    loops: Mapping[Var, Expr]


def _accesses(stmt: Stmt, env: Mapping[Var, Expr], loops: Mapping[Var, Expr]) -> Iterator[_Access]:
    inside = env
    if isinstance(stmt, Block):
        bindings = (substitute_expr(binding, env) for binding in stmt.bindings)
        inside = {**env, **{it.var: binding for it, binding in zip(stmt.iters, bindings, strict=True)}}
    around = {**loops, stmt.var: substitute_expr(stmt.extent, env)} if isinstance(stmt, For) else loops
    for child in stmt_children(stmt):
        yield from _accesses(child, inside, around)
    for expr in stmt_exprs(stmt):
        for load in loads(expr):
            yield _Access(load.buffer, tuple(substitute_expr(i, env) for i in load.indices), False, loops)
    if isinstance(stmt, Store):
        yield _Access(stmt.buffer, tuple(substitute_expr(i, env) for i in stmt.indices), True, loops)


def _regions(accesses: list[_Access]) -> tuple[Region, ...]:
    found: dict[object, Region] = {}
    for access in accesses:
        pairs = zip(access.indices, access.buffer.shape, strict=True)
        ranges = tuple(_range(index, dim, access.loops) for index, dim in pairs)
        key = (id(access.buffer), tuple((expr_key(r.start), expr_key(r.extent)) for r in ranges))
        found.setdefault(key, Region(access.buffer, ranges))
    return tuple(found.values())


def _range(index: Expr, dim: Dim, loops: Mapping[Var, Expr]) -> Range:
    whole = Range(const(0), as_expr(dim))
    if any(isinstance(node, Load) for node in walk_expr(index)):
        return whole
    if not any(var in loops for var in free_vars(index)):
        return Range(index, const(1))
    simplifier = Simplifier({var: over(extent) for var, extent in loops.items()})
    ends = simplifier.span(index, tuple(loops))
    if ends is None:
        return whole
    low, high = ends
    return Range(simplifier.expr_of(low), simplifier.expr_of(high - low + Poly.of(1)))
