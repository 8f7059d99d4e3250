"""Tensor expressions: say what each element is, get a `PrimFunc` with one block per tensor.

    n = Var("n", lower=1)
    x, w = placeholder((n, 784), "float32", "x"), placeholder((784, 10), "float32", "w")
    k = reduce_axis(784, "k")
    y = compute((n, 10), lambda i, j: sum(x[i, k] * w[k, j], k), name="y")
    func = create_prim_func([x, w, y], "dense")

A tensor is a `Buffer` that remembers how it is computed, so reading one (`x[i, k]`) is an ordinary `Load`. Elements are
scalar expressions: Python's arithmetic and order comparisons, the functions below, and reads whose indices may be read
from other tensors (a gather: `x[cast(index[i], "int64"), j]`). A `Var` is a symbolic dim.

A reduction is the whole body of a `compute`. `sum`, `prod`, `max` and `min` become one block; `argmax`, `argmin`, `any`
and `all` become several that every schedule, the interpreter and code generation know already.

`register_onnx` makes such a function the meaning of an operator of ONNX models; docs/tutorials/custom_operator.md shows
how.
"""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar

import numpy as np

from kedge.compiler.errors import CompileError
from kedge.compiler.tir import expr as tir
from kedge.compiler.tir.expr import (
    COMPARISONS,
    INDEX_DTYPE,
    LOGICAL,
    Binary,
    BinaryOp,
    Cast,
    Combiner,
    Const,
    Dim,
    Expr,
    ExprLike,
    Load,
    Select,
    Var,
    as_expr,
    binary,
    identity,
)
from kedge.compiler.tir.regions import access_regions
from kedge.compiler.tir.simplify import over, simplify
from kedge.compiler.tir.stmt import Block, Buffer, For, IterVar, PrimFunc, Stmt, Store
from kedge.compiler.tir.visitor import children, free_vars, loads, replace_buffers_expr, seq, substitute_expr

if TYPE_CHECKING:
    from kedge.compiler.ops.custom import OnnxOperator, TensorFunction

__all__ = [
    "ReduceAxis", "Tensor", "Var", "abs", "all", "any", "argmax", "argmin", "cast", "ceil", "compute", "const", "cos",
    "create_prim_func", "eq", "erf", "exp", "floor", "isnan", "log", "logical_and", "logical_not", "logical_or", "max",
    "maximum", "min", "minimum", "ne", "onnx_operator", "placeholder", "pow", "prod", "reduce_axis", "register_onnx",
    "round", "rsqrt", "select", "sigmoid", "sin", "sqrt", "sum", "tanh", "unregister_onnx", "where",
]  # fmt: skip

