"""Reductions over axes: sums, products, means, extremes, and the position of an extreme."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from kedge.compiler import te
from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.dims import product
from kedge.compiler.graph.ir import Attrs, TensorType
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.common import NUMBERS
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Dim, Expr, as_expr, const

Combine: TypeAlias = Callable[[Expr, Sequence[te.ReduceAxis]], Expr]


def reduced_shape(shape: Sequence[Dim], axes: Sequence[int], keepdims: bool) -> tuple[Dim, ...]:
    """A shape without `axes`, or with ones there."""
    return tuple(1 if axis in axes else dim for axis, dim in enumerate(shape) if keepdims or axis not in axes)


def full_index(
    indices: Sequence[Expr], over: Sequence[te.ReduceAxis], axes: Sequence[int], rank: int, keepdims: bool
) -> list[Expr]:
    """The index in the input: `over` on the reduced axes, the result's own indices elsewhere."""
    kept = iter(index for axis, index in enumerate(indices) if not (keepdims and axis in axes))
    return [over[axes.index(axis)] if axis in axes else next(kept) for axis in range(rank)]


def _declare(name: str, allowed: frozenset[str], function: Callable[..., Array], combine: Combine) -> None:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = types
        common.require_dtype(x, allowed)
        axes = common.axes_of(attrs["axes"], x.rank)
        return (TensorType(reduced_shape(x.shape, axes, attrs["keepdims"]), x.dtype, x.space),)

    def reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
        (x,) = arrays
        axes = common.axes_of(attrs["axes"], x.ndim)
        result = function(common.wide(x), axis=axes, keepdims=attrs["keepdims"])
        return (np.asarray(result).astype(x.dtype),)

    def lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
        (x,) = tensors
        rank = len(x.shape)
        axes = common.axes_of(attrs["axes"], rank)
        if not axes:
            return (common.elementwise(types[0], name, lambda *i: common.read(x, i)),)
        over = [te.reduce_axis(x.shape[axis], f"k{axis}") for axis in axes]

        def element(*indices: Expr) -> Expr:
            return common.read(x, full_index(indices, over, axes, rank, attrs["keepdims"]))

        if name != "reduce_mean":
            return (common.reduction(types[0], name, combine, element, over),)
        totals = te.compute(types[0].shape, lambda *i: combine(element(*i), over), name="mean_sum")
        count = product(x.shape[axis] for axis in axes)
        return (common.elementwise(types[0], name, lambda *i: _divide(totals.at(i), count)),)

    registry.register(OpDef(name, FusionKind.REDUCTION, infer, reference, lower, {"axes": None, "keepdims": False}))


def _divide(total: Expr, count: Dim) -> Expr:
    if isinstance(count, int) and count:
        return total * const(1 / count, total.dtype)
    return total / common.cast(as_expr(count), total.dtype)


for _name, _allowed, _function, _combine in (
    ("reduce_sum", NUMBERS, np.sum, te.sum),
    ("reduce_prod", NUMBERS, np.prod, te.prod),
    ("reduce_mean", FLOATS, np.mean, te.sum),
    ("reduce_max", NUMBERS, np.max, te.max),
    ("reduce_min", NUMBERS, np.min, te.min),
):
    _declare(_name, _allowed, _function, _combine)


def _declare_position(name: str, function: Callable[..., Array], position: Callable[..., Expr]) -> None:
    def infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
        (x,) = types
        common.require_dtype(x, NUMBERS)
        axis = common.axis_of(attrs["axis"], x.rank)
        common.require(not common.is_zero(x.shape[axis]), f"{name} over an axis without elements has no result")
        return (TensorType(reduced_shape(x.shape, (axis,), attrs["keepdims"]), "int64", x.space),)

    def reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
        (x,) = arrays
        axis = common.axis_of(attrs["axis"], x.ndim)
        if not attrs["select_last"]:
            return (np.asarray(function(x, axis=axis, keepdims=attrs["keepdims"])).astype(np.int64),)
        flipped = function(np.flip(x, axis), axis=axis, keepdims=attrs["keepdims"])
        return (np.asarray(x.shape[axis] - 1 - flipped).astype(np.int64),)

    def lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
        (x,) = tensors
        rank = len(x.shape)
        axis = common.axis_of(attrs["axis"], rank)
        over = te.reduce_axis(x.shape[axis], "k")

        def element(*indices: Expr) -> Expr:
            value = common.read(x, full_index(indices, [over], (axis,), rank, attrs["keepdims"]))
            return position(value, over, select_last=attrs["select_last"])

        return (te.compute(types[0].shape, element, name=name),)

    registry.register(
        OpDef(
            name, FusionKind.REDUCTION, infer, reference, lower,
            {"axis": REQUIRED, "keepdims": False, "select_last": False},
        )
    )  # fmt: skip


_declare_position("argmax", np.argmax, te.argmax)
_declare_position("argmin", np.argmin, te.argmin)
