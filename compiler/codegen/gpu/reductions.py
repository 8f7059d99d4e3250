"""Reductions whose loop is bound to threads: partial results in registers, then a tree in shared memory.

    for t in thread(T, 'threadIdx.x'):             for t: part = 0; for k: part += x[k, t]; tree[t] = part
      for k: block y: y[0] += x[k, t]        ->    for t in T/2: tree[t] += tree[t + T/2]      (and so on, halving)
                                                   y[0] += tree[0]

(Harris, "Optimizing Parallel Reduction in CUDA", 2007, in its form with sequential addressing.) The barriers between
the steps are put in later, as everywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from kedge.compiler.errors import CodegenError
from kedge.compiler.schedule.dependence import reduces_over
from kedge.compiler.tir.expr import Binary, Const, Expr, Load, Var, binary, const, eq, identity, logical_and
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import Ranges, Simplifier, conjuncts, over
from kedge.compiler.tir.stmt import Block, Buffer, For, If, Stmt, Store
from kedge.compiler.tir.updates import Update, as_update
from kedge.compiler.tir.visitor import (
    free_vars,
    map_stmt,
    map_stmt_children,
    seq,
    substitute,
    substitute_expr,
    walk_stmt,
)


def lower_thread_reductions(stmt: Stmt) -> tuple[Stmt, tuple[Buffer, ...]]:
    """`stmt` without blocks that reduce over a thread axis, and the buffers that were made for it.

    Raises:
        CodegenError: such a block combines its values in no way that is known, or its nest has another shape.
    """
    lowering = _Lowering([], frozenset(each.var for each in walk_stmt(stmt) if isinstance(each, For)))
    return lowering.visit(stmt, ()), tuple(lowering.buffers)


@dataclass(frozen=True, slots=True)
class _Lowering:
    buffers: list[Buffer]
    loops: frozenset[Var]

    def visit(self, stmt: Stmt, threads: tuple[For, ...]) -> Stmt:
        """`stmt` lowered; `threads` are the loops over threads around it."""
        if not (isinstance(stmt, For) and (stmt.thread or "").startswith("threadIdx.")):
            return map_stmt_children(stmt, lambda child: self.visit(child, threads))
        block = reduces_over(stmt)
        if block is not None:
            return self.reduction(stmt, block, threads)
        return map_stmt_children(stmt, lambda child: self.visit(child, (*threads, stmt)))

    def reduction(self, loop: For, block: Block, threads: tuple[For, ...]) -> Stmt:
        """The loop over threads, the tree, and the one store of the result."""
        update = as_update(block.body)
        inner = _loops_to(loop, block)
        _check(loop, block, update, inner)
        assert update is not None
        size = _extent(loop)
        dtype = update.store.buffer.dtype
        part = Buffer(f"{block.name}_part", (1,), dtype, "local")
        tree = Buffer(f"{block.name}_tree", (*map(_extent, threads), size), dtype, "shared")
        self.buffers.extend((part, tree))
        zero = const(0)
        at = tuple(each.var for each in threads)

        def combine(a: Expr, b: Expr) -> Expr:
            return binary(update.combiner, a, b)

        partial = replace(
            block, init=None, body=Store(part, (zero,), combine(Load(part, (zero,)), update.value))
        )  # fmt: skip
        body = map_stmt(loop.body, lambda s: partial if isinstance(s, Block) and s.name == block.name else s)
        start = Store(part, (zero,), identity(update.combiner, dtype))
        steps: list[Stmt] = [replace(loop, body=seq(start, body, Store(tree, (*at, loop.var), Load(part, (zero,)))))]
        reach = 1 << (size - 1).bit_length()
        while reach > 1:
            reach //= 2
            var = Var(f"{loop.var.name}_{reach}")
            both = combine(Load(tree, (*at, var)), Load(tree, (*at, var + reach)))
            step = For(var, const(min(reach, size - reach)), "thread", Store(tree, (*at, var), both), loop.thread)
            steps.append(step)
        total = Load(tree, (*at, zero))
        own = {each.var: over(each.extent) for each in (loop, *inner)}
        return seq(*steps, _result(block, update, total, own, self.loops - own.keys()))


def _extent(loop: For) -> int:
    if not isinstance(loop.extent, Const):
        raise CodegenError(
            f"loop {loop.var.name!r}, bound to {loop.thread}, has no constant extent",
            hint=f"in a new Schedule: outer, inner = sch.split({loop.var.name}, [None, 256]); "
            f'sch.reorder(inner, outer); sch.bind(inner, "{loop.thread}")',
        )
    return int(loop.extent.value)


def _loops_to(loop: For, block: Block) -> list[For]:
    """The loops inside `loop` and around the block, outermost first."""
    inside = [s for s in walk_stmt(loop.body) if isinstance(s, For)]
    return [each for each in inside if any(s is block for s in walk_stmt(each))][::-1]


def _check(loop: For, block: Block, update: Update | None, inner: list[For]) -> None:
    where = f"block {block.name!r} reduces over loop {loop.var.name!r}, which is bound to {loop.thread}"
    if update is None:
        reason = "it is no sum, product, smallest or largest of values"
        raise CodegenError(f"{where}: {reason}", hint="leave that loop serial, and bind loops over the block's outputs")
    own = {loop.var, *(each.var for each in inner)}
    for it, binding in zip(block.iters, block.bindings, strict=True):
        wrong = next((var for var in free_vars(binding) if var in own), None)
        if it.kind == "spatial" and wrong is not None:
            raise CodegenError(
                f"{where}, but its output depends on loop {wrong.name!r} inside",
                hint=f"in a new Schedule, sch.reorder({wrong.name}, {loop.var.name}) before sch.bind",
            )
    if any(each.kind == "thread" for each in inner):
        raise CodegenError(
            f"{where}, and loops inside are bound, too",
            hint="bind one of them only; or, in a new Schedule, sch.fuse them before sch.bind",
        )
    target = update.store.buffer
    for other in walk_stmt(loop):
        if isinstance(other, Block) and other is not block:
            touched = {region.buffer for region in (*other.reads, *other.writes)}
            if target in touched:
                raise CodegenError(
                    f"{where}, but block {other.name!r} inside uses {target.name!r} before it is there",
                    hint=f"take block {other.name!r} out of loop {loop.var.name!r}",
                )


def _result(block: Block, update: Update, total: Expr, own: Ranges, outside: Collection[Var]) -> Stmt:
    """The combined value put where the reduction's result belongs, once for all threads of the axis.

    A reduction over nothing, where a dim is 0, gives what it is initialised with.
    """
    at: dict[Var, Expr] = {it.var: b for it, b in zip(block.iters, block.bindings, strict=True)}
    first = dict.fromkeys(own, const(0))
    started = [eq(substitute_expr(at[it.var], first), 0) for it in block.iters if it.kind == "reduce"]
    outer = any(free_vars(term) for term in started)
    terms = [substitute_expr(term, at) for term in conjuncts(block.predicate)]
    conditions = [some for term in terms if (some := _for_some(block, term, own, outside)) is not None]
    store = update.store
    place = tuple(substitute_expr(index, at) for index in store.indices)
    result: Stmt = Store(store.buffer, place, binary(update.combiner, Load(store.buffer, place), total))
    if block.init is not None:
        init = substitute(block.init, at)
        result = seq(If(logical_and(*started), init) if outer else init, result)
    return If(logical_and(*conditions), result) if conditions else result


def _for_some(block: Block, term: Expr, own: Ranges, outside: Collection[Var]) -> Expr | None:
    """Whether `term` holds in some iteration of the loops `own`, in terms of loops `outside`; None if of none of them.

    It must hold in the first iteration, if it does in any.
    """
    used = set(free_vars(term))
    if not own.keys() & used:
        return term
    if not used & set(outside):
        return None
    simplifier, first = Simplifier(own), dict.fromkeys(own, const(0))
    if isinstance(term, Binary) and term.op in ("lt", "le", "gt", "ge"):
        small, large = (term.a, term.b) if term.op in ("lt", "le") else (term.b, term.a)
        least, most = substitute_expr(small, first), substitute_expr(large, first)
        if simplifier.prove(least <= small) and simplifier.prove(large <= most):
            return substitute_expr(term, first)
    raise CodegenError(
        f"block {block.name!r} reduces over threads where {print_expr(term)}; whether any has a part cannot be told",
        hint="bind a loop of which this condition does not depend on others",
    )
