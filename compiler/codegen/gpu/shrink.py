"""Arrays of a group or a thread hold only what that group or thread uses of them.

A schedule may give a whole intermediate array a narrow scope: `m[i]` in shared scope under a loop over groups `i`. Each
group uses one element then, and that is how large its array must be: the part of an index that is the same for all of
a group's (for private arrays: a thread's) accesses is taken off.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kedge.compiler.codegen.gpu.ir import buffers_of, exprs, walk
from kedge.compiler.tir.expr import Expr, Load, Var, const
from kedge.compiler.tir.simplify import Ranges, Simplifier, over
from kedge.compiler.tir.stmt import Buffer, For, Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import free_vars, map_expr, map_stmt, substitute_expr


def shrink_arrays(body: Stmt, fixed: dict[str, Collection[Var]], ranges: Ranges) -> Stmt:
    """`body` with smaller arrays in the scopes that `fixed` names, with the variables that do not change there."""
    simplifier = Simplifier({**ranges, **{s.var: over(s.extent) for s in walk(body) if isinstance(s, For)}})
    moves: dict[Buffer, tuple[Buffer, list[Expr]]] = {}
    for buffer in buffers_of(body):
        if buffer.scope in fixed:
            move = _smaller(buffer, _places(body, buffer), fixed[buffer.scope], simplifier)
            if move is not None:
                moves[buffer] = move
    return _moved(body, moves, simplifier) if moves else body


def _places(body: Stmt, buffer: Buffer) -> list[tuple[Expr, ...]]:
    found = []
    for stmt in walk(body):
        if isinstance(stmt, Store) and stmt.buffer is buffer:
            found.append(stmt.indices)
        found += [node.indices for node in exprs(stmt) if isinstance(node, Load) and node.buffer is buffer]
    return found


def _smaller(
    buffer: Buffer, places: Sequence[tuple[Expr, ...]], fixed: Collection[Var], simplifier: Simplifier
) -> tuple[Buffer, list[Expr]] | None:
    """The array that is enough, and what is taken off each index; None where nothing is gained."""
    origin: list[Expr] = []
    shape = list(buffer.shape)
    for dim, size in enumerate(buffer.shape):
        base: Expr = const(0)
        bases = {expr_key(one): one for one in (_base(indices[dim], fixed, simplifier) for indices in places)}
        if len(bases) == 1:
            (one,) = bases.values()
            ends = [simplifier.bounds(simplifier.simplify(indices[dim] - one)) for indices in places]
            high = max((high for _, high in ends if high is not None), default=None)
            known = high is not None and all(low is not None and low >= 0 and top is not None for low, top in ends)
            if known and high is not None and not (isinstance(size, int) and size <= high + 1):
                base, shape[dim] = one, high + 1
        origin.append(base)
    if tuple(shape) == buffer.shape:
        return None
    return Buffer(buffer.name, tuple(shape), buffer.dtype, buffer.scope), origin


def _base(index: Expr, fixed: Collection[Var], simplifier: Simplifier) -> Expr:
    """The part of an index that only fixed variables make."""
    moving = {var: const(0) for var in free_vars(index) if var not in fixed}
    return simplifier.simplify(substitute_expr(index, moving))


def _moved(body: Stmt, moves: dict[Buffer, tuple[Buffer, list[Expr]]], simplifier: Simplifier) -> Stmt:
    def place(buffer: Buffer, indices: tuple[Expr, ...]) -> tuple[Expr, ...]:
        return tuple(simplifier.simplify(i - o) for i, o in zip(indices, moves[buffer][1], strict=True))

    def load(node: Expr) -> Expr:
        if isinstance(node, Load) and node.buffer in moves:
            return Load(moves[node.buffer][0], place(node.buffer, node.indices))
        return node

    def store(stmt: Stmt) -> Stmt:
        if isinstance(stmt, Store) and stmt.buffer in moves:
            return Store(moves[stmt.buffer][0], place(stmt.buffer, stmt.indices), stmt.value)
        return stmt

    return map_stmt(body, store, expr=lambda e: map_expr(e, load))
