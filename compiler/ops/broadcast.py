"""Operators of several inputs that broadcast as in numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.dims import broadcast_shape, evaluate_shape, format_dim, plain_shape, same_shape
from kedge.compiler.graph.ir import Attrs, TensorType
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.common import ANY, NUMBERS, aligned
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Binary, BinaryOp, Expr, call, select
from kedge.compiler.tir.interp import power

ScalarRule: TypeAlias = Callable[[Expr, Expr, Attrs], Expr]
ArrayRule: TypeAlias = Callable[[Array, Array, Attrs], Array]
BOOL = frozenset({"bool"})


def _declare(
    name: str,
    allowed: frozenset[str],
    reference: ArrayRule,
    scalar: ScalarRule,
    *,
    gives_bool: bool = False,
    attrs: dict[str, Any] | None = None,
) -> None:
    """Declare an operator of two inputs by what it does to two numbers (`scalar`) and to arrays (`reference`)."""

    def infer(types: Sequence[TensorType], given: Attrs) -> tuple[TensorType, ...]:
        dtype = common.require_same_dtype(types)
        common.require_dtype(types[0], allowed)
        shape = broadcast_shape(types[0].shape, types[1].shape)
        return (TensorType(shape, "bool" if gives_bool else dtype, types[0].space),)

    def run(arrays: Sequence[Array], given: Attrs) -> tuple[Array, ...]:
        a, b = arrays
        with np.errstate(all="ignore"):
            result = np.asarray(reference(common.wide(a), common.wide(b), given))
        return (result.astype(bool if gives_bool else a.dtype),)

    def lower(tensors: Sequence[Tensor], given: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
        a, b = tensors
        return (common.elementwise(types[0], name, lambda *i: scalar(aligned(a, i), aligned(b, i), given)),)

    registry.register(OpDef(name, FusionKind.BROADCAST, infer, run, lower, attrs or {}, (2, 2)))


def _plain(op: BinaryOp) -> ScalarRule:
    return lambda a, b, attrs: Binary(op, a, b)


def _is_float(a: Array) -> bool:
    return bool(np.issubdtype(a.dtype, np.floating))


def _div(a: Array, b: Array, attrs: Attrs) -> Array:
    if _is_float(a):
        return np.asarray(a / b)
    return np.asarray((a - np.fmod(a, b)) // b)


def _div_scalar(a: Expr, b: Expr, attrs: Attrs) -> Expr:
    return Binary("div" if a.dtype in FLOATS else "truncdiv", a, b)


def _mod_scalar(a: Expr, b: Expr, attrs: Attrs) -> Expr:
    return Binary("truncmod" if attrs["fmod"] else "floormod", a, b)


_ARITHMETIC: tuple[tuple[str, ArrayRule, ScalarRule], ...] = (
    ("add", lambda a, b, _: a + b, _plain("add")),
    ("sub", lambda a, b, _: a - b, _plain("sub")),
    ("mul", lambda a, b, _: a * b, _plain("mul")),
    ("div", _div, _div_scalar),
    ("minimum", lambda a, b, _: np.minimum(a, b), _plain("min")),
    ("maximum", lambda a, b, _: np.maximum(a, b), _plain("max")),
)
_COMPARISONS: tuple[tuple[str, frozenset[str], Callable[..., Array], BinaryOp], ...] = (
    ("equal", ANY, np.equal, "eq"),
    ("not_equal", ANY, np.not_equal, "ne"),
    ("less", NUMBERS, np.less, "lt"),
    ("less_equal", NUMBERS, np.less_equal, "le"),
    ("greater", NUMBERS, np.greater, "gt"),
    ("greater_equal", NUMBERS, np.greater_equal, "ge"),
    ("logical_and", BOOL, np.logical_and, "and"),
    ("logical_or", BOOL, np.logical_or, "or"),
    ("logical_xor", BOOL, np.logical_xor, "ne"),
)


def _declare_comparison(name: str, allowed: frozenset[str], reference: Callable[..., Array], op: BinaryOp) -> None:
    _declare(name, allowed, lambda a, b, _: reference(a, b), _plain(op), gives_bool=True)


for _name, _reference, _scalar in _ARITHMETIC:
    _declare(_name, NUMBERS, _reference, _scalar)
for _entry in _COMPARISONS:
    _declare_comparison(*_entry)
_declare(
    "mod", NUMBERS, lambda a, b, attrs: (np.fmod if attrs["fmod"] else np.mod)(a, b), _mod_scalar,
    attrs={"fmod": False},
)  # fmt: skip
_declare("pow", FLOATS | {"int32", "int64"}, lambda a, b, _: power(a, b), lambda a, b, _: call("pow", a, b))


def _infer_where(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    condition, a, b = types
    common.require(condition.dtype == "bool", f"the condition is {condition.dtype}, not bool")
    dtype = common.require_same_dtype((a, b))
    return (TensorType(broadcast_shape(condition.shape, a.shape, b.shape), dtype, a.space),)


def _where(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (np.where(arrays[0], arrays[1], arrays[2]),)


def _lower_where(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    condition, a, b = tensors
    return (
        common.elementwise(types[0], "where", lambda *i: select(aligned(condition, i), aligned(a, i), aligned(b, i))),
    )


registry.register(OpDef("where", FusionKind.BROADCAST, _infer_where, _where, _lower_where, {}, (3, 3)))


def _infer_broadcast_to(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    shape = plain_shape(attrs["shape"])
    common.require(
        same_shape(broadcast_shape(types[0].shape, shape), shape),
        f"does not broadcast to [{', '.join(map(format_dim, shape))}]",
    )
    return (TensorType(shape, types[0].dtype, types[0].space),)


def _broadcast_to(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (np.array(np.broadcast_to(arrays[0], evaluate_shape(attrs["shape"], {}))),)


def _lower_broadcast_to(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    return (common.elementwise(types[0], "broadcast_to", lambda *i: aligned(tensors[0], i)),)


registry.register(
    OpDef(
        "broadcast_to", FusionKind.BROADCAST, _infer_broadcast_to, _broadcast_to, _lower_broadcast_to,
        {"shape": REQUIRED}, uniform=False,
    )
)  # fmt: skip
