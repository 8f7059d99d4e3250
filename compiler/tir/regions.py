"""What a block reads and writes, worked out from its body."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace

from kedge.compiler.tir.expr import Dim, Expr, Load, Var, as_expr, const
from kedge.compiler.tir.stmt import Block, Buffer, For, Range, Region, Stmt
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import loads, stores, walk_expr, walk_stmt


def access_regions(body: Stmt, init: Stmt | None = None) -> tuple[tuple[Region, ...], tuple[Region, ...]]:
    """The regions that a block with this `body` and `init` reads and writes, each different access once.

    An index that is an expression of iteration variables gives exactly that element; an index that depends on data, or
    on loops and blocks inside of the body, gives its whole dim. With an `init` the block defines its output from
    nothing, so reading back the accumulator is no read of the block.
    """
    written = [(store.buffer, store.indices) for store in stores(body)]
    own = {buffer for buffer, _ in written} if init is not None else set()
    read = [(load.buffer, load.indices) for load in loads(body) if load.buffer not in own]
    if init is not None:
        read += [(load.buffer, load.indices) for load in loads(init)]
    inside = {var for part in (body, init) if part is not None for var in _bound(part)}
    return _regions(read, inside), _regions(written, inside)


def with_regions(block: Block) -> Block:
    """`block` with its reads and writes worked out afresh."""
    reads, writes = access_regions(block.body, block.init)
    return replace(block, reads=reads, writes=writes)


def _bound(stmt: Stmt) -> Iterator[Var]:
    """The variables of the loops and blocks under `stmt`."""
    for each in walk_stmt(stmt):
        if isinstance(each, For):
            yield each.var
        elif isinstance(each, Block):
            yield from (it.var for it in each.iters)


def _regions(accesses: Iterable[tuple[Buffer, tuple[Expr, ...]]], inside: Container[Var]) -> tuple[Region, ...]:
    found: dict[object, Region] = {}
    for buffer, indices in accesses:
        ranges = tuple(_range(index, dim, inside) for index, dim in zip(indices, buffer.shape, strict=True))
        key = (id(buffer), tuple((expr_key(r.start), expr_key(r.extent)) for r in ranges))
        found.setdefault(key, Region(buffer, ranges))
    return tuple(found.values())


def _range(index: Expr, dim: Dim, inside: Container[Var]) -> Range:
    if any(isinstance(node, Load) or (isinstance(node, Var) and node in inside) for node in walk_expr(index)):
        return Range(const(0), as_expr(dim))
    return Range(index, const(1))
