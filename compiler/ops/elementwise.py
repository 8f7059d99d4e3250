"""Operators of one input that keep its shape: each element of the result comes from the same element of the input."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.dtypes import FLOATS, INTEGERS, SIGNED_INTEGERS, converted
from kedge.compiler.graph.ir import Attrs, TensorType
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.common import ANY, NUMBERS
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Expr, call, const, maximum, minimum, select
from kedge.compiler.tir.interp import sigmoid

ScalarRule: TypeAlias = Callable[[Expr, Attrs], Expr]
ArrayRule: TypeAlias = Callable[[Array, Attrs], Array]


def _declare(
    name: str,
    allowed: frozenset[str],
    reference: ArrayRule,
    scalar: ScalarRule,
    *,
    attrs: dict[str, Any] | None = None,
    result: Callable[[TensorType, Attrs], str] = lambda type_, attrs: type_.dtype,
) -> None:
    """Declare an operator by what it does to one number (`scalar`) and to an array (`reference`)."""

    def infer(types: Sequence[TensorType], given: Attrs) -> tuple[TensorType, ...]:
        common.require_dtype(types[0], allowed)
        return (TensorType(types[0].shape, result(types[0], given), types[0].space),)

    def run(arrays: Sequence[Array], given: Attrs) -> tuple[Array, ...]:
        (x,) = arrays
        dtype = result(TensorType((), str(x.dtype)), given)
        with np.errstate(all="ignore"):
            return (converted(reference(common.wide(x), given), dtype),)

    def lower(tensors: Sequence[Tensor], given: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
        (x,) = tensors
        return (common.elementwise(types[0], name, lambda *i: scalar(common.read(x, i), given)),)

    registry.register(OpDef(name, FusionKind.ELEMENTWISE, infer, run, lower, attrs or {}))


def _intrinsic(name: str, allowed: frozenset[str], reference: Callable[[Array], Array]) -> None:
    _declare(name, allowed, lambda x, attrs: reference(x), lambda x, attrs: call(name, x))


def _clip(x: Array, attrs: Attrs) -> Array:
    low, high = _bounds(str(x.dtype), attrs)
    x = x if low is None else np.maximum(x, np.asarray(low, x.dtype))
    return x if high is None else np.minimum(x, np.asarray(high, x.dtype))


def _clip_scalar(x: Expr, attrs: Attrs) -> Expr:
    low, high = _bounds(x.dtype, attrs)
    x = x if low is None else maximum(x, const(low, x.dtype))
    return x if high is None else minimum(x, const(high, x.dtype))


def _bounds(dtype: str, attrs: Attrs) -> tuple[Any, Any]:
    """The bounds, brought into the range of an integer dtype."""
    low, high = attrs["min"], attrs["max"]
    if dtype in INTEGERS:
        info = np.iinfo(dtype)
        low = None if low is None or low <= info.min else min(math.ceil(low), info.max)
        high = None if high is None or high >= info.max else max(math.floor(high), info.min)
    return low, high


def _cast_dtype(type_: TensorType, attrs: Attrs) -> str:
    common.require(attrs["dtype"] in ANY, f"cannot cast to dtype {attrs['dtype']!r}")
    return str(attrs["dtype"])


def _leaky(x: Expr, attrs: Attrs) -> Expr:
    return select(x >= const(0, x.dtype), x, x * const(attrs["alpha"], x.dtype))


_erf = np.vectorize(math.erf, otypes=[np.float64])

for _name, _allowed, _reference in (
    ("sigmoid", FLOATS, sigmoid),
    ("tanh", FLOATS, np.tanh),
    ("exp", FLOATS, np.exp),
    ("log", FLOATS, np.log),
    ("sqrt", FLOATS, np.sqrt),
    ("rsqrt", FLOATS, lambda x: 1 / np.sqrt(x)),
    ("erf", FLOATS, _erf),
    ("floor", FLOATS, np.floor),
    ("ceil", FLOATS, np.ceil),
    ("round", FLOATS, np.round),
    ("sin", FLOATS, np.sin),
    ("cos", FLOATS, np.cos),
    ("not", frozenset({"bool"}), np.logical_not),
):
    _intrinsic(_name, _allowed, _reference)

_declare("identity", ANY, lambda x, attrs: x, lambda x, attrs: x)
_declare(
    "relu", NUMBERS, lambda x, attrs: np.maximum(x, np.asarray(0, x.dtype)), lambda x, a: maximum(x, const(0, x.dtype))
)
_declare("abs", FLOATS | SIGNED_INTEGERS, lambda x, attrs: np.abs(x), lambda x, attrs: call("abs", x))
_declare("neg", FLOATS | SIGNED_INTEGERS, lambda x, attrs: -x, lambda x, attrs: -x)
_declare(
    "isnan", FLOATS, lambda x, attrs: np.isnan(x), lambda x, attrs: call("isnan", x, dtype="bool"),
    result=lambda type_, attrs: "bool",
)  # fmt: skip
_declare("clip", NUMBERS, _clip, _clip_scalar, attrs={"min": None, "max": None})
_declare(
    "leaky_relu", FLOATS, lambda x, attrs: np.where(x >= 0, x, x * x.dtype.type(attrs["alpha"])), _leaky,
    attrs={"alpha": 0.01},
)  # fmt: skip
_declare(
    "cast", ANY, lambda x, attrs: x, lambda x, attrs: common.cast(x, attrs["dtype"]),
    attrs={"dtype": REQUIRED}, result=_cast_dtype,
)  # fmt: skip
