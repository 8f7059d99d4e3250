"""Walking and rebuilding trees of the tensor IR. Every map returns the same object where nothing changed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Expr, Load, Select, Var
from kedge.compiler.tir.stmt import Block, Buffer, For, If, IterVar, PrimFunc, Range, Region, Seq, Stmt, Store

ExprMap: TypeAlias = Callable[[Expr], Expr]
StmtMap: TypeAlias = Callable[[Stmt], Stmt]


def children(expr: Expr) -> tuple[Expr, ...]:
    """The direct operands of `expr`, left to right."""
    # The busiest function of a compile: the most frequent kinds come first, and patterns would take twice as long.
    if isinstance(expr, Binary):
        return (expr.a, expr.b)
    if isinstance(expr, (Var, Const)):
        return ()
    if isinstance(expr, Load):
        return expr.indices
    if isinstance(expr, Select):
        return (expr.condition, expr.a, expr.b)
    if isinstance(expr, Cast):
        return (expr.value,)
    if isinstance(expr, Call):
        return expr.args
    raise TypeError(f"not an expression of the tensor IR: {expr!r}")


def with_children(expr: Expr, new: tuple[Expr, ...]) -> Expr:
    """`expr` with other operands, in the order of `children`."""
    match expr:
        case Binary():
            return Binary(expr.op, new[0], new[1])
        case Load():
            return Load(expr.buffer, new)
        case Cast():
            return Cast(new[0], expr.dtype)
        case Select():
            return Select(new[0], new[1], new[2])
        case Call():
            return Call(expr.name, new, expr.dtype)
    return expr


def map_children(expr: Expr, f: ExprMap) -> Expr:
    """`expr` with `f` applied to its direct operands."""
    if isinstance(expr, Binary):
        a, b = f(expr.a), f(expr.b)
        return expr if a is expr.a and b is expr.b else Binary(expr.op, a, b)
    if isinstance(expr, (Var, Const)):
        return expr
    old = children(expr)
    new = tuple(f(child) for child in old)
    return expr if _same(old, new) else with_children(expr, new)


def map_expr(expr: Expr, f: ExprMap) -> Expr:
    """`expr` rebuilt bottom-up: operands first, then `f` on the node with its new operands."""

    def go(node: Expr) -> Expr:
        return f(map_children(node, go))

    return go(expr)


def walk_expr(expr: Expr) -> Iterator[Expr]:
    """Every node of `expr`, operands first."""
    found, stack = [], [expr]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(children(node))
    return reversed(found)  # nodes before their operands, the last one first, were found


def stmt_children(stmt: Stmt) -> tuple[Stmt, ...]:
    """The direct sub-statements, in order of execution."""
    match stmt:
        case Store():
            return ()
        case Seq(stmts=stmts):
            return stmts
        case If(then=then, orelse=orelse):
            return (then,) if orelse is None else (then, orelse)
        case For(body=body):
            return (body,)
        case Block(body=body, init=init):
            return (body,) if init is None else (init, body)
    raise TypeError(f"not a statement of the tensor IR: {stmt!r}")


def stmt_exprs(stmt: Stmt, *, regions: bool = False) -> tuple[Expr, ...]:
    """The expressions that `stmt` itself holds (not those of its sub-statements).

    A block's declared reads and writes are left out unless `regions`: they describe the body, they are not run.
    """
    match stmt:
        case Store(indices=indices, value=value):
            return (*indices, value)
        case If(condition=condition):
            return (condition,)
        case For(extent=extent):
            return (extent,)
        case Block():
            own = (*(it.extent for it in stmt.iters), *stmt.bindings, stmt.predicate)
            if not regions:
                return own
            ranges = (r for region in (*stmt.reads, *stmt.writes) for r in region.ranges)
            return (*own, *(e for r in ranges for e in (r.start, r.extent)))
    return ()


def walk_stmt(stmt: Stmt) -> Iterator[Stmt]:
    """Every statement under and including `stmt`, sub-statements first."""
    found, stack = [], [stmt]
    while stack:
        node = stack.pop()
        found.append(node)
        stack.extend(stmt_children(node))
    return reversed(found)


def walk_exprs(stmt: Stmt) -> Iterator[Expr]:
    """Every expression node that running `stmt` may evaluate."""
    for sub in walk_stmt(stmt):
        for expr in stmt_exprs(sub):
            yield from walk_expr(expr)


def map_region(region: Region, f: ExprMap) -> Region:
    """`region` with `f` applied to the start and extent of each range."""
    ranges = tuple(_map_range(r, f) for r in region.ranges)
    return region if _same(region.ranges, ranges) else Region(region.buffer, ranges)


def map_stmt_exprs(stmt: Stmt, f: ExprMap) -> Stmt:
    """`stmt` with `f` applied to the expressions it holds itself, a block's regions included."""
    match stmt:
        case Store(indices=indices, value=value):
            new_indices, new_value = tuple(f(i) for i in indices), f(value)
            if new_value is value and _same(indices, new_indices):
                return stmt
            return Store(stmt.buffer, new_indices, new_value)
        case If(condition=condition):
            new = f(condition)
            return stmt if new is condition else replace(stmt, condition=new)
        case For(extent=extent):
            new = f(extent)
            return stmt if new is extent else replace(stmt, extent=new)
        case Block():
            return _map_block_exprs(stmt, f)
    return stmt


