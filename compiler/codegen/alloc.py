"""The statements that only code generation has, and the helpers that walk trees with such statements in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from kedge.compiler.tir.expr import Expr, Load
from kedge.compiler.tir.printer import Printer
from kedge.compiler.tir.simplify import prove_equal
from kedge.compiler.tir.stmt import Buffer, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import StmtMap, map_stmt_children, stmt_children, stmt_exprs, walk_expr


@dataclass(frozen=True, slots=True, eq=False)
class Alloc(Stmt):
    """`body` with `buffer` alive inside it only; its contents are undefined at the start."""

    buffer: Buffer
    body: Stmt


@dataclass(frozen=True, slots=True, eq=False)
class Prefetch(Stmt):
    """Ask for the cache line of `buffer[indices]`, which may be outside of it: no address can fail."""

    buffer: Buffer
    indices: tuple[Expr, ...]


def statements_of(stmt: Stmt) -> tuple[Stmt, ...]:
    """The direct sub-statements, in order, of a statement that may be an `Alloc` or a `Prefetch`."""
    if isinstance(stmt, Prefetch):
        return ()
    return (stmt.body,) if isinstance(stmt, Alloc) else stmt_children(stmt)


def map_statements(stmt: Stmt, f: StmtMap) -> Stmt:
    """`stmt`, which may be an `Alloc`, with `f` applied to its direct sub-statements."""
    if isinstance(stmt, Alloc):
        body = f(stmt.body)
        return stmt if body is stmt.body else replace(stmt, body=body)
    return map_stmt_children(stmt, f)


def expressions_of(stmt: Stmt) -> tuple[Expr, ...]:
    """The expressions that a statement, which may be an `Alloc` or a `Prefetch`, holds itself."""
    if isinstance(stmt, Prefetch):
        return stmt.indices
    return () if isinstance(stmt, Alloc) else stmt_exprs(stmt)


def same_shape(a: Buffer, b: Buffer) -> bool:
    """Whether two buffers have provably equal dims."""
    return len(a.shape) == len(b.shape) and all(prove_equal(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def accesses(stmt: Stmt, buffer: Buffer) -> Iterator[tuple[Expr, ...]]:
    """The indices of every load and store of `buffer` that `stmt` does itself, not in its sub-statements."""
    for expr in expressions_of(stmt):
        for node in walk_expr(expr):
            if isinstance(node, Load) and node.buffer is buffer:
                yield node.indices
    if isinstance(stmt, Store) and stmt.buffer is buffer:
        yield stmt.indices


def print_prepared(func: PrimFunc, body: Stmt) -> str:
    """The plain loops that a function became, as text: what is under an `alloc` line is where that buffer lives."""
    return "\n".join(_Printer(func.params, func.symbols).stmt(body))


class _Printer(Printer):
    def stmt(self, stmt: Stmt) -> Iterator[str]:
        if isinstance(stmt, Alloc):
            yield f"alloc {self.declare(stmt.buffer)}"
            yield from self.stmt(stmt.body)
        else:
            yield from super().stmt(stmt)
