"""The converter of Resize (and of Upsample, which older opsets have in its place)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.frontend.onnx.node import Node, converter
from kedge.compiler.frontend.onnx.symbolic import LARGEST_DENOMINATOR, Quotient, Ratio
from kedge.compiler.graph.dims import divide, format_dim, plain
from kedge.compiler.graph.ir import Value
from kedge.compiler.ops.sampling import COORDINATES
from kedge.compiler.tir.expr import Dim, Expr, as_expr


@converter("Resize")
def _resize(node: Node) -> Value:
    x = node.value(0)
    if node.attr("antialias", 0):
        raise node.error("antialias is not supported", hint="export it with antialias=0, or blur before resizing")
    coordinates = node.attr("coordinate_transformation_mode", "half_pixel")
    if coordinates not in COORDINATES:
        raise node.error(
            f"coordinate_transformation_mode {coordinates!r} is not supported", hint=f"use {', '.join(COORDINATES)}"
        )
    sizes, scales = _sizes_and_scales(node, x)
    mode = node.attr("mode", "nearest")
    dtype = x.type.dtype
    # Interpolated integers are rounded towards zero.
    source = x if mode == "nearest" or dtype in FLOATS else node.emit("cast", x, dtype="float32")
    result = node.emit(
        "resize", source, sizes=sizes, scales=scales, mode=mode, coordinates=coordinates,
        rounding=node.attr("nearest_mode", "round_prefer_floor"), cubic_a=float(node.attr("cubic_coeff_a", -0.75)),
        exclude_outside=bool(node.attr("exclude_outside", 0)),
    )  # fmt: skip
    return result if source is x else node.emit("cast", result, dtype=dtype)


def _sizes_and_scales(node: Node, x: Value) -> tuple[tuple[Dim, ...], tuple[float, ...] | None]:
    """The size of every axis of the result, and the scales where the node gives those, or an aspect to keep."""
    rank, shape = x.type.rank, x.type.shape
    axes = tuple(axis % rank for axis in node.attr("axes", range(rank)) if -rank <= axis < rank)
    if len(axes) != len(node.attr("axes", range(rank))):
        raise node.error(f"axes {list(node.attr('axes'))} are outside of rank {rank}")
    given = node.dims(3, "sizes") if node.has(3) else ()
    sizes = list(shape)
    if given:
        _require_length(node, "sizes", given, axes)
        for axis, size in zip(axes, given, strict=True):
            sizes[axis] = size
        return _keeping_aspect(node, shape, axes, sizes)
    if not node.has(2):
        raise node.error("it has neither scales nor sizes")
    content = node.content(2)
    factors = list((node.const(2, "scales") if content is None else content).reshape(-1).astype(object))
    _require_length(node, "scales", factors, axes)
    scales = [1.0] * rank
    computed = [isinstance(factor, (Expr, Ratio, Quotient)) for factor in factors]
    for axis, factor, follows in zip(axes, factors, computed, strict=True):
        if follows:
            sizes[axis] = _reached(node, axis, shape[axis], factor)
            continue
        if not factor > 0:
            raise node.error(f"the scale {factor:g} of axis {axis} is not positive")
        scales[axis] = float(np.float32(factor))
        sizes[axis] = _scaled(node, shape[axis], np.float32(factor))
        if any(computed) and not _says_the_same(shape[axis], sizes[axis], scales[axis]):
            raise node.error(
                f"its scales are quotients of sizes for some axes, and {factor:g} for axis {axis}",
                hint="fix the dims: shapes={...} or --shape NAME=1,3,224,224",
            )
    return tuple(sizes), None if any(computed) else tuple(scales)


def _reached(node: Node, axis: int, size: Dim, scale: Expr | Ratio | Quotient) -> Dim:
    """What a dim becomes by a scale that the model computes, of a size over its own.

    Where a float is less than that quotient, ONNX Runtime comes one short of the size that was asked for.
    """
    above, below = (scale, 1) if isinstance(scale, Expr) else (scale.above, scale.below)
    reached = divide([size, above], [below])
    if reached is None:
        by = format_dim(above) if below == 1 else f"{format_dim(above)} / ({format_dim(below)})"
        raise node.error(
            f"axis {axis} with the dim {format_dim(size)} is scaled by {by}, which does not end at a size",
            hint="scales may be sizes over its input's; or fix the dims: shapes={...} or --shape NAME=1,3,224,224",
        )
    return reached


def _says_the_same(before: Dim, after: Dim, scale: float) -> bool:
    """Whether a scale is the ratio of the sizes."""
    if isinstance(before, int) and isinstance(after, int):
        return before > 0 and float(np.float32(after / before)) == scale
    return scale.is_integer()


def _require_length(node: Node, what: str, given: Sequence[object], axes: Sequence[int]) -> None:
    if len(given) != len(axes):
        raise node.error(f"{what} has {len(given)} entries for {len(axes)} axes")


def _scaled(node: Node, size: Dim, factor: np.float32) -> Dim:
    """`size` times `factor`, rounded down."""
    if isinstance(size, int):
        return int(np.floor(np.float32(size) * factor))
    exact = Fraction(float(factor))
    if exact.denominator > LARGEST_DENOMINATOR:
        raise node.error(
            f"the free dim {format_dim(size)} is scaled by {factor:g}",
            hint="fix the dims: shapes={...} or --shape NAME=1,3,224,224, or export with scales like 2 or 0.5",
        )
    return plain(as_expr(size) * exact.numerator // exact.denominator)


def _keeping_aspect(
    node: Node, shape: Sequence[Dim], axes: Sequence[int], sizes: Sequence[Dim]
) -> tuple[tuple[Dim, ...], tuple[float, ...] | None]:
    """Where the node keeps the ratios of the sizes, one scale for all axes: the least or the largest asked for."""
    policy = node.attr("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return tuple(sizes), None
    pairs = [(shape[axis], sizes[axis]) for axis in axes]
    ratios = [
        after / before for before, after in pairs if isinstance(before, int) and isinstance(after, int) and before
    ]
    if len(ratios) < len(axes):
        raise node.error(
            f"keep_aspect_ratio_policy {policy} depends on a free or empty dim",
            hint="fix the dims: shapes={...} or --shape NAME=1,3,224,224",
        )
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    scales, kept = [1.0] * len(shape), list(shape)
    for axis in axes:
        size = shape[axis]
        assert isinstance(size, int)  # it has a ratio
        scales[axis], kept[axis] = scale, int(np.floor(scale * size + 0.5))
    return tuple(kept), tuple(scales)