#: The element types that kernels compute with or store.
DTYPES: Final = frozenset(
    {"bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
)
_INTEGER_OPS: Final = frozenset({"floordiv", "floormod", "truncdiv", "truncmod"})

Indices: TypeAlias = "ExprLike | tuple[ExprLike, ...]"


@dataclass(frozen=True, slots=True, eq=False)
class ReduceAxis(Var):
    """A variable to reduce over, running over `[0, extent)`."""

    extent: Dim = 0


@dataclass(frozen=True, slots=True, eq=False)
class Reduction(Expr):
    """`value` over all of `axes`. Only as the root of a `compute` body."""

    combiner: Combiner
    value: Expr
    axes: tuple[ReduceAxis, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Reduce(Reduction):
    """`value` combined over `axes`, starting from the combiner's identity."""

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The dtype of `value`, in which it is accumulated."""
        return self.value.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Position(Reduction):
    """Where the extreme of `value` is: `compute` makes two reductions of it."""

    last: bool = False

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """That of an index."""
        return INDEX_DTYPE


@dataclass(frozen=True, slots=True, eq=False)
class Truth(Reduction):
    """Whether any ("max") or each ("min") of the bools `value` holds: `compute` reduces them as numbers."""

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """It is a bool."""
        return "bool"


@dataclass(frozen=True, slots=True, eq=False)
class Placeholder:
    """A tensor given from outside."""


@dataclass(frozen=True, slots=True, eq=False)
class Compute:
    """A tensor whose element at `axes` is `body`: a scalar expression, or a `Reduce` of one."""

    axes: tuple[Var, ...]
    body: Expr

    @property
    def value(self) -> Expr:
        """The scalar under the reduction, or the body itself."""
        return self.body.value if isinstance(self.body, Reduce) else self.body

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The tensors that the body reads, each once, in order of appearance."""
        sources = (load.buffer for load in loads(self.value))
        return tuple(dict.fromkeys(source for source in sources if isinstance(source, Tensor)))


@dataclass(frozen=True, slots=True, eq=False)
class Tensor(Buffer):
    """A tensor and how it comes to be. `t[i, j]` reads one element."""

    op: Placeholder | Compute = Placeholder()

    @property
    def buffer(self) -> Buffer:
        """The buffer that loads of this tensor name (the tensor itself; functions get plain copies)."""
        return self

    def __getitem__(self, indices: Indices) -> Load:
        given = indices if isinstance(indices, tuple) else (indices,)
        if len(given) != len(self.shape):
            raise IndexError(f"{self.name} has {len(self.shape)} dims but was given {len(given)} indices")
        exprs = tuple(_scalar(index, f"an index of {self.name}") for index in given)
        for index in exprs:
            if index.dtype != INDEX_DTYPE:
                raise TypeError(f"index of {self.name} is {index.dtype}; cast it: te.cast(value, {INDEX_DTYPE!r})")
        return Load(self, exprs)

    def at(self, indices: Sequence[ExprLike]) -> Load:
        """The element at a sequence of indices; also reads a tensor without dims: `t.at(())`."""
        return self[tuple(indices)]


def placeholder(shape: Sequence[Dim], dtype: str, name: str) -> Tensor:
    """A tensor given from outside.

    Raises:
        TypeError: a dim is neither an int nor an int64 expression, or the dtype is none that kernels compute with.
        CompileError: a dim is negative.
    """
    return Tensor(name, _dims(shape, name), _dtype(dtype, name))


def reduce_axis(extent: Dim, name: str = "k") -> ReduceAxis:
    """A variable running over `[0, extent)`, for the reductions.

    A symbolic extent must be at least 1 when the function runs: a loop without iterations initialises nothing.
    """
    return ReduceAxis(name, extent=_dims((extent,), name)[0])


# Reductions -----------------------------------------------------------------------------------------------------------


def sum(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The sum of `value` over `axis`, accumulated in the dtype of `value`; 0 where there is nothing to add."""
    return _reduce("sum", "add", value, axis)


def prod(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    """The product of `value` over `axis`; 1 where there is nothing to multiply."""
    return _reduce("prod", "mul", value, axis)


def max(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The largest `value` over `axis` (NaN wins); the dtype's lowest value where there is none."""
    return _reduce("max", "max", value, axis)


def min(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """The smallest `value` over `axis` (NaN wins); the dtype's highest value where there is none."""
    return _reduce("min", "min", value, axis)


def argmax(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis], *, select_last: bool = False) -> Expr:
    """The int64 index over `axis` of the largest `value`, as numpy and ONNX give it.

    The first of several equal ones wins (the last with `select_last`), and a NaN wins over every number. Over several
    axes it is the position in row-major order, the first axis outermost.

    It takes two reductions: the largest value, then the least index that reaches it. One reduction over pairs would
    read the data once, but no combiner, interpreter or rule knows pairs, and a pair does not vectorize; a maximum and a
    minimum do. Both have to see the same numbers, so a `value` that is computed, not read, gets a tensor of its own
    first.

    Raises:
        CompileError: an axis has no elements; there is no index to give.
    """
    return _position("argmax", "max", value, axis, select_last)


def argmin(value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis], *, select_last: bool = False) -> Expr:
    """The int64 index over `axis` of the smallest `value`; otherwise as `argmax`."""
    return _position("argmin", "min", value, axis, select_last)


def any(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """Whether a bool `value` holds anywhere over `axis`; false where there is none."""
    return _truth("any", "max", value, axis)


def all(value: Expr, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:  # noqa: A001
    """Whether a bool `value` holds everywhere over `axis`; true where there is none."""
    return _truth("all", "min", value, axis)


# Scalars --------------------------------------------------------------------------------------------------------------


def const(value: int | float | bool, dtype: str | None = None) -> Expr:
    """A literal: int64, float32 or bool by its Python type, or of `dtype`.

    Raises:
        TypeError: `dtype` cannot hold the value.
    """
    if dtype is None:
        return _scalar(value, "a literal")
    if not _holds(_dtype(dtype, "a literal"), value):
        raise TypeError(f"{value!r} is no {dtype}; give a value that fits, or te.cast an expression")
    return tir.const(value, dtype)


def cast(value: ExprLike, dtype: str) -> Expr:
    """`value` in `dtype`. Floats become integers by dropping the fraction, numbers become bool by comparing with 0."""
    given = _scalar(value, "the value of cast")
    if given.dtype == _dtype(dtype, "cast"):
        return given
    if isinstance(given, Const) and (dtype == "bool" or _holds(dtype, given.value)):
        return tir.const(given.value, dtype)
    return Binary("ne", given, tir.const(0, given.dtype)) if dtype == "bool" else Cast(given, dtype)


def select(condition: ExprLike, a: ExprLike, b: ExprLike) -> Expr:
    """`a` where the bool `condition` holds, else `b`. Only the chosen side is evaluated: it may guard a read.

    Raises:
        TypeError: the condition is no bool, or the sides have different dtypes.
    """
    test = _scalar(condition, "the condition of select")
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
    return tir.logical_and(*(_bool("logical_and", term) for term in terms))


def logical_or(*terms: ExprLike) -> Expr:
    """Whether one of the bools `terms` holds; the later ones are evaluated only where those before them do not."""
    result: Expr | None = None
    for term in terms:
        each = _bool("logical_or", term)
        result = each if result is None else binary("or", result, each)
    return tir.const(False, "bool") if result is None else result


def logical_not(x: ExprLike) -> Expr:
    """Whether a bool does not hold."""
    return tir.call("not", _bool("logical_not", x))


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
    given = _scalar(x, "the argument of abs")
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
    return tir.call("isnan", _float("isnan", _scalar(x, "the argument of isnan")), dtype="bool")


# Tensors and functions ------------------------------------------------------------------------------------------------


def compute(shape: Sequence[Dim], fcompute: Callable[..., ExprLike], *, name: str = "compute") -> Tensor:
    """The tensor of `shape` whose element at `(i, j, …)` is `fcompute(i, j, …)`.

    The loops take the names of the parameters of `fcompute` (`i0, i1, …` where it takes `*indices`). Its result is a
    scalar expression, or a reduction of one: `sum(a[i, k] * b[k, j], k)`.

    Raises:
        TypeError: `fcompute` takes another number of indices, gives no scalar, or applies an operation to a dtype that
            does not have it.
        CompileError: a reduction is only a part of the element, or a reduce axis is used outside of its reduction.
    """
    dims = _dims(shape, name)
    axes = tuple(Var(axis) for axis in _axis_names(fcompute, len(dims), name))
    body = _scalar(fcompute(*axes), f"the element of {name}")
    _check_element(body, name)
    if isinstance(body, Position):
        return _staged_position(dims, axes, body, name)
    if isinstance(body, Truth):
        return _staged_truth(dims, axes, body, name)
    return Tensor(name, dims, body.dtype, op=Compute(axes, body))


def create_prim_func(tensors: Sequence[Tensor], name: str, attrs: Mapping[str, Any] | None = None) -> PrimFunc:
    """The function that computes the outputs among `tensors` (last) from the placeholders (first).

    Computes in between become allocations, each with a block of its own, in data-flow order. `symbols` are the
    variables in the shapes of `tensors`, in order of appearance, and then those that only computing depends on.
    Buffers and blocks get unique names.

    Raises:
        CompileError: an output stands before a placeholder, there is no output, or a placeholder that is read or a
            symbol that is used is missing from `tensors`.
        TypeError: a parameter is no tensor.
    """
    for given in tensors:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: a {type(given).__name__} is among the parameters; give te tensors")
    outputs = [t for t in tensors if isinstance(t.op, Compute)]
    n_inputs = len(tensors) - len(outputs)
    mixed = builtins.any(isinstance(t.op, Compute) for t in tensors[:n_inputs])
    if not outputs or mixed or len(set(tensors)) < len(tensors):
        raise CompileError(f"{name}: give each placeholder once, then each output once (at least one)")
    order = dataflow_order(outputs)
    for tensor in order:
        if isinstance(tensor.op, Placeholder) and tensor not in tensors:
            raise CompileError(f"{name}: placeholder {tensor.name!r} is read but missing from the parameters")
    names = _Names()
    buffers: dict[Buffer, Buffer] = {}
    for tensor in (*tensors, *order):
        if tensor not in buffers:
            buffers[tensor] = Buffer(names.unique(tensor.name), tensor.shape, tensor.dtype)
    blocks = [_block_nest(t, t.op, buffers) for t in order if isinstance(t.op, Compute)]
    allocs = tuple(buffers[t] for t in order if isinstance(t.op, Compute) and t not in tensors)
    params = tuple(buffers[t] for t in tensors)
    shown = dict.fromkeys(v for t in tensors for d in t.shape if isinstance(d, Expr) for v in free_vars(d))
    symbols = tuple(dict.fromkeys((*shown, *(v for t in order for v in _symbols_in(t)))))
    return PrimFunc(
        name, params, len(outputs), seq(*blocks), allocs, symbols, MappingProxyType(dict(attrs or {}))
    )  # fmt: skip


_Function = TypeVar("_Function", bound="Callable[..., Tensor | tuple[Tensor, ...]]")


def register_onnx(domain: str, op_type: str, function: TensorFunction) -> OnnxOperator:
    """Make `function` the meaning of an operator of a custom ONNX domain: models that use it import from then on.

    Args:
        domain: of the operator in the model's nodes; not ONNX's own.
        op_type: its name there.
        function: called as `function(tensors, **attributes)` with one te tensor per input of the node (dims may be
            symbolic) and the node's attributes (int, float, str, or a tuple of them); gives a tensor, or a tuple of
            them for several results. Shapes, dtypes, the reference, the kernels and what they fuse with all follow from
            it. It is called more than once, and must give the same each time.

    Returns:
        The registration: `unregister()` ends it, and so does leaving it as a context manager.

    Raises:
        CompileError: the domain is ONNX's own, or the operator is registered already.
        TypeError: `function` cannot be called like that.
    """
    from kedge.compiler.ops import custom

    return custom.register(domain, op_type, function)


def onnx_operator(domain: str, op_type: str) -> Callable[[_Function], _Function]:
    """`register_onnx` as a decorator."""

    def declare(function: _Function) -> _Function:
        register_onnx(domain, op_type, function)
        return function

    return declare


def unregister_onnx(domain: str, op_type: str) -> None:
    """Forget an operator; raises `CompileError` where it is not registered."""
    from kedge.compiler.ops import custom

    custom.unregister(domain, op_type)


def _symbols_in(tensor: Tensor) -> Iterator[Var]:
    """The symbolic dims that computing a tensor depends on."""
    extents = list(tensor.shape)
    own: tuple[Var, ...] = ()
    if isinstance(tensor.op, Compute):
        reduced = tensor.op.body.axes if isinstance(tensor.op.body, Reduce) else ()
        own = (*tensor.op.axes, *reduced)
        extents += [axis.extent for axis in reduced]
        yield from (var for var in free_vars(tensor.op.value) if var not in own)
    yield from (var for dim in extents if isinstance(dim, Expr) for var in free_vars(dim))


class _Names:
    """Hands out each name once: a second `x` becomes `x_1`."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def unique(self, name: str) -> str:
        candidate, count = name, 0
        while candidate in self._used:
            count += 1
            candidate = f"{name}_{count}"
        self._used.add(candidate)
        return candidate


def _scalar(value: object, what: str) -> Expr:
    """`value` as an expression; `what` names it in the message."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        return as_expr(value)
    if isinstance(value, Tensor):
        indices = ", ".join("ijklmn"[: len(value.shape)])
        raise TypeError(f"{what} is the whole tensor {value.name}; read an element of it: {value.name}[{indices}]")
    raise TypeError(f"{what} is of type {type(value).__name__}; give a scalar expression or a number")


def _dims(shape: Sequence[Dim], name: str) -> tuple[Dim, ...]:
    if isinstance(shape, (int, str, Expr)) or not hasattr(shape, "__iter__"):
        raise TypeError(f"the shape of {name} is {shape!r}; give a tuple of dims")
    dims = tuple(int(dim) if isinstance(dim, np.integer) else dim for dim in shape)
    for dim in dims:
        if isinstance(dim, bool) or not isinstance(dim, (int, Expr)):
            raise TypeError(f"dim {dim!r} of {name} is a {type(dim).__name__}; give an int or a symbolic dim (te.Var)")
        if isinstance(dim, Expr) and dim.dtype != INDEX_DTYPE:
            raise TypeError(f"a dim of {name} is {dim.dtype}; symbolic dims are {INDEX_DTYPE}")
        if isinstance(dim, int) and dim < 0:
            raise CompileError(f"dim {dim} of {name} is negative")
    return dims


def _dtype(dtype: str, what: str) -> str:
    if dtype not in DTYPES:
        raise TypeError(f"{what} has the unknown dtype {dtype!r}; give one of {', '.join(sorted(DTYPES))}")
    return dtype


def _holds(dtype: str, value: int | float | bool) -> bool:
    """Whether a literal of `dtype` can have this value."""
    if dtype == "bool":
        return isinstance(value, bool)
    if dtype.startswith("float"):
        return True
    if isinstance(value, float) and not value.is_integer():
        return False
    info = np.iinfo(dtype)
    return bool(info.min <= value <= info.max)


def _pair(what: str, a: ExprLike, b: ExprLike) -> tuple[Expr, Expr]:
    """Two values in one dtype: a number takes that of an expression, and of two numbers the wider."""
    x, y = _scalar(a, f"an argument of {what}"), _scalar(b, f"an argument of {what}")
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


def _binary(op: BinaryOp, what: str, a: ExprLike, b: ExprLike) -> Expr:
    return binary(op, *_pair(what, a, b))


def _bool(what: str, term: ExprLike) -> Expr:
    given = _scalar(term, f"an argument of {what}")
    if given.dtype != "bool":
        raise TypeError(f"{what} takes bools, not {given.dtype}; compare it, or te.cast(value, 'bool')")
    return given


def _float(what: str, given: Expr) -> Expr:
    if not given.dtype.startswith("float"):
        raise TypeError(f"{what} takes floats, not {given.dtype}; te.cast(value, 'float32')")
    return given


def _intrinsic(name: str, x: ExprLike) -> Expr:
    given = as_expr(float(x)) if isinstance(x, int) and not isinstance(x, bool) else x
    return tir.call(name, _float(name, _scalar(given, f"the argument of {name}")))


def _reduced(what: str, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> tuple[Expr, list[ReduceAxis]]:
    """The value and the axes of a reduction, checked."""
    given = _scalar(value, f"the value of {what}")
    axes = [axis] if isinstance(axis, Expr) else list(axis)
    if not axes:
        raise CompileError(f"{what}: a reduction needs at least one axis", hint="make one with te.reduce_axis(extent)")
    for each in axes:
        if not isinstance(each, ReduceAxis):
            shown = each.name if isinstance(each, Var) else type(each).__name__
            raise TypeError(f"{what} over {shown}, which is no reduce axis; make one with te.reduce_axis(extent)")
    if len(set(axes)) < len(axes):
        twice = next(each.name for each in axes if axes.count(each) > 1)
        raise CompileError(f"{what}: axis {twice} is reduced twice", hint="give each axis once")
    return given, axes


def _reduce(what: str, combiner: Combiner, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    given, axes = _reduced(what, value, axis)
    if given.dtype == "bool":
        raise TypeError(f"{what} over bool is not defined; cast to int64 first, or use te.any or te.all")
    return identity(combiner, given.dtype) if _is_empty(axes) else Reduce(combiner, given, tuple(axes))


def _position(
    what: str, combiner: Combiner, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis], last: bool
) -> Expr:
    given, axes = _reduced(what, value, axis)
    if builtins.all(isinstance(each.extent, int) and each.extent == 1 for each in axes):
        return as_expr(0)
    if _is_empty(axes):
        raise CompileError(f"{what} over an axis without elements has no result", hint="give it an extent of 1 or more")
    return Position(combiner, cast(given, "uint8") if given.dtype == "bool" else given, tuple(axes), last)


def _truth(what: str, combiner: Combiner, value: ExprLike, axis: ReduceAxis | Sequence[ReduceAxis]) -> Expr:
    given, axes = _reduced(what, value, axis)
    _bool(what, given)
    return tir.const(combiner == "min", "bool") if _is_empty(axes) else Truth(combiner, given, tuple(axes))


def _is_empty(axes: Sequence[ReduceAxis]) -> bool:
    return builtins.any(isinstance(each.extent, int) and each.extent == 0 for each in axes)


def _staged_position(dims: tuple[Dim, ...], axes: tuple[Var, ...], body: Position, name: str) -> Tensor:
    """The value where it is computed, its extreme, and the least (or greatest) index that reaches it."""
    value = body.value
    if not _is_stored(value):
        inner = tuple(Var(axis.name) for axis in body.axes)
        element = substitute_expr(value, dict(zip(body.axes, inner, strict=True)))
        if value.dtype == "float16":  # where this is inlined it has to be rounded as if it had been stored
            element = Cast(Cast(element, "float32"), "float16")
        shape = (*dims, *(axis.extent for axis in body.axes))
        value = Tensor(f"{name}_value", shape, value.dtype, op=Compute((*axes, *inner), element))[(*axes, *body.axes)]
    best = Tensor(f"{name}_best", dims, value.dtype, op=Compute(axes, Reduce(body.combiner, value, body.axes)))
    hit = tir.eq(value, best[axes])
    if value.dtype.startswith("float"):
        hit = binary("or", hit, tir.call("isnan", value, dtype="bool"))
    index, total = as_expr(0), as_expr(1)
    for axis in body.axes:
        index, total = index * axis.extent + axis, total * axis.extent
    missed = as_expr(-1) if body.last else total
    found = Reduce("max" if body.last else "min", Select(hit, simplify(index), simplify(missed)), body.axes)
    return Tensor(name, dims, INDEX_DTYPE, op=Compute(axes, found))


def _is_stored(value: Expr) -> bool:
    """Whether `value` is the same number however often it is computed, rounding included."""
    if isinstance(value, Cast):
        return _is_stored(value.value)
    return isinstance(value, (Load, Const)) or not value.dtype.startswith("float")


def _staged_truth(dims: tuple[Dim, ...], axes: tuple[Var, ...], body: Truth, name: str) -> Tensor:
    found = Reduce(body.combiner, Cast(body.value, "uint8"), body.axes)
    hits = Tensor(f"{name}_hits", dims, "uint8", op=Compute(axes, found))
    return Tensor(name, dims, "bool", op=Compute(axes, Binary("ne", hits[axes], tir.const(0, "uint8"))))


def _axis_names(fcompute: Callable[..., ExprLike], rank: int, name: str) -> list[str]:
    try:
        signature = inspect.signature(fcompute)
    except (TypeError, ValueError):
        return [f"i{dim}" for dim in range(rank)]
    parameters = [p for p in signature.parameters.values() if p.default is p.empty]
    if len(parameters) == rank and builtins.all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
        return [p.name for p in parameters]
    try:
        signature.bind(*range(rank))
    except TypeError:
        raise TypeError(
            f"{name} has {rank} dims, but its function takes {signature}; it needs one index each"
        ) from None
    return [f"i{dim}" for dim in range(rank)]


def _check_element(body: Expr, name: str) -> None:
    """Refuse what would otherwise come to light when the function is verified or compiled."""
    reduced = body.axes if isinstance(body, Reduction) else ()
    seen: set[int] = set()
    used: set[Var] = set()
    stack = [body.value if isinstance(body, Reduction) else body]
    while stack:
        expr = stack.pop()
        if id(expr) in seen:
            continue
        seen.add(id(expr))
        if isinstance(expr, Reduction):
            raise CompileError(f"{name}: a reduction must be the whole body of a compute", hint="compute it separately")
        if isinstance(expr, ReduceAxis) and expr not in reduced:
            raise CompileError(
                f"{name}: reduce axis {expr.name} is used, but not reduced over", hint=f"te.sum(…, {expr.name})"
            )
        if isinstance(expr, Var):
            used.add(expr)
        if isinstance(expr, Binary):
            _check_binary(expr, name)
        stack.extend(children(expr))
    if isinstance(body, Reduction) and next(loads(body.value), None) is None:
        return  # counting, or a literal in place of a tensor
    for axis in reduced:
        if axis not in used and not (isinstance(axis.extent, int) and axis.extent == 1):
            raise CompileError(
                f"{name}: its reduction does not use the axis {axis.name}",
                hint="index a tensor with it, or leave it out",
            )


def _check_binary(expr: Binary, name: str) -> None:
    dtype, op = expr.a.dtype, expr.op
    if op in LOGICAL and dtype != "bool":
        raise TypeError(f"{name}: {op} of {dtype}; compare it, or te.cast(value, 'bool')")
    if op in LOGICAL or op in COMPARISONS:
        return
    if dtype == "bool":
        raise TypeError(f"{name}: {op} of bools; te.cast them to a number first")
    if op == "div" and not dtype.startswith("float"):
        raise TypeError(f"{name}: true division of {dtype}; use //, or te.cast(value, 'float32')")
    if op in _INTEGER_OPS and dtype.startswith("float"):
        raise TypeError(f"{name}: {op} of {dtype}; use te.floor(a / b)")


def dataflow_order(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor that `outputs` need and they themselves, producers first."""
    order: dict[Tensor, None] = {}
    stack: list[tuple[Tensor, bool]] = [(t, False) for t in reversed(outputs)]
    while stack:
        tensor, expanded = stack.pop()
        if tensor in order:
            continue
        if expanded or isinstance(tensor.op, Placeholder):
            order[tensor] = None
        else:
            stack.append((tensor, True))
            stack.extend((source, False) for source in reversed(tensor.op.inputs))
    return list(order)


def _block_nest(tensor: Tensor, op: Compute, buffers: Mapping[Buffer, Buffer]) -> Stmt:
    """Serial loops over the axes of `tensor`, and over those it reduces, around its block."""
    spatial = list(zip(op.axes, tensor.shape, strict=True))
    reduced = [(axis, axis.extent) for axis in op.body.axes] if isinstance(op.body, Reduce) else []
    loops = [(Var(axis.name), as_expr(extent)) for axis, extent in (*spatial, *reduced)]
    kinds: list[Literal["spatial", "reduce"]] = ["spatial"] * len(spatial)
    kinds += ["reduce"] * len(reduced)
    iters = tuple(IterVar(Var(f"v{var.name}"), extent, kind) for (var, extent), kind in zip(loops, kinds, strict=True))
    mapping: dict[Var, Expr] = {a: it.var for (a, _), it in zip((*spatial, *reduced), iters, strict=True)}
    value = replace_buffers_expr(substitute_expr(op.value, mapping), buffers)
    value = simplify(value, {it.var: over(it.extent) for it in iters})
    target, indices = buffers[tensor], tuple(it.var for it in iters[: len(spatial)])
    init: Stmt | None = None
    if isinstance(op.body, Reduce):
        init = Store(target, indices, identity(op.body.combiner, tensor.dtype))
        combiner: BinaryOp = op.body.combiner
        value = binary(combiner, Load(target, indices), value)
    body = Store(target, indices, value)
    reads, writes = access_regions(body, init)
    stmt: Stmt = Block(target.name, iters, tuple(var for var, _ in loops), reads, writes, body, init)
    for var, extent in reversed(loops):
        stmt = For(var, extent, "serial", stmt)
    return stmt
