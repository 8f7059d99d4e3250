"""Compaction: a buffer gets the shape of what is used of it while it lives.

After compute_at a buffer has the shape of the whole tensor, although only a tile of it lives at a time:

    for i in 8:                                     for i in 8:
      alloc t: float32[32, 64]                        alloc t: float32[6, 64]
      for r in 6: for c in 64:                        for r in 6: for c in 64:
        t[i * 4 + r, c] = …              ->             t[r, c] = …
      for r in 4: for c in 64:                        for r in 4: for c in 64:
        y[i * 4 + r, c] = t[i * 4 + r + 1, c]           y[i * 4 + r, c] = t[r + 1, c]

Each iteration of the loops around an `Alloc` has a buffer of its own there, so what is subtracted from the indices
may depend on them. Only dims in whose indices they occur are touched. A dim that is longer than what all iterations
use of it was made so (`storage_align`), and stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from kedge.compiler.codegen.alloc import Alloc, accesses, map_statements, statements_of
from kedge.compiler.tir.expr import Dim, Expr, Load, Var, as_expr
from kedge.compiler.tir.poly import Poly
from kedge.compiler.tir.simplify import Simplifier, over, simplify_dim
from kedge.compiler.tir.stmt import Buffer, For, Range, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, map_children, map_stmt_exprs


@dataclass(frozen=True, slots=True)
class _Access:
    """One index of a buffer and the ranges of the loops between the buffer's `Alloc` and it, from the outermost on."""

    index: Expr
    inner: Mapping[Var, Range]


@dataclass(frozen=True, slots=True)
class _Window:
    """The part of a dim that is used: `size` elements from `origin` on."""

    origin: Expr
    size: Dim


def compact(stmt: Stmt) -> Stmt:
    """`stmt` with every buffer of an `Alloc` in it as small as its uses there allow."""
    return _compact(stmt, {})


def _compact(stmt: Stmt, outer: Mapping[Var, Range]) -> Stmt:
    if isinstance(stmt, For):
        outer = {**outer, stmt.var: over(stmt.extent)}
    elif isinstance(stmt, Alloc) and outer:
        stmt = _shrunk(stmt, outer)
    return map_statements(stmt, lambda child: _compact(child, outer))


def _shrunk(alloc: Alloc, outer: Mapping[Var, Range]) -> Alloc:
    buffer = alloc.buffer
    columns: list[list[_Access]] = [[] for _ in buffer.shape]
    _collect(alloc.body, buffer, {}, columns)
    windows = [_window(column, dim, outer) for column, dim in zip(columns, buffer.shape, strict=True)]
    if all(window is None for window in windows):
        return alloc
    shape = tuple(dim if w is None else w.size for w, dim in zip(windows, buffer.shape, strict=True))
    small = replace(buffer, shape=shape)
    return Alloc(small, _moved(alloc.body, buffer, small, windows, Simplifier(outer)))


def _collect(stmt: Stmt, buffer: Buffer, inner: Mapping[Var, Range], columns: list[list[_Access]]) -> None:
    for indices in accesses(stmt, buffer):
        for column, index in zip(columns, indices, strict=True):
            column.append(_Access(index, inner))
    if isinstance(stmt, For):
        inner = {**inner, stmt.var: over(stmt.extent)}
    for child in statements_of(stmt):
        _collect(child, buffer, inner, columns)


def _window(column: Sequence[_Access], dim: Dim, outer: Mapping[Var, Range]) -> _Window | None:
    """What is used of a dim while the buffer lives; None to leave the dim alone."""
    if not any(var in outer for access in column for var in free_vars(access.index)):
        return None
    around = Simplifier(outer)
    spans: list[tuple[Poly, Poly]] = []
    for access in column:
        known = around.within(access.inner)
        span = known.span(access.index, tuple(access.inner))
        if span is None:
            return None
        low, high = (around.poly(known.expr_of(end)) for end in span)
        spans.append((low, high))
    origin = next((low for low, _ in spans if all(around.prove_nonnegative(each - low) for each, _ in spans)), None)
    if origin is None:
        return None
    size = _largest([high - origin + Poly.of(1) for _, high in spans], around, outer)
    if size is None or around.prove(as_expr(size) >= as_expr(dim)) or _is_padded(column, dim, outer):
        return None
    return _Window(around.expr_of(origin), size)


def _largest(sizes: Sequence[Poly], around: Simplifier, outer: Mapping[Var, Range]) -> Dim | None:
    """A size that none of `sizes` exceeds: one of them if it is the same in all iterations, else a number."""
    for size in sizes:
        expr = around.expr_of(size)
        fixed = not any(var in outer for var in free_vars(expr))
        if fixed and all(around.prove_nonnegative(size - each) for each in sizes):
            return simplify_dim(expr)
    ends = [around.bounds(around.expr_of(size))[1] for size in sizes]
    known = [end for end in ends if end is not None]
    return max(1, *known) if known and len(known) == len(ends) else None


def _is_padded(column: Sequence[_Access], dim: Dim, outer: Mapping[Var, Range]) -> bool:
    """Whether the dim is longer than what all iterations use of it."""
    last = as_expr(dim) - 1
    nothing = Simplifier()
    for access in column:
        known = Simplifier({**outer, **access.inner})
        span = known.span(access.index, tuple(known.ranges))
        if span is None or not nothing.prove(known.expr_of(span[1]) < last):
            return False
    return True


def _moved(stmt: Stmt, buffer: Buffer, small: Buffer, windows: Sequence[_Window | None], known: Simplifier) -> Stmt:
    """`stmt` with the elements of `buffer` at their places in `small`."""
    if isinstance(stmt, For):
        known = known.within({stmt.var: over(stmt.extent)})

    def place(indices: Sequence[Expr]) -> tuple[Expr, ...]:
        return tuple(
            index if window is None else known.simplify(index - window.origin)
            for index, window in zip(indices, windows, strict=True)
        )

    def swap(expr: Expr) -> Expr:
        new = map_children(expr, swap)
        return Load(small, place(new.indices)) if isinstance(new, Load) and new.buffer is buffer else new

    if not isinstance(stmt, (For, Alloc)):
        stmt = map_stmt_exprs(stmt, swap)
    if isinstance(stmt, Store) and stmt.buffer is buffer:
        stmt = Store(small, place(stmt.indices), stmt.value)
    return map_statements(stmt, lambda child: _moved(child, buffer, small, windows, known))
