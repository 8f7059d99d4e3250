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
from kedge.compiler.tir.expr import Expr, as_expr, const, eq, select

#: Elements in a run of a running sum, where it has several.
_RUN = 32
#: Runs of runs over an axis of a free size: sums of the last ones cost little up to billions of elements.
_FREE_LEVELS = 3


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
    """The running sums, narrowed to the dtype of the result."""
    (x,) = tensors
    axis = common.axis_of(attrs["axis"], len(x.shape))
    sums = _running_sums(x, axis, attrs["exclusive"], attrs["reverse"], _FREE_LEVELS)
    if sums.dtype == types[0].dtype:
        return (sums,)
    return (common.elementwise(types[0], "cumsum_cast", lambda *indices: sums.at(indices)),)


def _running_sums(x: Tensor, axis: int, exclusive: bool, reverse: bool, levels: int) -> Tensor:
    """Each element is what its run of elements has up to it, and what the runs before have: their running sums.

    Sums of one element do not wait for those of another. Runs of runs make the steps grow with the length, and not
    with its square; over free sizes there are `levels` of them.
    """
    length = x.shape[axis]
    size = as_expr(length)
    is_short = levels == 0 if isinstance(length, Expr) else length <= 2 * _RUN
    run = length if is_short else _RUN
    count = plain((size + (_RUN - 1)) // _RUN)
    k, each = te.reduce_axis(run, "k"), te.reduce_axis(run, "k")
    zero = const(0, common.wide_dtype(x.dtype))

    def place_of(indices: Sequence[Expr]) -> Expr:
        """How many elements come before an element."""
        return size - 1 - indices[axis] if reverse else indices[axis]

    def value(indices: Sequence[Expr], place: Expr) -> Expr:
        """The element that `place` others come before."""
        at = size - 1 - place if reverse else place
        return common.read(x, (*indices[:axis], at, *indices[axis + 1 :]))

    def own(*indices: Expr) -> Expr:
        place = place_of(indices)
        other = as_expr(k) if is_short else place // _RUN * _RUN + k
        return te.sum(select(other < place if exclusive else other <= place, value(indices, other), zero), k)

    def total(*indices: Expr) -> Expr:
        place = indices[axis] * _RUN + each
        return te.sum(select(place < size, value(indices, place), zero), each)

    def result(*indices: Expr) -> Expr:
        before = (*indices[:axis], place_of(indices) // _RUN, *indices[axis + 1 :])
        return sums.at(indices) + earlier.at(before)

    sums = te.compute(x.shape, own, name="run_sums")
    if is_short:
        return sums
    totals = te.compute((*x.shape[:axis], count, *x.shape[axis + 1 :]), total, name="run_totals")
    earlier = _running_sums(totals, axis, True, False, levels - 1)
    return te.compute(x.shape, result, name="cumsum")


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
