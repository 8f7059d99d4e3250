"""Scalar expressions of the tensor IR; symbolic dims are the same expressions over int64.

Nodes are immutable and compared by identity; `structural.equal` compares by structure. Python operators build
nodes (`i * 16 + j`), `==` stays identity: write `eq(a, b)` for the comparison node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from kedge.compiler.dtypes import FLOATS

if TYPE_CHECKING:
    from kedge.compiler.tir.stmt import Buffer

BinaryOp = Literal[
    "add", "sub", "mul", "div", "floordiv", "floormod", "truncdiv", "truncmod", "min", "max",
    "and", "or", "eq", "ne", "lt", "le", "gt", "ge",
]  # fmt: skip
#: The operations that reductions combine values with.
Combiner = Literal["add", "mul", "max", "min"]
COMPARISONS: frozenset[str] = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
LOGICAL: frozenset[str] = frozenset({"and", "or"})
BINARY_OPS: frozenset[str] = frozenset(get_args(BinaryOp))

#: Scalar intrinsics that `Call` may name: each is unary unless its comment says otherwise.
INTRINSICS: frozenset[str] = frozenset(
    {"exp", "log", "sqrt", "rsqrt", "tanh", "erf", "sigmoid", "abs", "floor", "ceil", "round", "sin", "cos",
     "not", "isnan", "pow"}  # pow takes two
)  # fmt: skip

INDEX_DTYPE = "int64"


class Expr:
    """A scalar value. `dtype` is a numpy dtype name ("float32", "int64", "bool", …)."""

    __slots__ = ()
    dtype: str

    def __add__(self, other: ExprLike) -> Expr:
        return binary("add", self, other)

    def __radd__(self, other: ExprLike) -> Expr:
        return binary("add", other, self)

    def __sub__(self, other: ExprLike) -> Expr:
        return binary("sub", self, other)

    def __rsub__(self, other: ExprLike) -> Expr:
        return binary("sub", other, self)

    def __mul__(self, other: ExprLike) -> Expr:
        return binary("mul", self, other)

    def __rmul__(self, other: ExprLike) -> Expr:
        return binary("mul", other, self)

    def __truediv__(self, other: ExprLike) -> Expr:
        return binary("div", self, other)

    def __rtruediv__(self, other: ExprLike) -> Expr:
        return binary("div", other, self)

    def __floordiv__(self, other: ExprLike) -> Expr:
        return binary("floordiv", self, other)

    def __rfloordiv__(self, other: ExprLike) -> Expr:
        return binary("floordiv", other, self)

    def __mod__(self, other: ExprLike) -> Expr:
        return binary("floormod", self, other)

    def __rmod__(self, other: ExprLike) -> Expr:
        return binary("floormod", other, self)

    def __neg__(self) -> Expr:
        return binary("sub", const(0, self.dtype), self)

    def __lt__(self, other: ExprLike) -> Expr:
        return binary("lt", self, other)

    def __le__(self, other: ExprLike) -> Expr:
        return binary("le", self, other)

    def __gt__(self, other: ExprLike) -> Expr:
        return binary("gt", self, other)

    def __ge__(self, other: ExprLike) -> Expr:
        return binary("ge", self, other)

    def __bool__(self) -> bool:
        raise TypeError(
            "a kedge expression has no truth value while compiling; use select(condition, a, b), "
            "or tir.simplify.prove(condition) for symbolic dims"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Const(Expr):
    """A literal. `value` is a Python int, float or bool that fits `dtype`."""

    value: int | float | bool
    dtype: str = INDEX_DTYPE


@dataclass(frozen=True, slots=True, eq=False)
class Var(Expr):
    """A scalar variable: a loop variable, a block's iteration variable, or a symbolic dim.

    A symbolic dim is an int64 Var with `lower` (inclusive, at least 0) and optionally `upper` (inclusive).
    """

    name: str
    dtype: str = INDEX_DTYPE
    lower: int | None = None
    upper: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Lead(Var):
    """How many elements of a cache line lie before the first one of a parameter: `buffer` is its name.

    A symbol of the function, from 0 to `upper`. Code reads it off the address; what a function means must not depend
    on it, and the interpreter takes 0 unless told.
    """

    buffer: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Binary(Expr):
    """`a op b`. Arithmetic has one dtype on both sides and as result; comparisons and logic give bool.

    `div` is true division of floats; integers use floordiv/floormod (round down) or truncdiv/truncmod (C).
    `min`/`max` of floats propagate NaN, as ONNX and numpy do.
    """

    op: BinaryOp
    a: Expr
    b: Expr

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The dtype of the result."""
        node: Expr = self
        while isinstance(node, Binary):
            if node.op in COMPARISONS or node.op in LOGICAL:
                return "bool"
            node = node.a
        return node.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Cast(Expr):
    """`value` converted to `dtype` (float to int truncates, as C does)."""

    value: Expr
    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class Select(Expr):
    """`a` where `condition` holds, else `b`. Only the chosen side is evaluated: a guarded load is safe."""

    condition: Expr
    a: Expr
    b: Expr

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The dtype of both sides."""
        return self.a.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Call(Expr):
    """A scalar intrinsic of `INTRINSICS` applied to `args`."""

    name: str
    args: tuple[Expr, ...]
    dtype: str


@dataclass(frozen=True, slots=True, eq=False)
class Load(Expr):
    """`buffer[indices]`, one index per dim of the buffer."""

    buffer: Buffer
    indices: tuple[Expr, ...]

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The buffer's element type."""
        return self.buffer.dtype


