"""Matrix products with numpy's broadcasting of batch dims, and ONNX's Gemm (legalized to a product and a sum)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kedge.compiler import te
from kedge.compiler.dtypes import INTEGERS
from kedge.compiler.graph.dims import broadcast_shape, format_dim, same_shape
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.registry import Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Dim, Expr


def _infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    a, b = types
    dtype = common.require_same_dtype(types)
    common.require_dtype(a, common.NUMBERS)
    common.require(a.rank > 0 and b.rank > 0, "an operand has no dims")
    inner = b.shape[-2 if b.rank > 1 else 0]
    common.require(
        same_dim(a.shape[-1], inner),
        f"the last dim of a, {format_dim(a.shape[-1])}, is not known to equal {format_dim(inner)} of b",
    )
    batch = broadcast_shape(a.shape[:-2], b.shape[:-2])
    rows = (a.shape[-2],) if a.rank > 1 else ()
    columns = (b.shape[-1],) if b.rank > 1 else ()
    return (TensorType((*batch, *rows, *columns), dtype, a.space),)


def _reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    a, b = arrays
    return (np.asarray(np.matmul(common.wide(a), common.wide(b))).astype(a.dtype),)


def _lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    a, b = tensors
    out = types[0]
    a_rank, b_rank = len(a.shape), len(b.shape)
    k = te.reduce_axis(a.shape[-1], "k")
    n_batch = len(out.shape) - (a_rank > 1) - (b_rank > 1)

    def body(*indices: Expr) -> Expr:
        batch = indices[:n_batch]
        row = indices[n_batch : n_batch + 1] if a_rank > 1 else ()
        column = indices[-1:] if b_rank > 1 else ()
        a_index = (*_batch(batch, a.shape[:-2]), *row, k)
        b_index = (*_batch(batch, b.shape[:-2]), k, *column)
        return te.sum(common.read(a, a_index) * common.read(b, b_index), k)

    result = te.compute(out.shape, body, name="matmul")
    if result.dtype != out.dtype:
        return (common.elementwise(out, "matmul_cast", lambda *i: result.at(i)),)
    return (result,)


def _batch(indices: Sequence[Expr], dims: Sequence[Dim]) -> list[Expr | int]:
    own = indices[len(indices) - len(dims) :]
    return [0 if common.is_one(dim) else index for index, dim in zip(own, dims, strict=True)]


registry.register(OpDef("matmul", FusionKind.CONTRACTION, _infer, _reference, _lower, {}, (2, 2)))


def _infer_gemm(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    a, b = types[:2]
    dtype = common.require_same_dtype(types)
    common.require(a.rank == 2 and b.rank == 2, f"operands must have rank 2, not {a.rank} and {b.rank}")
    rows, inner = reversed(a.shape) if attrs["trans_a"] else a.shape
    other, columns = reversed(b.shape) if attrs["trans_b"] else b.shape
    common.require(
        same_dim(inner, other), f"inner dims {format_dim(inner)} and {format_dim(other)} are not known to be equal"
    )
    if dtype in INTEGERS:
        for name in ("alpha", "beta"):
            common.require(
                float(attrs[name]).is_integer(), f"{name} {attrs[name]} of a product of {dtype} is not whole"
            )
    shape = (rows, columns)
    if len(types) == 3:
        common.require(
            same_shape(broadcast_shape(types[2].shape, shape), shape), "the addend does not broadcast to the product"
        )
    return (TensorType(shape, dtype, a.space),)


def _gemm(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    a, b = common.wide(arrays[0]), common.wide(arrays[1])
    a = a.T if attrs["trans_a"] else a
    b = b.T if attrs["trans_b"] else b
    result = attrs["alpha"] * (a @ b)
    if len(arrays) == 3:
        result = result + attrs["beta"] * common.wide(arrays[2])
    return (result.astype(arrays[0].dtype),)


registry.register(
    OpDef(
        "gemm", FusionKind.CONTRACTION, _infer_gemm, _gemm, None,
        {"alpha": 1.0, "beta": 1.0, "trans_a": False, "trans_b": False}, (2, 3),
    )
)  # fmt: skip
