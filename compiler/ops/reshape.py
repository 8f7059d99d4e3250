"""Operators that give the same elements in the same order another shape; all of them become `reshape`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kedge.compiler.graph.dims import divide, evaluate_shape, format_dim, plain_shape, product
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Dim, Expr, as_expr, const
from kedge.rpc.errors import InputError


def _infer_reshape(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    shape = list(plain_shape(attrs["shape"]))
    free = [axis for axis, dim in enumerate(shape) if isinstance(dim, int) and dim == -1]
    common.require(len(free) <= 1, f"shape {_show(shape)} leaves more than one dim open")
    common.require(
        all(not isinstance(dim, int) or dim >= 0 for axis, dim in enumerate(shape) if axis not in free),
        f"shape {_show(shape)} has a negative dim",
    )
    if free:
        rest = divide(x.shape, [dim for axis, dim in enumerate(shape) if axis not in free])
        common.require(rest is not None, f"{_show(x.shape)} elements are not known to divide into {_show(shape)}")
        shape[free[0]] = rest if rest is not None else 0
    common.require(
        same_dim(product(x.shape), product(shape)),
        f"{_show(shape)} is not known to have as many elements as {_show(x.shape)}",
    )
    return (TensorType(tuple(shape), x.dtype, x.space),)


def _show(shape: Sequence[Dim]) -> str:
    return f"[{', '.join(map(format_dim, shape))}]"


def _reshape(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (arrays[0].reshape(evaluate_shape(attrs["shape"], {})),)


def _lower_reshape(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    out = types[0]

    def element(*indices: Expr) -> Expr:
        flat: Expr = const(0)
        for index, dim in zip(indices, out.shape, strict=True):
            flat = flat * as_expr(dim) + index
        return common.read(x, unravel(flat, x.shape))

    return (common.elementwise(out, "reshape", element),)


def unravel(flat: Expr, shape: Sequence[Dim]) -> list[Expr]:
    """The indices in a row-major array of the element at position `flat`."""
    result: list[Expr] = []
    for axis in range(len(shape) - 1, -1, -1):
        size = as_expr(shape[axis])
        result.append(flat % size if axis else flat)  # the outermost needs no remainder
        flat = flat // size
    return result[::-1]


registry.register(
    OpDef("reshape", FusionKind.INJECTIVE, _infer_reshape, _reshape, _lower_reshape, {"shape": REQUIRED})
)  # fmt: skip


def _infer_expect(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    shape = plain_shape(attrs["shape"])
    common.require(len(shape) == x.rank, f"shape {_show(shape)} is of another rank")
    for given, wanted in zip(x.shape, shape, strict=True):
        known = isinstance(given, int) and isinstance(wanted, int) and given != wanted
        common.require(not known, f"shape {_show(shape)} is not {_show(x.shape)}")
    return (TensorType(shape, x.dtype, x.space),)


def _expect(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    shape = evaluate_shape(attrs["shape"], {})
    if arrays[0].shape != shape:
        raise InputError(f"a tensor of shape {list(arrays[0].shape)} is expected to have the shape {list(shape)}")
    return (arrays[0],)


def _lower_expect(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    return (common.elementwise(types[0], "expect_shape", lambda *indices: common.read(tensors[0], indices)),)


registry.register(
    OpDef(
        "expect_shape", FusionKind.INJECTIVE, _infer_expect, _expect, _lower_expect, {"shape": REQUIRED}, uniform=False
    )
)  # fmt: skip


def flattened(shape: Sequence[Dim], axis: int) -> tuple[Dim, ...]:
    """The shape of rank 2 with the dims before `axis` multiplied, and those from it on."""
    axis = axis + len(shape) if axis < 0 else axis
    common.require(0 <= axis <= len(shape), f"axis {axis} is outside of rank {len(shape)}")
    return product(shape[:axis]), product(shape[axis:])


def squeezed(shape: Sequence[Dim], axes: Sequence[int] | None) -> tuple[Dim, ...]:
    """The shape without `axes`, which must be 1; None means all that are known to be 1."""
    if axes is None:
        return tuple(dim for dim in shape if not common.is_one(dim))
    drop = common.axes_of(axes, len(shape))
    for axis in drop:
        common.require(common.is_one(shape[axis]), f"dim {axis} is {format_dim(shape[axis])}, not 1")
    return tuple(dim for axis, dim in enumerate(shape) if axis not in drop)


def unsqueezed(shape: Sequence[Dim], axes: Sequence[int]) -> tuple[Dim, ...]:
    """The shape with ones at `axes` of the result."""
    rank = len(shape) + len(axes)
    ones = common.axes_of(axes, rank)
    rest = iter(shape)
    return tuple(1 if axis in ones else next(rest) for axis in range(rank))


def target_shape(op: str, type_: TensorType, attrs: Attrs) -> tuple[Dim, ...]:
    """The shape that flatten, squeeze or unsqueeze gives."""
    if op == "flatten":
        return flattened(type_.shape, attrs["axis"])
    return (squeezed if op == "squeeze" else unsqueezed)(type_.shape, attrs["axes"])


def _declare(name: str, attrs: dict[str, object]) -> None:
    def infer(types: Sequence[TensorType], given: Attrs) -> tuple[TensorType, ...]:
        return (TensorType(target_shape(name, types[0], given), types[0].dtype, types[0].space),)

    def reference(arrays: Sequence[Array], given: Attrs) -> tuple[Array, ...]:
        type_ = TensorType(arrays[0].shape, str(arrays[0].dtype))
        return (np.reshape(arrays[0], evaluate_shape(target_shape(name, type_, given), {})),)

    registry.register(OpDef(name, FusionKind.INJECTIVE, infer, reference, None, attrs))


_declare("flatten", {"axis": 1})
_declare("squeeze", {"axes": None})
_declare("unsqueeze", {"axes": REQUIRED})
