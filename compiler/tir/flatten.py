"""Blocks inside of blocks, as the loops around all of them see these."""

from __future__ import annotations

from dataclasses import replace

from kedge.compiler.tir.expr import Const, Expr, logical_and
from kedge.compiler.tir.stmt import Block, For, Seq, Stmt
from kedge.compiler.tir.visitor import loads, map_stmt, map_stmt_children, stmt_exprs, substitute, walk_stmt


def holds_blocks(block: Block) -> bool:
    """Whether there are blocks inside of `block`."""
    return any(isinstance(each, Block) for part in (block.body, block.init) if part for each in walk_stmt(part))


def flattened(stmt: Stmt) -> Stmt:
    """`stmt` without the blocks that only hold loops around other blocks; `stmt` itself where there are none.

    The bindings of what is inside are expressions of the loops around then, and what held an outer block back holds
    each inner one back. An outer block that does something itself, initialises, or depends on data, stays.
    """

    def visit(node: Stmt) -> Stmt:
        if not isinstance(node, Block) or not holds_blocks(node) or not _is_border(node):
            return node
        inside = substitute(node.body, {it.var: b for it, b in zip(node.iters, node.bindings, strict=True)})
        return guarded(inside, node.predicate)

    return map_stmt(stmt, visit)


def guarded(stmt: Stmt, condition: Expr) -> Stmt:
    """`stmt` with its blocks running only where `condition` holds, too; blocks inside of blocks follow these."""
    if isinstance(condition, Const) and condition.value:
        return stmt
    if not isinstance(stmt, Block):
        return map_stmt_children(stmt, lambda child: guarded(child, condition))
    always = isinstance(stmt.predicate, Const) and stmt.predicate.value
    return replace(stmt, predicate=condition if always else logical_and(stmt.predicate, condition))


def _is_border(block: Block) -> bool:
    """Whether an outer block only says where those inside run."""
    reads = any(True for expr in stmt_exprs(block) for _ in loads(expr))  # what is inside may write that meanwhile
    return block.init is None and not reads and _only_holds(block.body)


def _only_holds(stmt: Stmt) -> bool:
    """Whether there is nothing but loops and blocks."""
    match stmt:
        case For(body=body):
            return _only_holds(body)
        case Seq(stmts=stmts):
            return all(map(_only_holds, stmts))
    return isinstance(stmt, Block)
