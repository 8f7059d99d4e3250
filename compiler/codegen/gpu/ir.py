"""What a function becomes for a GPU: launches of kernels, in which threads wait for one another at barriers.

A *group* of threads is what OpenCL calls a work-group and CUDA a block; its position is (blockIdx.x, .y, .z), and a
thread's position in it is (threadIdx.x, .y, .z).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kedge.compiler.tir.expr import Expr, Load, Var
from kedge.compiler.tir.stmt import Buffer, For, If, Seq, Stmt, Store
from kedge.compiler.tir.visitor import free_vars, stmt_exprs, walk_expr

AXES = ("x", "y", "z")
GROUP_AXES = tuple(f"blockIdx.{axis}" for axis in AXES)
THREAD_AXES = tuple(f"threadIdx.{axis}" for axis in AXES)


@dataclass(frozen=True, slots=True, eq=False)
class Barrier(Stmt):
    """Every thread of the group waits here for all others, and then sees what they wrote."""


@dataclass(frozen=True, slots=True, eq=False)
class Launch(Stmt):
    """One kernel started over a grid of groups.

    `grid` has one expression of the host per axis; `block` is the number of threads of a group. `body` is what one
    thread does, in terms of `axes`, the variables that hold its position. `shared` lives once per group, `private`
    once per thread. `buffers` are the arrays in global memory and `scalars` the host's variables that the body uses.
    """

    name: str
    grid: tuple[Expr, Expr, Expr]
    block: tuple[int, int, int]
    axes: dict[str, Var]
    body: Stmt
    shared: tuple[Buffer, ...]
    private: tuple[Buffer, ...]
    buffers: tuple[Buffer, ...]
    scalars: tuple[Var, ...]


def parts(stmt: Stmt) -> tuple[Stmt, ...]:
    """The direct sub-statements of a statement without blocks, a barrier included."""
    match stmt:
        case Seq(stmts=stmts):
            return stmts
        case For(body=body):
            return (body,)
        case If(then=then, orelse=orelse):
            return (then,) if orelse is None else (then, orelse)
    return ()


def walk(stmt: Stmt) -> Iterator[Stmt]:
    """Every statement under and including `stmt`, outer ones first."""
    yield stmt
    for part in parts(stmt):
        yield from walk(part)


def exprs(stmt: Stmt) -> Iterator[Expr]:
    """Every expression node that `stmt` itself holds."""
    for expr in stmt_exprs(stmt):
        yield from walk_expr(expr)


def buffers_of(stmt: Stmt) -> tuple[Buffer, ...]:
    """Every buffer that is touched under `stmt`, each once."""
    found: dict[Buffer, None] = {}
    for each in walk(stmt):
        if isinstance(each, Store):
            found[each.buffer] = None
        found |= dict.fromkeys(node.buffer for node in exprs(each) if isinstance(node, Load))
    return tuple(found)


def used_vars(stmt: Stmt) -> tuple[Var, ...]:
    """The variables that `stmt` uses and does not bind itself, those of its buffers' shapes included."""
    found: dict[Var, None] = {}
    bound: set[Var] = set()
    for each in walk(stmt):
        if isinstance(each, For):
            bound.add(each.var)
        found |= dict.fromkeys(node for node in exprs(each) if isinstance(node, Var))
    for buffer in buffers_of(stmt):
        found |= dict.fromkeys(var for dim in buffer.shape if isinstance(dim, Expr) for var in free_vars(dim))
    return tuple(var for var in found if var not in bound)
