"""Loads and stores of blocks at other places: in another buffer, at other indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from kedge.compiler.tir.expr import Expr, Load
from kedge.compiler.tir.regions import with_regions
from kedge.compiler.tir.stmt import Block, Buffer, Stmt, Store
from kedge.compiler.tir.visitor import map_expr, map_stmt, map_stmt_exprs

#: The buffer and the indices of an access.
Place: TypeAlias = tuple[Buffer, tuple[Expr, ...]]
#: Where an access goes instead; None leaves it where it is.
Move: TypeAlias = Callable[[Buffer, tuple[Expr, ...]], Place | None]


def redirected(block: Block, move: Move) -> Block:
    """`block` with every load and store of its body and initialisation where `move` says, its regions worked out."""

    def load(expr: Expr) -> Expr:
        place = move(expr.buffer, expr.indices) if isinstance(expr, Load) else None
        return expr if place is None else Load(*place)

    def visit(stmt: Stmt) -> Stmt:
        stmt = map_stmt_exprs(stmt, lambda e: map_expr(e, load))
        place = move(stmt.buffer, stmt.indices) if isinstance(stmt, Store) else None
        return Store(*place, stmt.value) if place is not None and isinstance(stmt, Store) else stmt

    init = None if block.init is None else map_stmt(block.init, visit)
    return with_regions(replace(block, body=map_stmt(block.body, visit), init=init))
