"""Sums without what a padding would add to them.

    for k in 3:                                             for k in 3:
      for j in vectorized(16):                                if 0 <= h + k - 1 < 8:
        y[j] = y[j] + (x[h + k - 1] if              ->          for j in vectorized(16):
                       0 <= h + k - 1 < 8 else 0) * w[k, j]       y[j] = y[j] + x[h + k - 1] * w[k, j]

Of a 5x5 convolution over an image of 7 rows a fifth of the rows that it reads are padding, of a dilated one the most.
Zeros times weights count as nothing: a weight that is infinite or NaN gives no NaN at the border of an image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from kedge.compiler.tir.expr import Binary, Const, Expr, Load, Select, Var, logical_and
from kedge.compiler.tir.simplify import conjuncts
from kedge.compiler.tir.stmt import For, If, Seq, Stmt, Store
from kedge.compiler.tir.structural import Key, expr_key
from kedge.compiler.tir.visitor import free_vars, loads, map_children, map_stmt_children, map_stmt_exprs, stmt_children


def skip_padding(stmt: Stmt) -> Stmt:
    """`stmt` where an iteration of a serial loop that only adds zeros to sums does nothing.

    Sums are stores `t[…] = t[…] + a * b` to a buffer of any shape and dtype, where a factor is
    `select(inside, x[…], 0)`, and `inside` depends on the loop's variable and on none of the loops within. The same
    object where there are none.
    """
    return map_stmt_children(skip_iterations(stmt), skip_padding)


def skip_iterations(stmt: Stmt) -> Stmt:
    """The same for `stmt` alone, if it is such a loop, and not for those inside."""
    if not (isinstance(stmt, For) and stmt.kind == "serial"):
        return stmt
    terms = _common_terms(stmt.body, stmt.var)
    if not terms:
        return stmt
    body = _granted(stmt.body, {expr_key(term) for term in terms})
    return replace(stmt, body=If(logical_and(*terms), body))


def _common_terms(body: Stmt, var: Var) -> Sequence[Expr]:
    """Conditions on `var`, the same all over `body`, without which each of its stores adds nothing to a sum."""
    common: dict[Key, Expr] | None = None
    for store, inner in _updates(body, frozenset()):
        terms = {} if store is None else {expr_key(term): term for term in _terms(store)}
        fixed = {key: term for key, term in terms.items() if _is_fixed(term, var, inner)}
        common = fixed if common is None else {key: term for key, term in common.items() if key in fixed}
        if not common:
            return ()
    return tuple((common or {}).values())


def _is_fixed(term: Expr, var: Var, inner: frozenset[Var]) -> bool:
    used = free_vars(term)
    return var in used and inner.isdisjoint(used) and not any(True for _ in loads(term))


def _updates(stmt: Stmt, inner: frozenset[Var]) -> Iterator[tuple[Store | None, frozenset[Var]]]:
    """Every store below with the variables of the loops around it; None for a statement that is something else."""
    match stmt:
        case Store():
            yield stmt, inner
        case For(var=var, body=body):
            yield from _updates(body, inner | {var})
        case Seq() | If():
            for child in stmt_children(stmt):
                yield from _updates(child, inner)
        case _:
            yield None, inner


def _terms(store: Store) -> Iterator[Expr]:
    """What must hold, each of it, for the store to add to what it replaces anything but a product with zero."""
    value = store.value
    if not (isinstance(value, Binary) and value.op == "add" and _reads(value.a, store)):
        return
    factors = [value.b]
    while factors:
        factor = factors.pop()
        if isinstance(factor, Binary) and factor.op == "mul":
            factors += [factor.a, factor.b]
        elif isinstance(factor, Select) and isinstance(factor.b, Const) and factor.b.value == 0:
            yield from conjuncts(factor.condition)


def _reads(expr: Expr, store: Store) -> bool:
    own = Load(store.buffer, store.indices)
    return isinstance(expr, Load) and expr.buffer is store.buffer and expr_key(expr) == expr_key(own)


def _granted(stmt: Stmt, known: set[Key]) -> Stmt:
    """`stmt` where choices need not ask for what is known to hold."""

    def grant(expr: Expr) -> Expr:
        new = map_children(expr, grant)
        if not isinstance(new, Select):
            return new
        terms = tuple(conjuncts(new.condition))
        left = [term for term in terms if expr_key(term) not in known]
        if len(left) == len(terms):
            return new
        return replace(new, condition=logical_and(*left)) if left else new.a

    if isinstance(stmt, Store):
        return map_stmt_exprs(stmt, grant)
    return map_stmt_children(stmt, lambda child: _granted(child, known))
