"""Operands whose dims must be equal, but are not known to be while compiling: the call that runs says whether they are.

A U-Net over a free height h puts `h // 2` and `h // 4 * 2` side by side: equal for some sizes. Such an operand goes
through `expect_shape`, which gives it the other one's dims and costs nothing; entries have the runtime compare the two
before anything runs (see `lower.limits`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kedge.compiler.graph.dims import plain
from kedge.compiler.graph.ir import Value, same_dim
from kedge.compiler.ops import registry
from kedge.compiler.ops.common import broadcasting, is_one
from kedge.compiler.ops.registry import Agreement, FusionKind
from kedge.compiler.tir.expr import Binary, Dim, Expr, as_expr
from kedge.compiler.tir.simplify import prove
from kedge.compiler.tir.visitor import walk_expr


def agreed(op: str, inputs: Sequence[Value], attrs: Mapping[str, Any]) -> tuple[tuple[Dim, ...] | None, ...]:
    """For each input the shape that the operator `op` needs it to have; None where that is known to be its own.

    Dims that are known to differ stay, so that shape inference refuses them.
    """
    shapes = [list(value.type.shape) for value in inputs]
    changed = [False] * len(shapes)
    for agreement in _agreements(op, shapes, attrs):
        there = [(n, axis) for n, axis in agreement.dims if not (agreement.spread and is_one(shapes[n][axis]))]
        common = agreement.size
        if common is None:
            common = min((shapes[n][axis] for n, axis in there), key=_size, default=1)
        for n, axis in there:
            if not same_dim(shapes[n][axis], common) and not _differ(shapes[n][axis], common):
                shapes[n][axis] = common
                changed[n] = True
    return tuple(tuple(shape) if new else None for shape, new in zip(shapes, changed, strict=True))


def _agreements(op: str, shapes: Sequence[Sequence[Dim]], attrs: Mapping[str, Any]) -> Iterable[Agreement]:
    definition = registry.get(op)
    if definition.agree is not None:
        return definition.agree(shapes, attrs)
    if definition.kind is FusionKind.BROADCAST and definition.uniform:
        return broadcasting(shapes, -1)
    return ()


def _size(dim: Dim) -> int:
    """How much there is to compute; nothing for what is known."""
    return sum(1 for _ in walk_expr(dim)) if isinstance(dim, Expr) else 0


def _differ(a: Dim, b: Dim) -> bool:
    difference = plain(as_expr(a) - as_expr(b))
    return difference != 0 if isinstance(difference, int) else prove(Binary("ne", as_expr(a), as_expr(b)))