ExprLike: TypeAlias = Expr | int | float | bool
#: One dim of a shape: a known size, or a symbolic int64 expression.
Dim: TypeAlias = int | Expr


def const(value: int | float | bool, dtype: str = INDEX_DTYPE) -> Const:
    """A literal of `dtype`; the value is converted to the matching Python type."""
    if dtype == "bool":
        return Const(bool(value), dtype)
    return Const(float(value) if dtype in FLOATS else int(value), dtype)


def identity(combiner: Combiner, dtype: str) -> Const:
    """The value that `combiner` leaves alone."""
    if dtype == "bool":
        raise TypeError("a reduction over bool is not defined; cast to int64 first")
    if combiner in ("add", "mul"):
        return const(0 if combiner == "add" else 1, dtype)
    if dtype in FLOATS:
        return const(float("-inf") if combiner == "max" else float("inf"), dtype)
    info = np.iinfo(dtype)
    return const(info.min if combiner == "max" else info.max, dtype)


def as_expr(value: ExprLike, dtype: str | None = None) -> Expr:
    """`value` as a node. A Python number takes `dtype` (default: int64, float32 or bool by its Python type)."""
    if isinstance(value, Expr):
        return value
    if dtype is None:
        dtype = "bool" if isinstance(value, bool) else INDEX_DTYPE if isinstance(value, int) else "float32"
    return const(value, dtype)


def binary(op: BinaryOp, a: ExprLike, b: ExprLike) -> Expr:
    """`a op b`; a Python number takes the dtype of the other side, and two literals fold.

    Raises:
        TypeError: both sides are expressions of different dtypes, or a number has a fraction and the other side is of
            integers.
    """
    if isinstance(a, Expr):
        if not isinstance(b, Expr):
            _check_fraction(op, b, a)
        lhs, rhs = a, as_expr(b, a.dtype)
    else:
        rhs = as_expr(b)
        if isinstance(b, Expr):
            _check_fraction(op, a, b)
        lhs = as_expr(a, rhs.dtype)
    if lhs.dtype != rhs.dtype:
        raise TypeError(f"{op}: operands have dtypes {lhs.dtype} and {rhs.dtype}; cast one of them")
    return Binary(op, lhs, rhs)


def _check_fraction(op: BinaryOp, number: int | float | bool, other: Expr) -> None:
    """Refuse a number that would lose its fraction in the dtype of the expression beside it."""
    if other.dtype in FLOATS or not isinstance(number, (float, np.floating)) or float(number).is_integer():
        return
    name = other.name if isinstance(other, Var) else "value"
    what = f"the element of {other.buffer.name!r}" if isinstance(other, Load) else "the other operand"
    ways = [f"te.cast({name}, 'float32') computes in float32"]
    if op == "mul" and math.isfinite(number):
        part = Fraction(float(number)).limit_denominator(1000)
        if float(part) == number:
            ways.insert(0, f"{name} * {part.numerator} // {part.denominator} rounds down")
    subject = repr(name) if isinstance(other, Var) else what
    raise TypeError(f"{op}: {number!r} is no integer, and {subject} is {other.dtype}; {', '.join(ways)}")


def minimum(a: ExprLike, b: ExprLike) -> Expr:
    """The smaller of two values."""
    return binary("min", a, b)


def maximum(a: ExprLike, b: ExprLike) -> Expr:
    """The larger of two values."""
    return binary("max", a, b)


def eq(a: ExprLike, b: ExprLike) -> Expr:
    """The comparison node `a == b`."""
    return binary("eq", a, b)


def logical_and(*terms: ExprLike) -> Expr:
    """The conjunction of `terms`; true when there are none."""
    if not terms:
        return const(True, "bool")
    result = as_expr(terms[0])
    for term in terms[1:]:
        result = binary("and", result, term)
    return result


def select(condition: Expr, a: ExprLike, b: ExprLike) -> Expr:
    """`a` where `condition`, else `b`; a Python number takes the other side's dtype."""
    if isinstance(a, Expr):
        return Select(condition, a, as_expr(b, a.dtype))
    rhs = as_expr(b)
    return Select(condition, as_expr(a, rhs.dtype), rhs)


def call(name: str, *args: Expr, dtype: str | None = None) -> Expr:
    """The intrinsic `name` of `args`; the result has the first argument's dtype unless given."""
    if name not in INTRINSICS:
        raise ValueError(f"unknown intrinsic {name!r}; known: {', '.join(sorted(INTRINSICS))}")
    return Call(name, args, dtype or args[0].dtype)


def ceildiv(a: ExprLike, b: int) -> Expr:
    """`a / b` rounded up, for a positive `b`."""
    return (as_expr(a) + (b - 1)) // b
