"""Running sums along an axis, counting, and sizes as data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kedge.compiler import te
from kedge.compiler.graph.dims import evaluate, format_dim, plain
from kedge.compiler.graph.ir import Attrs, TensorType
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.common import NUMBERS
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Dim, Expr, as_expr, const, eq, select

#: The fewest elements in a run of a running sum, where it has several.
_RUN = 64


def _infer_cumsum(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    common.require_dtype(x, NUMBERS)
    common.axis_of(attrs["axis"], x.rank)
    return (x,)


def _cumsum(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x = common.wide(arrays[0])
    axis = common.axis_of(attrs["axis"], x.ndim)
    x = np.flip(x, axis) if attrs["reverse"] else x
    sums = np.cumsum(x, axis, dtype=x.dtype)
    if attrs["exclusive"]:
        zero = np.zeros_like(np.take(x, np.arange(min(1, x.shape[axis])), axis))
        sums = np.concatenate([zero, np.take(sums, np.arange(max(x.shape[axis] - 1, 0)), axis)], axis)
    sums = np.flip(sums, axis) if attrs["reverse"] else sums
    return (np.ascontiguousarray(sums).astype(arrays[0].dtype),)


def _lower_cumsum(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    """Each element is what its run of elements has up to it, and what the runs before have.

    Sums of one element do not wait for those of another, and take a run's length in steps, not that of the axis.
    """
    (x,) = tensors
    axis = common.axis_of(attrs["axis"], len(x.shape))
    size = x.shape[axis]
    run = _run_length(size)
    count = plain((as_expr(size) + (run - 1)) // run)
    k, each, j = te.reduce_axis(run, "k"), te.reduce_axis(run, "k"), te.reduce_axis(count, "j")
    zero = const(0, common.wide_dtype(x.dtype))

    def value(indices: Sequence[Expr], place: Expr) -> Expr:
        """The element that `place` others come before."""
        at = as_expr(size) - 1 - place if attrs["reverse"] else place
        return common.read(x, (*indices[:axis], at, *indices[axis + 1 :]))

    def own(*indices: Expr) -> Expr:
        place = as_expr(size) - 1 - indices[axis] if attrs["reverse"] else indices[axis]
        first = place // run * run
        taken = first + k < place if attrs["exclusive"] else first + k <= place
        return select(taken, value(indices, first + k), zero)

    if run == size:
        return (common.reduction(types[0], "cumsum", te.sum, own, [k]),)

    def total(*indices: Expr) -> Expr:
        place = indices[axis] * run + each
        return te.sum(select(place < as_expr(size), value(indices, place), zero), each)

    def before(*indices: Expr) -> Expr:
        other = totals.at((*indices[:axis], j, *indices[axis + 1 :]))
        return te.sum(select(j < indices[axis], other, zero), j)

    def result(*indices: Expr) -> Expr:
        place = as_expr(size) - 1 - indices[axis] if attrs["reverse"] else indices[axis]
        return sums.at(indices) + earlier.at((*indices[:axis], place // run, *indices[axis + 1 :]))

    runs = (*x.shape[:axis], count, *x.shape[axis + 1 :])
    totals = te.compute(runs, total, name="run_totals")
    earlier = te.compute(runs, before, name="runs_before")
    sums = te.compute(x.shape, lambda *i: te.sum(own(*i), k), name="run_sums")
    return (common.elementwise(types[0], "cumsum", result),)


def _run_length(size: Dim) -> int:
    """All of a short axis; else what makes the fewest steps: `size * run` within runs, `(size / run)**2` over them."""
    if not isinstance(size, int):
        return _RUN
    return size if size <= 2 * _RUN else max(_RUN, round((2 * size) ** (1 / 3)))


registry.register(
    OpDef(
        "cumsum", FusionKind.OPAQUE, _infer_cumsum, _cumsum, _lower_cumsum,
        {"axis": REQUIRED, "exclusive": False, "reverse": False},
    )
)  # fmt: skip


def _infer_iota(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    size = plain(attrs["size"])
    common.require(not isinstance(size, int) or size >= 0, f"the size {format_dim(size)} is negative")
    return (TensorType((size,), "int64"),)


def _iota(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (np.arange(evaluate(attrs["size"], {}), dtype=np.int64),)


def _lower_iota(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    return (common.elementwise(types[0], "iota", lambda i: i),)


registry.register(
    OpDef("iota", FusionKind.INJECTIVE, _infer_iota, _iota, _lower_iota, {"size": REQUIRED}, (0, 0))
)  # fmt: skip


def _infer_dims(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    return (TensorType((len(attrs["values"]),), "int64"),)


def _dims(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (np.array([evaluate(value, {}) for value in attrs["values"]], np.int64),)


def _lower_dims(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    *others, last = map(as_expr, attrs["values"])

    def element(i: Expr) -> Expr:
        value = last
        for at, other in reversed(list(enumerate(others))):
            value = select(eq(i, at), other, value)
        return value

    return (common.elementwise(types[0], "dims", element),)


registry.register(
    OpDef("dims", FusionKind.INJECTIVE, _infer_dims, _dims, _lower_dims, {"values": REQUIRED}, (0, 0))
)  # fmt: skip
