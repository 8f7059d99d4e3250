"""Scalar expressions beyond Python's operators: literals, casts, choices, comparisons, logic and intrinsics."""

from __future__ import annotations

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.te.tensor import as_scalar, checked_dtype
from kedge.compiler.tir import expr as tir
from kedge.compiler.tir.expr import Binary, BinaryOp, Cast, Const, Expr, ExprLike, Select, as_expr, binary


def const(value: int | float | bool, dtype: str | None = None) -> Expr:
    """A literal: int64, float32 or bool by its Python type, or of `dtype`.

    Raises:
        TypeError: `dtype` cannot hold the value.
    """
    if dtype is None:
        return as_scalar(value, "a literal")
    as_scalar(value, "a literal")
    if not _holds(checked_dtype(dtype, "a literal"), value):
        raise TypeError(f"{value!r} is no {dtype}; give a value that fits, or te.cast an expression")
    return tir.const(value, dtype)


def cast(value: ExprLike, dtype: str) -> Expr:
    """`value` in `dtype`. Floats become integers by dropping the fraction, numbers become bool by comparing with 0."""
    given = as_scalar(value, "the value of cast")
    if given.dtype == checked_dtype(dtype, "cast"):
        return given
    if isinstance(given, Const) and (dtype == "bool" or _holds(dtype, given.value)):
        return tir.const(given.value, dtype)
    return Binary("ne", given, tir.const(0, given.dtype)) if dtype == "bool" else Cast(given, dtype)


def select(condition: ExprLike, a: ExprLike, b: ExprLike) -> Expr:
    """`a` where the bool `condition` holds, else `b`. Only the chosen side is evaluated: it may guard a read.

    Raises:
        TypeError: the condition is no bool, or the sides have different dtypes.
    """
    refuse_python_bool(condition, "the condition of select")
    test = as_scalar(condition, "the condition of select")
    if test.dtype != "bool":
        raise TypeError(f"the condition of select is {test.dtype}; compare it, or te.cast(condition, 'bool')")
    yes, no = _pair("select", a, b)
    return Select(test, yes, no)


where = select


def minimum(a: ExprLike, b: ExprLike) -> Expr:
    """The smaller of two values; NaN wins."""
    return _binary("min", "minimum", a, b)


def maximum(a: ExprLike, b: ExprLike) -> Expr:
    """The larger of two values; NaN wins."""
    return _binary("max", "maximum", a, b)


def eq(a: ExprLike, b: ExprLike) -> Expr:
    """Whether two values are equal. (Python's `==` compares the expressions themselves.)"""
    return _binary("eq", "eq", a, b)


def ne(a: ExprLike, b: ExprLike) -> Expr:
    """Whether two values differ."""
    return _binary("ne", "ne", a, b)


def logical_and(*terms: ExprLike) -> Expr:
    """Whether all of the bools `terms` hold; the later ones are evaluated only where those before them do."""
    return tir.logical_and(*(as_bool(term, "logical_and") for term in terms))


def logical_or(*terms: ExprLike) -> Expr:
    """Whether one of the bools `terms` holds; the later ones are evaluated only where those before them do not."""
    result: Expr | None = None
    for term in terms:
        each = as_bool(term, "logical_or")
        result = each if result is None else binary("or", result, each)
    return tir.const(False, "bool") if result is None else result


def logical_not(x: ExprLike) -> Expr:
    """Whether a bool does not hold."""
    return tir.call("not", as_bool(x, "logical_not"))


def exp(x: ExprLike) -> Expr:
    """e to the power of a float."""
    return _intrinsic("exp", x)


def log(x: ExprLike) -> Expr:
    """The natural logarithm of a float."""
    return _intrinsic("log", x)


def sqrt(x: ExprLike) -> Expr:
    """The square root of a float."""
    return _intrinsic("sqrt", x)


def rsqrt(x: ExprLike) -> Expr:
    """One over the square root of a float."""
    return _intrinsic("rsqrt", x)


def tanh(x: ExprLike) -> Expr:
    """The hyperbolic tangent of a float."""
    return _intrinsic("tanh", x)


def erf(x: ExprLike) -> Expr:
    """The error function of a float."""
    return _intrinsic("erf", x)


