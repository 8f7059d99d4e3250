"""Sums in steps that do not divide them: whole steps ask for nothing, and what is left of the sum comes after them.

    for k_0 in (n + 3) // 4:                          for k_0 in n // 4:
      for k_1 in unrolled(4):                           for k_1 in unrolled(4):
        if k_0 * 4 + k_1 < n:                             t = t + x[k_0 * 4 + k_1]
          t = t + x[k_0 * 4 + k_1]          ->        for k_1 in n % 4:
                                                        t = t + x[n // 4 * 4 + k_1]

With versions of a step the loop would choose in each iteration, and tiles at the edges, whose conditions depend on
fewer loops than those of steps do, would get no versions of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kedge.compiler.tir.expr import Binary, Const, Expr, Var, const, logical_and
from kedge.compiler.tir.simplify import conjuncts, prove, prove_equal, simplify
from kedge.compiler.tir.stmt import For, If, Stmt, Store
from kedge.compiler.tir.structural import expr_key
from kedge.compiler.tir.visitor import free_vars, loads, map_stmt_children, seq, stmt_children, substitute, walk_stmt

#: A rest of fewer steps runs in turn. Unrolled it made LLVM 22 spill in the loop before: of a 1x1 convolution of 58
#: channels an iteration took 48 cycles on the Cortex-A9, and takes 41 (llvm-mca 19).
_LEAST_UNROLLED = 4


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """The condition `outer * size + step < count` of a loop `outer` and an unrolled loop `step` of `size` in it."""

    condition: Expr
    step: Var
    size: int
    count: Expr


def split_rests(stmt: Stmt) -> Stmt:
    """`stmt`, in which buffers have no place yet, with the rests of sums apart.

    Taken apart are serial loops, of a known or free number of iterations, around unrolled steps of a known size: all
    stores in there (to buffers of any shape and dtype) ask whether the step is one, and none depends on which it is.
    The same object where there are none.
    """
    new = map_stmt_children(stmt, split_rests)
    return _apart(new) if isinstance(new, For) and new.kind == "serial" else new


def _apart(loop: For) -> Stmt:
    steps: _Steps | None = None
    for each in _stores(loop.body, loop.var, {}, None):
        if each is None or (steps is not None and expr_key(each.condition) != expr_key(steps.condition)):
            return loop
        steps = each
    bound = {each.var for each in walk_stmt(loop) if isinstance(each, For)}
    if steps is None or not bound.isdisjoint(free_vars(steps.count)) or not prove(steps.count >= 0):
        return loop
    size = const(steps.size)
    if not prove_equal(loop.extent, (steps.count + (steps.size - 1)) // size):
        return loop
    whole, left = simplify(steps.count // size), simplify(steps.count % size)
    body = _sure(loop.body, steps)
    rest = substitute(_resized(body, steps.step, left), {loop.var: whole})
    return seq(replace(loop, extent=whole, body=body), rest)


def _stores(stmt: Stmt, outer: Var, unrolled: Mapping[Var, int], steps: _Steps | None) -> Iterator[_Steps | None]:
    """For each store its condition on steps of the loop over `outer`; None if it has none, or depends on the step."""
    match stmt:
        case Store(indices=indices):
            used = {var for index in indices for var in free_vars(index)}
            yield None if steps is None or not used.isdisjoint((outer, steps.step)) else steps
            return
        case For(var=var, kind="unrolled", extent=Const(value=size)):
            unrolled = {**unrolled, var: int(size)}
        case If(condition=condition, orelse=None):
            found = (_steps(term, outer, unrolled) for term in conjuncts(condition))
            steps = next((each for each in found if each is not None), steps)
    for child in stmt_children(stmt):
        yield from _stores(child, outer, unrolled, steps)


def _steps(term: Expr, outer: Var, unrolled: Mapping[Var, int]) -> _Steps | None:
    """What a term of a condition says of the steps of a loop, if it says that."""
    if not (isinstance(term, Binary) and term.op == "lt" and term.a.dtype == "int64") or any(True for _ in loads(term)):
        return None
    used = set(free_vars(term.a))
    if len(used) != 2 or outer not in used:
        return None
    (step,) = used - {outer}
    size = unrolled.get(step)
    if size is None or not prove_equal(term.a, outer * size + step):
        return None
    return _Steps(term, step, size, term.b)


def _sure(stmt: Stmt, steps: _Steps) -> Stmt:
    """`stmt` where each step is one."""
    new = map_stmt_children(stmt, lambda child: _sure(child, steps))
    if not isinstance(new, If) or new.orelse is not None:
        return new
    terms = list(conjuncts(new.condition))
    left = [term for term in terms if expr_key(term) != expr_key(steps.condition)]
    return new if len(left) == len(terms) else If(logical_and(*left), new.then) if left else new.then


def _resized(stmt: Stmt, var: Var, extent: Expr) -> Stmt:
    """`stmt` with that extent of the unrolled loops over `var`; if it is free or small, they run in turn."""
    if isinstance(stmt, For) and stmt.var is var:
        is_long = isinstance(extent, Const) and extent.value >= _LEAST_UNROLLED
        own = replace(var)  # what was found out about the steps of a whole loop does not hold for the rest's
        body = substitute(stmt.body, {var: own})
        return replace(stmt, var=own, extent=extent, kind="unrolled" if is_long else "serial", body=body)
    return map_stmt_children(stmt, lambda child: _resized(child, var, extent))
