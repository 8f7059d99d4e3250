"""Where the elements of a resized axis come from: coordinates, rounding and interpolation of ONNX's Resize.

Coordinates are worked out in float32, times the reciprocal of a scale, as by ONNX Runtime: positions half-way between
two elements fall on the same side. Known sizes give tables, free ones
expressions of the tensor IR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge.compiler.ops import common
from kedge.compiler.ops.registry import Array
from kedge.compiler.tir.expr import Dim, Expr, as_expr, call, const, maximum, minimum, select

COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_half_pixel_for_nn",
)  # fmt: skip
MODES = ("nearest", "linear", "cubic")
ROUNDINGS = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
_F32 = "float32"


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an axis is resized."""

    mode: str
    coordinates: str
    rounding: str  # of nearest
    cubic_a: float
    exclude_outside: bool

    def check(self) -> None:
        """Raise `ShapeError` unless all names are known."""
        for name, known in ((self.mode, MODES), (self.coordinates, COORDINATES), (self.rounding, ROUNDINGS)):
            common.require(name in known, f"{name!r} is none of {', '.join(known)}")

    @property
    def first(self) -> int:
        """The first tap of an interpolation, counted from the element at or before a coordinate."""
        return -1 if self.mode == "cubic" else 0

    @property
    def taps(self) -> int:
        """The elements that an element of the result is made of."""
        return {"nearest": 1, "linear": 2, "cubic": 4}[self.mode]


def table(sampling: Sampling, before: int, after: int, scale: float) -> tuple[Array, Array | None]:
    """The elements that each element of the result is made of, and their weights.

    Args:
        sampling: how the axis is resized.
        before: its size.
        after: the size of the result.
        scale: the ratio that coordinates are computed with.

    Returns:
        indices: int64 (after, taps), all in [0, before).
        weights: float32 (after, taps); None where each element is one of the input.
    """
    if after == 0:
        none = np.zeros((0, sampling.taps))
        return none.astype(np.int64), None if sampling.mode == "nearest" else none.astype(np.float32)
    f = np.float32
    step = f(1 / scale)
    at = np.arange(after, dtype=f)
    match sampling.coordinates:
        case "asymmetric":
            position = at * step
        case "tf_half_pixel_for_nn":
            position = (at + f(0.5)) * step
        case "align_corners":
            position = at * f(before - 1) / f(max(after - 1, 1))
        case "half_pixel_symmetric":
            adjustment = f(after) / (f(scale) * f(before))
            position = f(before) / f(2) * (f(1) - adjustment) + (at + f(0.5)) * step - f(0.5)
        case _:
            position = (at + f(0.5)) * step - f(0.5)
            if sampling.coordinates == "pytorch_half_pixel" and after == 1:
                position = np.zeros_like(position)
    if sampling.mode == "nearest":
        rounded = _round(sampling.rounding, position)
        return np.clip(rounded.astype(np.int64), 0, before - 1)[:, None], None
    lower = np.floor(position)
    weights = _weights(sampling, position - lower)
    indices = lower.astype(np.int64)[:, None] + np.arange(sampling.first, sampling.first + sampling.taps)
    if sampling.exclude_outside:
        weights = np.where((indices >= 0) & (indices < before), weights, f(0))
        weights = weights / weights.sum(axis=1, keepdims=True)
    return np.clip(indices, 0, before - 1), weights.astype(f)


def _round(rounding: str, position: Array) -> Array:
    if rounding == "ceil":
        return np.asarray(np.ceil(position))
    lower = np.floor(position)
    if rounding == "floor":
        return np.asarray(lower)
    rest = position - lower
    return np.asarray(lower + (rest > 0.5 if rounding == "round_prefer_floor" else rest >= 0.5))


def _weights(sampling: Sampling, fraction: Array) -> Array:
    """The weight of each tap, for a coordinate `fraction` behind the element before it (Keys' kernel, 1981)."""
    one = np.float32(1)
    if sampling.mode == "linear":
        return np.stack([one - fraction, fraction], axis=1)
    return np.stack(_cubic(sampling.cubic_a, fraction), axis=1)


def _cubic(a: float, fraction: Any) -> list[Any]:
    """The four weights of Keys' cubic convolution, of an array or of an expression."""
    result = []
    for tap in (-1, 0, 1, 2):
        distance = {-1: fraction + 1.0, 0: fraction, 1: 1.0 - fraction, 2: 2.0 - fraction}[tap]
        if tap in (0, 1):
            result.append(((a + 2) * distance - (a + 3)) * distance * distance + 1.0)
        else:
            result.append(((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a)
    return result


def sampled(
    sampling: Sampling, at: Expr, before: Dim, after: Dim, scale: float | None
) -> tuple[list[Expr], list[Expr] | None]:
    """As `table` for the element at index `at`, as expressions: for axes whose size is not known while compiling."""
    size, last = common.cast(as_expr(before), _F32), as_expr(before) - 1
    result = common.cast(as_expr(after), _F32)

    def unscaled(place: Expr) -> Expr:
        """A division comes last: no target fuses it with the addition that follows, and shifts what is half-way."""
        return place * size / result if scale is None else place / const(scale, _F32)

    index = common.cast(at, _F32)
    match sampling.coordinates:
        case "asymmetric":
            position = unscaled(index)
        case "tf_half_pixel_for_nn":
            position = unscaled(index + 0.5)
        case "align_corners":
            position = index * (size - 1.0) / maximum(result - 1.0, const(1, _F32))
        case "half_pixel_symmetric":
            adjustment = unscaled(result) / size
            position = unscaled(index + 0.5) + size / 2.0 * (1.0 - adjustment) - 0.5
        case _:
            position = unscaled(index + 0.5) - 0.5
            if sampling.coordinates == "pytorch_half_pixel":
                position = select(as_expr(after) > 1, position, const(0, _F32))
    if sampling.mode == "nearest":
        rounded = common.cast(_rounded(sampling.rounding, position), "int64")
        return [minimum(maximum(rounded, 0), last)], None
    lower = call("floor", position)
    fraction = position - lower
    weights = [1.0 - fraction, fraction] if sampling.mode == "linear" else _cubic(sampling.cubic_a, fraction)
    base = common.cast(lower, "int64")
    indices = [base + (sampling.first + tap) for tap in range(sampling.taps)]
    if sampling.exclude_outside:
        zero = const(0, _F32)
        weights = [select(common.inside(i, before), w, zero) for i, w in zip(indices, weights, strict=True)]
        whole = weights[0]
        for weight in weights[1:]:
            whole = whole + weight
        weights = [weight / whole for weight in weights]
    return [minimum(maximum(i, 0), last) for i in indices], weights


def _rounded(rounding: str, position: Expr) -> Expr:
    if rounding == "ceil":
        return call("ceil", position)
    lower = call("floor", position)
    if rounding == "floor":
        return lower
    rest = position - lower
    up = rest > 0.5 if rounding == "round_prefer_floor" else rest >= 0.5
    return select(up, lower + 1.0, lower)