def map_stmt_children(stmt: Stmt, f: StmtMap) -> Stmt:
    """`stmt` with `f` applied to its direct sub-statements."""
    match stmt:
        case Seq(stmts=stmts):
            new = tuple(f(s) for s in stmts)
            return stmt if _same(stmts, new) else Seq(new)
        case If(then=then, orelse=orelse):
            new_then, new_else = f(then), None if orelse is None else f(orelse)
            unchanged = new_then is then and new_else is orelse
            return stmt if unchanged else replace(stmt, then=new_then, orelse=new_else)
        case For(body=body):
            new_body = f(body)
            return stmt if new_body is body else replace(stmt, body=new_body)
        case Block(body=body, init=init):
            new_body, new_init = f(body), None if init is None else f(init)
            unchanged = new_body is body and new_init is init
            return stmt if unchanged else replace(stmt, body=new_body, init=new_init)
    return stmt


def map_stmt(stmt: Stmt, f: StmtMap | None = None, *, expr: ExprMap | None = None) -> Stmt:
    """`stmt` rebuilt bottom-up.

    `expr` is applied to each whole expression (pass `lambda e: map_expr(e, g)` to reach inside), then `f` to each
    statement with its new parts.
    """
    new = map_stmt_children(stmt, lambda child: map_stmt(child, f, expr=expr))
    if expr is not None:
        new = map_stmt_exprs(new, expr)
    return new if f is None else f(new)


def substitute_expr(expr: Expr, mapping: Mapping[Var, Expr]) -> Expr:
    """`expr` with variables replaced (all at once)."""

    def go(node: Expr) -> Expr:
        return mapping.get(node, node) if isinstance(node, Var) else map_children(node, go)

    return go(expr) if mapping else expr


def substitute(stmt: Stmt, mapping: Mapping[Var, Expr]) -> Stmt:
    """`stmt` with uses of variables replaced (all at once). Loop variables that are declared stay as they are."""
    return map_stmt(stmt, expr=lambda e: substitute_expr(e, mapping)) if mapping else stmt


def replace_buffers_expr(expr: Expr, mapping: Mapping[Buffer, Buffer]) -> Expr:
    """`expr` reading other buffers."""

    def swap(node: Expr) -> Expr:
        if isinstance(node, Load) and node.buffer in mapping:
            return Load(mapping[node.buffer], node.indices)
        return node

    return map_expr(expr, swap)


def replace_buffers(stmt: Stmt, mapping: Mapping[Buffer, Buffer]) -> Stmt:
    """`stmt` reading and writing other buffers (of the same rank), its blocks' regions included."""

    def swap_region(region: Region) -> Region:
        return Region(mapping[region.buffer], region.ranges) if region.buffer in mapping else region

    def swap(node: Stmt) -> Stmt:
        if isinstance(node, Store) and node.buffer in mapping:
            return Store(mapping[node.buffer], node.indices, node.value)
        if isinstance(node, Block):
            reads, writes = tuple(map(swap_region, node.reads)), tuple(map(swap_region, node.writes))
            if not (_same(reads, node.reads) and _same(writes, node.writes)):
                return replace(node, reads=reads, writes=writes)
        return node

    return map_stmt(stmt, swap, expr=lambda e: replace_buffers_expr(e, mapping))


def map_func(func: PrimFunc, f: StmtMap | None = None, *, expr: ExprMap | None = None) -> PrimFunc:
    """`func` with its body rebuilt by `map_stmt`."""
    body = map_stmt(func.body, f, expr=expr)
    return func if body is func.body else replace(func, body=body)


def loads(node: Stmt | Expr) -> Iterator[Load]:
    """Every load that running or evaluating `node` may do."""
    for expr in walk_expr(node) if isinstance(node, Expr) else walk_exprs(node):
        if isinstance(expr, Load):
            yield expr


def stores(stmt: Stmt) -> Iterator[Store]:
    """Every store under `stmt`."""
    for sub in walk_stmt(stmt):
        if isinstance(sub, Store):
            yield sub


def free_vars(expr: Expr) -> tuple[Var, ...]:
    """The variables that `expr` uses, each once, in order of appearance."""
    found: dict[Var, None] = {}
    stack = [expr]
    while stack:
        node = stack.pop()
        if isinstance(node, Binary):
            stack += (node.b, node.a)
        elif isinstance(node, Var):
            found[node] = None
        elif not isinstance(node, Const):
            stack.extend(reversed(children(node)))
    return tuple(found)


def seq(*stmts: Stmt) -> Stmt:
    """Statements in order: nested sequences are flattened, and one statement stands for itself."""
    flat: list[Stmt] = []
    for stmt in stmts:
        flat.extend(stmt.stmts if isinstance(stmt, Seq) else (stmt,))
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def _same(old: tuple[object, ...], new: tuple[object, ...]) -> bool:
    return len(old) == len(new) and all(map(operator.is_, old, new))


def _map_range(r: Range, f: ExprMap) -> Range:
    start, extent = f(r.start), f(r.extent)
    return r if start is r.start and extent is r.extent else Range(start, extent)


def _map_iter(it: IterVar, f: ExprMap) -> IterVar:
    extent = f(it.extent)
    return it if extent is it.extent else replace(it, extent=extent)


def _map_block_exprs(block: Block, f: ExprMap) -> Block:
    iters = tuple(_map_iter(it, f) for it in block.iters)
    bindings = tuple(f(b) for b in block.bindings)
    reads = tuple(map_region(r, f) for r in block.reads)
    writes = tuple(map_region(r, f) for r in block.writes)
    predicate = f(block.predicate)
    pairs = ((block.iters, iters), (block.bindings, bindings), (block.reads, reads), (block.writes, writes))
    if predicate is block.predicate and all(_same(old, new) for old, new in pairs):
        return block
    return replace(block, iters=iters, bindings=bindings, reads=reads, writes=writes, predicate=predicate)
