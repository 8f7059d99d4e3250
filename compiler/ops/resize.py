"""Resizing axes by interpolation (ONNX Resize), and the sampling of one axis that it becomes where sizes are known."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import reduce

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.dims import evaluate, format_dim, plain_shape
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.common import ANY
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.ops.sampling import Sampling, sampled, table
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Cast, Dim, Expr, as_expr, maximum, minimum

# -- resize ------------------------------------------------------------------------------------------------------


def sampling_of(attrs: Attrs) -> Sampling:
    """How the attributes say that axes are resized; raises `ShapeError` on a name that is not known."""
    result = Sampling(
        attrs["mode"], attrs["coordinates"], attrs["rounding"], float(attrs["cubic_a"]), attrs["exclude_outside"]
    )
    result.check()
    return result


def resized_axes(shape: Sequence[Dim], attrs: Attrs) -> tuple[int, ...]:
    """The axes whose elements move: those of another size, or with a scale other than 1."""
    scales = attrs["scales"]
    return tuple(
        axis for axis, (before, after) in enumerate(zip(shape, attrs["sizes"], strict=True))
        if not same_dim(before, after) or (scales is not None and scales[axis] != 1)
    )  # fmt: skip


def scale_of(attrs: Attrs, axis: int, before: int, after: int) -> float:
    """The ratio that coordinates of an axis are computed with: as given, or that of the sizes."""
    return float(attrs["scales"][axis]) if attrs["scales"] is not None else after / before


def _infer_resize(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    sizes, scales = plain_shape(attrs["sizes"]), attrs["scales"]
    common.require_dtype(x, ANY if attrs["mode"] == "nearest" else FLOATS)
    common.require(len(sizes) == x.rank, f"sizes has {len(sizes)} entries for an input of rank {x.rank}")
    common.require(scales is None or len(scales) == x.rank, f"scales must have {x.rank} entries, or be None")
    common.require(scales is None or all(scale > 0 for scale in scales), f"scales {scales} must be positive")
    sampling_of(attrs)
    for axis, (before, after) in enumerate(zip(x.shape, sizes, strict=True)):
        common.require(not isinstance(after, int) or after >= 0, f"the size {format_dim(after)} is negative")
        common.require(
            not common.is_zero(before) or common.is_zero(after),
            f"axis {axis} has no elements to make {format_dim(after)} of",
        )
    return (TensorType(sizes, x.dtype, x.space),)


def _resize(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    (x,) = arrays
    sampling, result = sampling_of(attrs), common.wide(x)
    for axis in resized_axes(x.shape, attrs):
        after = evaluate(attrs["sizes"][axis], {})
        if after == 0:
            result = np.take(result, np.zeros(0, np.int64), axis)
            continue
        indices, weights = table(sampling, x.shape[axis], after, scale_of(attrs, axis, x.shape[axis], after))
        result = _sample(result, indices, weights, axis)
    return (np.ascontiguousarray(result).astype(x.dtype).reshape(evaluate_sizes(attrs)),)


def evaluate_sizes(attrs: Attrs) -> tuple[int, ...]:
    """The sizes of a call whose attributes have no symbols."""
    return tuple(evaluate(size, {}) for size in attrs["sizes"])


def _lower_resize(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    """Every element from its coordinates, which are computed while running."""
    (x,) = tensors
    sampling, axes, out = sampling_of(attrs), resized_axes(x.shape, attrs), types[0]

    def element(*indices: Expr) -> Expr:
        taps: list[list[tuple[Expr, Expr | None]]] = []
        for axis, index in enumerate(indices):
            if axis not in axes:
                taps.append([(index, None)])
                continue
            scale = None if attrs["scales"] is None else float(attrs["scales"][axis])
            at, weights = sampled(sampling, index, x.shape[axis], out.shape[axis], scale)
            taps.append([(at[0], None)] if weights is None else list(zip(at, weights, strict=True)))
        terms = []
        for chosen in itertools.product(*taps):
            term = common.read(x, [index for index, _ in chosen])
            for weight in (weight for _, weight in chosen if weight is not None):
                term = term * common.cast(weight, term.dtype)
            terms.append(term)
        return reduce(lambda a, b: a + b, terms)

    return (common.elementwise(out, "resize", element),)


registry.register(
    OpDef(
        "resize", FusionKind.OPAQUE, _infer_resize, _resize, _lower_resize,
        {
            "sizes": REQUIRED, "scales": None, "mode": "nearest", "coordinates": "half_pixel",
            "rounding": "round_prefer_floor", "cubic_a": -0.75, "exclude_outside": False,
        },
    )
)  # fmt: skip


# -- resample ----------------------------------------------------------------------------------------------------


def _infer_resample(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, indices = types[:2]
    axis = common.axis_of(attrs["axis"], x.rank)
    common.require(indices.dtype in ("int32", "int64"), f"indices are {indices.dtype}, not int32 or int64")
    common.require(indices.rank == 2 and isinstance(indices.shape[1], int), "indices must have shape (size, taps)")
    taps = indices.shape[1]
    if len(types) == 2:
        common.require(common.is_one(taps), f"{taps} taps want weights")
        common.require_dtype(x, ANY)
    else:
        common.require_dtype(x, FLOATS)
        common.require(types[2].dtype == "float32", f"weights are {types[2].dtype}, not float32")
        common.require(
            len(types[2].shape) == 2 and all(map(same_dim, types[2].shape, indices.shape)),
            "weights must have the shape of the indices",
        )
    return (TensorType((*x.shape[:axis], indices.shape[0], *x.shape[axis + 1 :]), x.dtype, x.space),)


def _sample(x: Array, indices: Array, weights: Array | None, axis: int) -> Array:
    if weights is None:
        return np.take(x, indices[:, 0], axis)
    shape = [1] * x.ndim
    shape[axis] = len(indices)
    parts = [
        np.take(x, indices[:, tap], axis) * weights[:, tap].astype(x.dtype).reshape(shape)
        for tap in range(indices.shape[1])
    ]
    return np.asarray(reduce(np.add, parts))


def _resample(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, indices = arrays[:2]
    axis = common.axis_of(attrs["axis"], x.ndim)
    inside = np.clip(indices, 0, max(x.shape[axis] - 1, 0))
    result = _sample(common.wide(x), inside, arrays[2] if len(arrays) == 3 else None, axis)
    return (np.ascontiguousarray(result).astype(x.dtype).reshape(result.shape),)


def _lower_resample(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    x, indices = tensors[:2]
    axis = common.axis_of(attrs["axis"], len(x.shape))
    taps = int(str(indices.shape[1]))
    last = as_expr(x.shape[axis]) - 1

    def element(*out: Expr) -> Expr:
        terms = []
        for tap in range(taps):
            raw: Expr = indices.at((out[axis], tap))
            index = raw if raw.dtype == "int64" else Cast(raw, "int64")
            # Memory stays safe whatever the indices are.
            value = common.read(x, (*out[:axis], minimum(maximum(index, 0), last), *out[axis + 1 :]))
            if len(tensors) == 3:
                value = value * common.cast(common.read(tensors[2], (out[axis], tap)), value.dtype)
            terms.append(value)
        return reduce(lambda a, b: a + b, terms)

    return (common.elementwise(types[0], "resample", element),)


registry.register(
    OpDef("resample", FusionKind.INJECTIVE, _infer_resample, _resample, _lower_resample, {"axis": REQUIRED}, (2, 3))
)  # fmt: skip
