"""Softmax and its logarithm, with the row's largest value subtracted first so that nothing overflows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kedge.compiler import te
from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.ir import Attrs, TensorType
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.registry import Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Expr, call


def _infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    common.require_dtype(types[0], FLOATS)
    common.axis_of(attrs["axis"], types[0].rank)
    return (types[0],)


def _reference(arrays: Sequence[Array], attrs: Attrs, *, log: bool) -> tuple[Array, ...]:
    x, axis = common.wide(arrays[0]), attrs["axis"]
    shifted = x - x.max(axis=axis, keepdims=True)
    totals = np.exp(shifted).sum(axis=axis, keepdims=True)
    result = shifted - np.log(totals) if log else np.exp(shifted) / totals
    return (result.astype(arrays[0].dtype),)


def _lower(
    tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...], *, log: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    (x,) = tensors
    rank = len(x.shape)
    axis = common.axis_of(attrs["axis"], rank)
    rows = [dim for i, dim in enumerate(x.shape) if i != axis]
    k, j = te.reduce_axis(x.shape[axis], "k"), te.reduce_axis(x.shape[axis], "k")

    def row(indices: Sequence[Expr]) -> tuple[Expr, ...]:
        return (*indices[:axis], *indices[axis + 1 :])

    def along(indices: Sequence[Expr], over: Expr) -> tuple[Expr, ...]:
        return (*indices[:axis], over, *indices[axis:])

    largest = te.compute(rows, lambda *i: te.max(common.read(x, along(i, k)), k), name="row_max")
    if log:
        shifted = te.compute(x.shape, lambda *i: common.read(x, i) - largest.at(row(i)), name="shifted")
        sums = te.compute(rows, lambda *i: te.sum(call("exp", shifted.at(along(i, j))), j), name="row_sum")
        return (
            common.elementwise(types[0], "log_softmax", lambda *i: shifted.at(i) - call("log", sums.at(row(i)))),
        )  # fmt: skip
    powers = te.compute(x.shape, lambda *i: call("exp", common.read(x, i) - largest.at(row(i))), name="exp")
    sums = te.compute(rows, lambda *i: te.sum(powers.at(along(i, j)), j), name="row_sum")
    # One division a row: code generation takes it out of the loop over the row.
    return (common.elementwise(types[0], "softmax", lambda *i: powers.at(i) * (1.0 / sums.at(row(i)))),)


def _declare(name: str, *, log: bool) -> None:
    registry.register(
        OpDef(
            name, FusionKind.OPAQUE, _infer, lambda arrays, attrs: _reference(arrays, attrs, log=log),
            lambda tensors, attrs, types: _lower(tensors, attrs, types, log=log), {"axis": -1},
        )
    )  # fmt: skip


_declare("softmax", log=False)
_declare("log_softmax", log=True)