def sigmoid(x: ExprLike) -> Expr:
    """1 / (1 + exp(-x)) of a float."""
    return _intrinsic("sigmoid", x)


def abs(x: ExprLike) -> Expr:  # noqa: A001
    """The absolute value of a number."""
    given = as_scalar(x, "the argument of abs")
    if given.dtype == "bool":
        raise TypeError("abs takes a number, not bool; te.cast it")
    return tir.call("abs", given)


def floor(x: ExprLike) -> Expr:
    """The largest whole number that is not above a float."""
    return _intrinsic("floor", x)


def ceil(x: ExprLike) -> Expr:
    """The smallest whole number that is not below a float."""
    return _intrinsic("ceil", x)


def round(x: ExprLike) -> Expr:  # noqa: A001
    """The whole number nearest to a float; halves go to the even one."""
    return _intrinsic("round", x)


def sin(x: ExprLike) -> Expr:
    """The sine of a float in radians."""
    return _intrinsic("sin", x)


def cos(x: ExprLike) -> Expr:
    """The cosine of a float in radians."""
    return _intrinsic("cos", x)


def pow(x: ExprLike, y: ExprLike) -> Expr:  # noqa: A001
    """A float to the power of a float."""
    base, exponent = _pair("pow", x, y)
    return tir.call("pow", _float("pow", base), exponent)


def isnan(x: ExprLike) -> Expr:
    """Whether a float is NaN."""
    return tir.call("isnan", _float("isnan", as_scalar(x, "the argument of isnan")), dtype="bool")


def as_bool(term: ExprLike, what: str) -> Expr:
    """`term` as a bool expression; `what` takes it and is named in the message."""
    refuse_python_bool(term, f"an argument of {what}")
    given = as_scalar(term, f"an argument of {what}")
    if given.dtype != "bool":
        raise TypeError(f"{what} takes bools, not {given.dtype}; compare it, or te.cast(value, 'bool')")
    return given


def refuse_python_bool(value: object, what: str) -> None:
    """Refuse what `x[i] == 0` gives, which says nothing of the element; `what` names it in the message."""
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(
            f"{what} is {bool(value)}, a value of Python: == and != compare the expressions themselves; use te.eq or "
            f"te.ne, or te.const({bool(value)}) for a literal"
        )


def _binary(op: BinaryOp, what: str, a: ExprLike, b: ExprLike) -> Expr:
    return binary(op, *_pair(what, a, b))


def _pair(what: str, a: ExprLike, b: ExprLike) -> tuple[Expr, Expr]:
    """Two values in one dtype: a number takes that of an expression, and of two numbers the wider."""
    x, y = as_scalar(a, f"an argument of {what}"), as_scalar(b, f"an argument of {what}")
    if x.dtype == y.dtype:
        return x, y
    literal_x, literal_y = isinstance(x, Const) and not isinstance(a, Expr), isinstance(y, Const)
    literal_y = literal_y and not isinstance(b, Expr)
    if literal_x and literal_y:
        literal_x = x.dtype != "float32"
    number, dtype = (a, y.dtype) if literal_x else (b, x.dtype)
    if not (literal_x or literal_y) or not _holds(dtype, number):  # type: ignore[arg-type]
        raise TypeError(f"{what}: operands have dtypes {x.dtype} and {y.dtype}; te.cast one of them")
    fitting = tir.const(number, dtype)  # type: ignore[arg-type]
    return (fitting, y) if literal_x else (x, fitting)


def _holds(dtype: str, value: int | float | bool) -> bool:
    """Whether a literal of `dtype` can have this value."""
    if dtype == "bool":
        return isinstance(value, bool)
    if dtype in FLOATS:
        return True
    if isinstance(value, float) and not value.is_integer():
        return False
    info = np.iinfo(dtype)
    return bool(info.min <= value <= info.max)


def _float(what: str, given: Expr) -> Expr:
    if given.dtype not in FLOATS:
        raise TypeError(f"{what} takes floats, not {given.dtype}; te.cast(value, 'float32')")
    return given


def _intrinsic(name: str, x: ExprLike) -> Expr:
    given = as_expr(float(x)) if isinstance(x, int) and not isinstance(x, bool) else x
    return tir.call(name, _float(name, as_scalar(given, f"the argument of {name}")))
