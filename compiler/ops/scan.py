"""Running sums along an axis, and counting."""

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
from kedge.compiler.tir.expr import Expr, const, select


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
    """Each element sums what it takes on its own: lengths are small, and all elements are independent."""
    (x,) = tensors
    axis = common.axis_of(attrs["axis"], len(x.shape))
    k = te.reduce_axis(x.shape[axis], "k")

    def element(*indices: Expr) -> Expr:
        first, second = (indices[axis], k) if attrs["reverse"] else (k, indices[axis])
        value = common.read(x, (*indices[:axis], k, *indices[axis + 1 :]))
        return select(first < second if attrs["exclusive"] else first <= second, value, const(0, value.dtype))

    return (common.reduction(types[0], "cumsum", te.sum, element, [k]),)


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
