"""Reads that are certain to leave their tensor: refused while the user's line is at hand, since no kernel checks them.

The first and the last iteration of every axis do run, so an index that leaves its dim there is a mistake whatever the
expression. An index that is only reached under a condition is the condition's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Final

from kedge.compiler.errors import CompileError
from kedge.compiler.tir.expr import LOGICAL, Binary, Const, Dim, Expr, Load, Select, Var, as_expr, const
from kedge.compiler.tir.printer import print_expr
from kedge.compiler.tir.simplify import bounds, over, prove, simplify
from kedge.compiler.tir.visitor import children, free_vars, loads, substitute_expr

#: Axes in one index up to which all of its corners are tried.
_MOST_AXES: Final = 4


def refuse_reads_outside(value: Expr, extents: Mapping[Var, Dim], name: str) -> None:
    """Raise `CompileError` where computing `value` for all of `extents` reads outside of a tensor; `name` computes it.

    Indices that are read from tensors, or whose dims are unknown, may pass.
    """
    if any(isinstance(extent, int) and extent == 0 for extent in extents.values()):
        return  # nothing is computed
    for load in _unguarded(value):
        for at, (index, dim) in enumerate(zip(load.indices, load.buffer.shape, strict=True)):
            if extents.get(index) is dim if isinstance(index, Var) else next(loads(index), None) is not None:
                continue
            found = _outside(index, dim, extents)
            if found is not None:
                size = print_expr(as_expr(dim))
                raise CompileError(
                    f"{name}: index {print_expr(index)} of {load.buffer.name} reaches {found}, "
                    f"outside of its dim {at} of {size}",
                    hint="guard the read: te.select(condition, read, other), or count from 0 to the dim",
                )


def _unguarded(value: Expr) -> Iterator[Load]:
    """The reads that every evaluation of `value` does."""
    seen: set[int] = set()
    stack = [value]
    while stack:
        expr = stack.pop()
        if id(expr) in seen:
            continue
        seen.add(id(expr))
        if isinstance(expr, Load):
            yield expr
        if isinstance(expr, Select):
            stack.append(expr.condition)
        elif isinstance(expr, Binary) and expr.op in LOGICAL:
            stack.append(expr.a)
        else:
            stack.extend(children(expr))


def _outside(index: Expr, dim: Dim, extents: Mapping[Var, Dim]) -> str | None:
    """A value of `index` that lies outside of `dim`; None where none is known."""
    axes = [var for var in dict.fromkeys(free_vars(index)) if var in extents]
    least, most = bounds(index, {axis: over(extents[axis]) for axis in axes})
    inside = least is not None and most is not None and least >= 0 and isinstance(dim, int) and most < dim
    if inside or len(axes) > _MOST_AXES:
        return None
    ends = [(const(0), as_expr(extents[axis]) - 1) for axis in axes]
    for corner in itertools.product(*ends):
        place = simplify(substitute_expr(index, dict(zip(axes, corner, strict=True))))
        if isinstance(place, Const) and isinstance(dim, int):
            outside = not 0 <= place.value < dim
        else:
            outside = prove(place < 0) or prove(place >= as_expr(dim))
        if outside:
            return print_expr(place)
    return None
