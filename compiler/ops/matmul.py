"""Matrix products with numpy's broadcasting of batch dims, and ONNX's Gemm (legalized to a product and a sum).

`packed_matmul` is what `PackWeights` makes of a product with a constant: the second operand comes in panels of
neighbouring columns, each of which lies together, row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kedge.compiler import te
from kedge.compiler.dtypes import INTEGERS
from kedge.compiler.graph.dims import broadcast_shape, format_dim, same_shape
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.registry import REQUIRED, Agreement, Array, FusionKind, OpDef
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

    return (_narrowed(te.compute(out.shape, body, name="matmul"), out),)


def _narrowed(result: Tensor, out: TensorType) -> Tensor:
    """The sum, which may be wider, in the dtype of the result."""
    if result.dtype == out.dtype:
        return result
    return common.elementwise(out, "matmul_cast", lambda *i: result.at(i))


def _batch(indices: Sequence[Expr], dims: Sequence[Dim]) -> list[Expr | int]:
    own = indices[len(indices) - len(dims) :]
    return [0 if common.is_one(dim) else index for index, dim in zip(own, dims, strict=True)]


def _infer_packed(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    a, b = types
    dtype = common.require_same_dtype(types)
    common.require_dtype(a, common.NUMBERS)
    common.require(a.rank > 1 and b.rank > 2, f"operands must have rank 2 and 3 at least, not {a.rank} and {b.rank}")
    panels, depth, width = b.shape[-3:]
    common.require(
        same_dim(a.shape[-1], depth),
        f"the last dim of a, {format_dim(a.shape[-1])}, is not known to equal {format_dim(depth)} of the panels",
    )
    columns = attrs["columns"]
    fits = isinstance(panels, int) and isinstance(width, int) and (panels - 1) * width < columns <= panels * width
    common.require(fits, f"{columns} columns are not those of {format_dim(panels)} panels of {format_dim(width)}")
    batch = broadcast_shape(a.shape[:-2], b.shape[:-3])
    return (TensorType((*batch, a.shape[-2], columns), dtype, a.space),)


def _packed(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    a, b = arrays
    *batch, panels, depth, width = b.shape
    plain = np.moveaxis(b, -3, -2).reshape(*batch, depth, panels * width)[..., : attrs["columns"]]
    return _reference((a, plain), attrs)


def _lower_packed(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    a, b = tensors
    width = b.shape[-1]
    k = te.reduce_axis(a.shape[-1], "k")

    def body(*indices: Expr) -> Expr:
        *batch, row, column = indices
        panel = (*_batch(batch, b.shape[:-3]), column // width, k, column % width)
        return te.sum(common.read(a, (*_batch(batch, a.shape[:-2]), row, k)) * common.read(b, panel), k)

    return (_narrowed(te.compute(types[0].shape, body, name="matmul"), types[0]),)


registry.register(
    OpDef("packed_matmul", FusionKind.CONTRACTION, _infer_packed, _packed, _lower_packed, {"columns": REQUIRED}, (2, 2))
)


def _agree(shapes: Sequence[Sequence[Dim]], attrs: Attrs) -> Iterator[Agreement]:
    if len(shapes) == 2 and all(shapes):
        yield Agreement(((0, -1), (1, -min(2, len(shapes[1])))))
        yield from common.broadcasting(shapes, -3)


registry.register(OpDef("matmul", FusionKind.CONTRACTION, _infer, _reference, _lower, {}, (2, 2), agree=_agree))


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


def _agree_gemm(shapes: Sequence[Sequence[Dim]], attrs: Attrs) -> Iterator[Agreement]:
    if any(len(shape) != 2 for shape in shapes[:2]):
        return
    rows, inner = (-1, -2) if attrs.get("trans_a") else (-2, -1)
    other, columns = (-1, -2) if attrs.get("trans_b") else (-2, -1)
    yield Agreement(((0, inner), (1, other)))
    addend = shapes[2] if len(shapes) == 3 else ()
    for axis, of in ((-1, (1, columns)), (-2, (0, rows))):
        if len(addend) >= -axis:
            yield Agreement((of, (2, axis)), spread=True)


registry.register(
    OpDef(
        "gemm", FusionKind.CONTRACTION, _infer_gemm, _gemm, None,
        {"alpha": 1.0, "beta": 1.0, "trans_a": False, "trans_b": False}, (2, 3), agree=_agree_gemm,
    )
)  # fmt: skip
