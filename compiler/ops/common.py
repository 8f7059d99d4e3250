"""What the families of operators share: checks for inference, and small helpers for te lowering."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge.compiler import te
from kedge.compiler.dtypes import FLOATS, HALVES, INTEGERS
from kedge.compiler.errors import ShapeError
from kedge.compiler.ops.registry import Agreement
from kedge.compiler.tir.expr import (
    Const,
    Dim,
    Expr,
    as_expr,
    identity,
    logical_and,
)  # fmt: skip

if TYPE_CHECKING:
    from kedge.compiler.graph.ir import TensorType
    from kedge.compiler.ops.registry import Array

NUMBERS = FLOATS | INTEGERS
ANY = NUMBERS | {"bool"}

#: Families and users mean the same by a cast.
cast = te.cast


def require(condition: bool, reason: str, hint: str | None = None) -> None:
    """Raise `ShapeError` with `reason` unless `condition`."""
    if not condition:
        raise ShapeError(reason, hint=hint)


def require_dtype(type_: TensorType, allowed: frozenset[str]) -> None:
    """Raise `ShapeError` unless the type's dtype is one of `allowed`."""
    require(type_.dtype in allowed, f"dtype {type_.dtype} is not supported (one of {', '.join(sorted(allowed))})")


def require_same_dtype(types: Sequence[TensorType]) -> str:
    """The dtype that all `types` share; raises `ShapeError` where they differ."""
    require(len({t.dtype for t in types}) == 1, "dtypes differ", "insert a cast")
    return types[0].dtype


def axis_of(axis: int, rank: int) -> int:
    """`axis` counted from the front; raises `ShapeError` where it is outside of [-rank, rank)."""
    require(-rank <= axis < rank, f"axis {axis} is outside of rank {rank}")
    return axis % rank


def axes_of(axes: Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """`axes` counted from the front and sorted (None: all); raises `ShapeError` where one is repeated or outside."""
    if axes is None:
        return tuple(range(rank))
    result = tuple(sorted(axis_of(axis, rank) for axis in axes))
    require(len(set(result)) == len(result), f"axes {tuple(axes)} repeat one")
    return result


def wide_dtype(dtype: str) -> str:
    """The dtype to compute in: floats of 16 bits are for storage only."""
    return "float32" if dtype in HALVES else dtype


def wide(array: Array) -> Array:
    """An array in the dtype to compute in."""
    return array.astype(np.float32) if str(array.dtype) in HALVES else array


def read(tensor: te.Tensor, indices: Sequence[Expr | int]) -> Expr:
    """The element at `indices`, widened for computing; a tensor that is one literal gives the literal itself."""
    if isinstance(tensor.op, te.Compute) and isinstance(tensor.op.body, Const):
        value: Expr = tensor.op.body
    else:
        value = tensor.at(indices)
    return cast(value, wide_dtype(tensor.dtype))


def aligned(tensor: te.Tensor, indices: Sequence[Expr]) -> Expr:
    """The element that numpy broadcasting puts at `indices` of the result."""
    own = indices[len(indices) - len(tensor.shape) :]
    return read(tensor, [0 if is_one(dim) else index for index, dim in zip(own, tensor.shape, strict=True)])


def broadcasting(shapes: Sequence[Sequence[Dim]], last: int) -> Iterator[Agreement]:
    """What numpy's broadcasting asks of dims: those up to axis `last`, a negative number, meet."""
    for axis in range(last, -max(map(len, shapes), default=0) - 1, -1):
        yield Agreement(tuple((n, axis) for n, shape in enumerate(shapes) if len(shape) >= -axis), spread=True)


def is_one(dim: Dim) -> bool:
    """Whether a dim is known to be 1."""
    return isinstance(dim, int) and dim == 1


def is_zero(dim: Dim) -> bool:
    """Whether a dim is known to be 0."""
    return isinstance(dim, int) and dim == 0


def elementwise(out: TensorType, name: str, body: Callable[..., Expr]) -> te.Tensor:
    """The tensor of type `out` whose element at `indices` is `body(*indices)`, narrowed to the dtype of `out`."""
    return te.compute(out.shape, lambda *indices: cast(body(*indices), out.dtype), name=name)


def reduction(
    out: TensorType,
    name: str,
    combine: Callable[..., Expr],
    body: Callable[..., Expr],
    axes: Sequence[te.ReduceAxis],
) -> te.Tensor:
    """The tensor of `out.shape` that combines `body(*indices)` over `axes`, narrowed to `out.dtype` afterwards."""
    result = te.compute(out.shape, lambda *indices: combine(body(*indices), list(axes)), name=name)
    if result.dtype == out.dtype:
        return result
    return te.compute(out.shape, lambda *indices: cast(result.at(indices), out.dtype), name=f"{name}_cast")


def inside(index: Expr, size: Dim) -> Expr:
    """The condition `0 <= index < size`."""
    return logical_and(index >= 0, index < as_expr(size))


def lowest(dtype: str) -> Any:
    """The smallest value of a dtype: -inf of floats."""
    return identity("max", dtype).value
