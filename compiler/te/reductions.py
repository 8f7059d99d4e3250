"""Reductions over axes, and the stages that `compute` makes of those that are no single block."""

from __future__ import annotations

import builtins
from collections.abc import Iterable, Sequence
from typing import Final

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.errors import CompileError
from kedge.compiler.te.scalars import as_bool, cast
from kedge.compiler.te.tensor import Compute, Position, Reduce, ReduceAxis, Tensor, Truth, as_scalar
from kedge.compiler.tir import expr as tir
from kedge.compiler.tir.expr import (
    INDEX_DTYPE,
    Binary,
    Cast,
    Combiner,
    Const,
    Dim,
    Expr,
    ExprLike,
    Load,
    Select,
    Var,
    as_expr,
    binary,
    identity,
)
from kedge.compiler.tir.simplify import simplify
from kedge.compiler.tir.visitor import substitute_expr

#: What a reduction is taken for by who knows Python's functions of these names.
_OF_SEVERAL: Final = {
    "max": ", or te.maximum(a, b) of two values",
    "min": ", or te.minimum(a, b) of two values",
    "any": ", or te.logical_or(a, b) of conditions",
    "all": ", or te.logical_and(a, b) of conditions",
}


def sum(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The sum of `value` over `axis`, accumulated in the dtype of `value`; 0 where there is nothing to add."""
    return _reduce("sum", "add", value, axis)


def prod(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    """The product of `value` over `axis`; 1 where there is nothing to multiply."""
    return _reduce("prod", "mul", value, axis)


def max(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The largest `value` over `axis` (NaN wins); the dtype's lowest value where there is none."""
    return _reduce("max", "max", value, axis)


def min(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The smallest `value` over `axis` (NaN wins); the dtype's highest value where there is none."""
    return _reduce("min", "min", value, axis)


def argmax(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis], *, select_last: bool = False) -> Expr:
    """The int64 index over `axis` of the largest `value`, as numpy and ONNX give it.

    The first of several equal ones wins (the last with `select_last`), and a NaN wins over every number. Over several
    axes it is the position in row-major order, the first axis outermost.

    It takes two reductions: the largest value, then the least index that reaches it. One reduction over pairs would
    read the data once, but no combiner, interpreter or rule knows pairs, and a pair does not vectorize; a maximum and a
    minimum do. Both have to see the same numbers, so a `value` that is computed, not read, gets a tensor of its own
    first.

    Raises:
        CompileError: an axis has no elements; there is no index to give.
    """
    return _position("argmax", "max", value, axis, select_last)


def argmin(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis], *, select_last: bool = False) -> Expr:
    """The int64 index over `axis` of the smallest `value`; otherwise as `argmax`."""
    return _position("argmin", "min", value, axis, select_last)


def any(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """Whether a bool `value` holds anywhere over `axis`; false where there is none."""
    return _truth("any", "max", value, axis)


def all(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """Whether a bool `value` holds everywhere over `axis`; true where there is none."""
    return _truth("all", "min", value, axis)


def staged_position(dims: tuple[Dim, ...], axes: tuple[Var, ...], body: Position, name: str) -> Tensor:
    """The value where it is computed, its extreme, and the least (or greatest) index that reaches it."""
    value = body.value
    if not _is_stored(value):
        inner = tuple(Var(axis.name) for axis in body.axes)
        element = substitute_expr(value, dict(zip(body.axes, inner, strict=True)))
        shape = (*dims, *(axis.extent for axis in body.axes))
        value = Tensor(f"{name}_value", shape, value.dtype, op=Compute((*axes, *inner), element))[(*axes, *body.axes)]
    best = Tensor(f"{name}_best", dims, value.dtype, op=Compute(axes, Reduce(body.combiner, value, body.axes)))
    hit = tir.eq(value, best[axes])
    if value.dtype in FLOATS:
        hit = binary("or", hit, tir.call("isnan", value, dtype="bool"))
    index, total = as_expr(0), as_expr(1)
    for axis in body.axes:
        index, total = index * axis.extent + axis, total * axis.extent
    missed = as_expr(-1) if body.last else total
    found = Reduce("max" if body.last else "min", Select(hit, simplify(index), simplify(missed)), body.axes)
    return Tensor(name, dims, INDEX_DTYPE, op=Compute(axes, found))


def staged_truth(dims: tuple[Dim, ...], axes: tuple[Var, ...], body: Truth, name: str) -> Tensor:
    """Whether each bool holds as a number, those reduced, and the outcome compared with 0."""
    found = Reduce(body.combiner, Cast(body.value, "uint8"), body.axes)
    hits = Tensor(f"{name}_hits", dims, "uint8", op=Compute(axes, found))
    return Tensor(name, dims, "bool", op=Compute(axes, Binary("ne", hits[axes], tir.const(0, "uint8"))))


def _reduced(what: str, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> tuple[Expr, list[ReduceAxis]]:
    """The value and the axes of a reduction, checked."""
    given = as_scalar(value, f"the value of {what}")
    axes = [axis] if isinstance(axis, Expr) or not isinstance(axis, Iterable) else list(axis)
    if not axes:
        raise CompileError(f"{what}: a reduction needs at least one axis", hint="make one with te.reduce_axis(extent)")
    for each in axes:
        if not isinstance(each, ReduceAxis):
            shown = each.name if isinstance(each, Var) else type(each).__name__
            remedy = f"make one with te.reduce_axis(extent){_OF_SEVERAL.get(what, '')}"
            raise TypeError(f"{what} over {shown}, which is no reduce axis; {remedy}")
    if len(set(axes)) < len(axes):
        twice = next(each.name for each in axes if axes.count(each) > 1)
        raise CompileError(f"{what}: axis {twice} is reduced twice", hint="give each axis once")
    return given, axes


def _reduce(what: str, combiner: Combiner, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    given, axes = _reduced(what, value, axis)
    if given.dtype == "bool":
        raise TypeError(f"{what} over bool is not defined; cast to int64 first, or use te.any or te.all")
    return identity(combiner, given.dtype) if _is_empty(axes) else Reduce(combiner, given, tuple(axes))


def _position(
    what: str, combiner: Combiner, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis], last: bool
) -> Expr:
    given, axes = _reduced(what, value, axis)
    if builtins.all(isinstance(each.extent, int) and each.extent == 1 for each in axes):
        return as_expr(0)
    if _is_empty(axes):
        raise CompileError(f"{what} over an axis without elements has no result", hint="give it an extent of 1 or more")
    return Position(combiner, cast(given, "uint8") if given.dtype == "bool" else given, tuple(axes), last)


def _truth(what: str, combiner: Combiner, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    as_bool(value, what)
    given, axes = _reduced(what, value, axis)
    return tir.const(combiner == "min", "bool") if _is_empty(axes) else Truth(combiner, given, tuple(axes))


def _is_empty(axes: Sequence[ReduceAxis]) -> bool:
    return builtins.any(isinstance(each.extent, int) and each.extent == 0 for each in axes)


def _is_stored(value: Expr) -> bool:
    """Whether `value` is the same number however often it is computed, rounding included."""
    if isinstance(value, Cast):
        return _is_stored(value.value)
    return isinstance(value, (Load, Const)) or value.dtype not in FLOATS
