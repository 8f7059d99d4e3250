"""Running a function in numpy: the meaning against which schedules and generated code are tested.

Loops run one iteration at a time, except that a perfect nest around one simple block is evaluated as arrays over the
whole nest (`vectorize=False` turns that off). Reads and writes are checked against the shapes, and memory that was
never written holds NaN (floats) or a conspicuous value (integers), so wrong schedules show.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

from kedge.compiler.dtypes import FLOATS, HALVES, converted
from kedge.compiler.errors import VerifyError
from kedge.compiler.tir.expr import Binary, Call, Cast, Const, Dim, Expr, Lead, Load, Select, Var, as_expr
from kedge.compiler.tir.printer import print_expr, print_shape
from kedge.compiler.tir.stmt import Block, Buffer, For, If, PrimFunc, Seq, Stmt, Store
from kedge.compiler.tir.structural import expr_equal
from kedge.compiler.tir.visitor import free_vars, loads
from kedge.rpc.errors import InputError

Array: TypeAlias = np.ndarray[Any, Any]
#: A scalar, or an array over the loops that are evaluated at once.
Value: TypeAlias = Any
#: The lanes that are active; None is all of them.
Mask: TypeAlias = Any

#: What computes an expression, given the lanes that are active.
_Evaluator: TypeAlias = Callable[[Mask], Value]
_Places: TypeAlias = Callable[[Mask], tuple[Value, ...]]

#: A nest of more iterations than this is taken apart, to bound memory.
_MAX_LANES: Final = 1 << 20


def power(x: Value, y: Value) -> Value:
    """`x ** y`: of floats as C has it; of integers it wraps around.

    A negative power of an integer is the reciprocal without its fraction, so 0 but for 1 and -1; of 0 it is 0, as
    division by 0 gives 0.
    """
    if not np.issubdtype(np.asarray(y).dtype, np.integer):
        return np.power(x, y)
    unit = np.where(np.abs(x) == 1, np.where(np.bitwise_and(y, 1) == 1, x, 1), 0)
    return np.where(np.less(y, 0), unit, np.power(x, np.maximum(y, 0)))


def sigmoid(x: Value) -> Value:
    """`1 / (1 + exp(-x))` of floats; what is below the least normal number in which kernels compute is 0."""
    decayed = np.exp(-np.abs(x))  # never of a large positive number, so nothing overflows
    least = np.finfo("float64" if decayed.dtype == "float64" else "float32").tiny
    decayed = np.where(decayed < least, 0, decayed).astype(decayed.dtype)
    return np.where(x < 0, decayed, 1).astype(decayed.dtype) / (1 + decayed)


_BINARY: Final[Mapping[str, Callable[[Value, Value], Value]]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide,
    "floordiv": np.floor_divide, "floormod": np.mod, "truncmod": np.fmod,
    "min": np.minimum, "max": np.maximum,
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
#: The same of Python's own numbers, as loop variables and indices are: several times as fast as numpy's.
_OF_NUMBERS: Final[Mapping[str, Callable[[int, int], int]]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul,
    "floordiv": operator.floordiv, "floormod": operator.mod, "min": min, "max": max,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_LEAST, _LARGEST = -(1 << 63), (1 << 63) - 1  # beyond these numpy wraps around
_COMBINE: Final[Mapping[str, np.ufunc]] = {
    "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
}  # fmt: skip
#: Where numpy, or ml_dtypes, computes and rounds in several steps, types of 16 bits are widened and rounded once.
_REMAINDERS: Final = frozenset({"floordiv", "floormod", "truncmod"})
_erf = np.frompyfunc(math.erf, 1, 1)


_INTRINSIC: Final[Mapping[str, Callable[..., Value]]] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "tanh": np.tanh, "abs": np.abs, "floor": np.floor,
    "ceil": np.ceil, "round": np.rint, "sin": np.sin, "cos": np.cos, "not": np.logical_not, "isnan": np.isnan,
    "pow": power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": sigmoid,
    "erf": lambda x: np.asarray(_erf(np.asarray(x, "float64")), "float64"),
}  # fmt: skip


def run(
    func: PrimFunc,
    arrays: Sequence[Array],
    symbols: Mapping[str, int] | None = None,
    *,
    vectorize: bool = True,
) -> tuple[Array, ...]:
    """The outputs of `func` for its inputs `arrays`, in the order of its parameters.

    `symbols` gives dims by name; those that are a whole dim of an input follow from its shape.

    Raises:
        InputError: an array is missing, or has another dtype or shape than the parameter; a symbol is unknown.
        VerifyError: a read or write outside a buffer.
    """
    inputs = func.params[: len(func.params) - func.n_outputs]
    if len(arrays) != len(inputs):
        raise InputError(f"{func.name} takes {len(inputs)} inputs, not {len(arrays)}")
    env: dict[Var, Value] = dict(_solve_symbols(func, inputs, arrays, symbols or {}))
    machine = _Machine(env, vectorize)
    for buffer, array in zip(inputs, arrays, strict=True):
        shape = machine.shape(buffer)
        if array.shape != shape or array.dtype.name != buffer.dtype:
            raise InputError(
                f"{func.name}: {buffer.name} is {array.dtype.name}{list(array.shape)}, "
                f"not {buffer.dtype}[{print_shape(buffer.shape)}] = {list(shape)}"
            )
        machine.memory[buffer] = np.ascontiguousarray(array).reshape(shape)
    for buffer in (*func.params[len(inputs) :], *func.allocs):
        machine.memory[buffer] = _unwritten(machine.shape(buffer), buffer.dtype)
    with np.errstate(all="ignore"):
        machine.stmt(func.body)
    return tuple(machine.memory[buffer] for buffer in func.params[len(inputs) :])


def _solve_symbols(
    func: PrimFunc, inputs: Sequence[Buffer], arrays: Sequence[Array], given: Mapping[str, int]
) -> Mapping[Var, int]:
    found: dict[Var, int] = {var: given[var.name] for var in func.symbols if var.name in given}
    for buffer, array in zip(inputs, arrays, strict=True):
        for dim, size in zip(buffer.shape, array.shape, strict=False):
            if isinstance(dim, Var):
                found.setdefault(dim, size)
    found = {**{var: 0 for var in func.symbols if isinstance(var, Lead)}, **found}
    missing = [var.name for var in func.symbols if var not in found]
    if missing:
        raise InputError(f"{func.name}: the value of {', '.join(missing)} does not follow from the inputs; give it")
    return found


def _unwritten(shape: tuple[int, ...], dtype: str) -> Array:
    kind = np.dtype(dtype)
    filler = math.nan if dtype in FLOATS else 85 if kind != np.bool_ else True
    return np.full(shape, filler, kind)


@dataclass(frozen=True, slots=True)
class _Nest:
    """A perfect nest of loops around one block that stores one element, fit to be evaluated at once."""

    loops: tuple[For, ...]
    block: Block
    store: Store
    init: Store | None
    combiner: str | None  # of `store`, where it updates an element in place
    update: Expr  # the value stored, or the one combined with the element


def _as_nest(stmt: Stmt) -> _Nest | None:
    loops: list[For] = []
    while isinstance(stmt, For):
        loops.append(stmt)
        stmt = stmt.body
    if not isinstance(stmt, Block) or not isinstance(stmt.body, Store):
        return None
    if stmt.init is not None and not isinstance(stmt.init, Store):
        return None
    inner = {loop.var for loop in loops}
    if any(var in inner for loop in loops for var in free_vars(loop.extent)):
        return None
    combiner, update = _split_update(stmt.body)
    others = (update, *stmt.body.indices, *stmt.bindings, stmt.predicate)
    if any(load.buffer is stmt.body.buffer for expr in others for load in loads(expr)):
        return None
    return _Nest(tuple(loops), stmt, stmt.body, stmt.init, combiner, update)


def _split_update(store: Store) -> tuple[str | None, Expr]:
    value = store.value
    if isinstance(value, Binary) and value.op in _COMBINE:
        for own, other in ((value.a, value.b), (value.b, value.a)):
            if isinstance(own, Load) and own.buffer is store.buffer:
                same = all(expr_equal(a, b) for a, b in zip(own.indices, store.indices, strict=True))
                return (value.op, other) if same else (None, value)
    return None, value


class _Machine:
    """Memory and variables of one run."""

    def __init__(self, env: dict[Var, Value], vectorize: bool) -> None:
        self.env = env
        self.memory: dict[Buffer, Array] = {}
        self.vectorize = vectorize
        self._nests: dict[int, _Nest | None] = {}
        self._evaluators: dict[Expr, _Evaluator] = {}
        self._places: dict[tuple[Buffer, tuple[Expr, ...]], _Places] = {}

    def shape(self, buffer: Buffer) -> tuple[int, ...]:
        return tuple(self.dim(dim) for dim in buffer.shape)

    def dim(self, dim: Dim) -> int:
        return int(self.expr(as_expr(dim), None))

    # Statements -------------------------------------------------------------------------------------------------

    def stmt(self, stmt: Stmt) -> None:
        match stmt:
            case Seq(stmts=stmts):
                for sub in stmts:
                    self.stmt(sub)
            case For():
                self.loop(stmt)
            case Block():
                self.block(stmt)
            case If(condition=condition, then=then, orelse=orelse):
                if self.expr(condition, None):
                    self.stmt(then)
                elif orelse is not None:
                    self.stmt(orelse)
            case Store():
                self.write(stmt, self.expr(stmt.value, None))

    def loop(self, loop: For) -> None:
        if self.vectorize and self.try_nest(loop):
            return
        for value in range(self.dim(loop.extent)):
            self.env[loop.var] = value
            self.stmt(loop.body)

    def block(self, block: Block) -> None:
        values = [self.expr(binding, None) for binding in block.bindings]
        if not self.expr(block.predicate, None):
            return
        self.env.update((it.var, value) for it, value in zip(block.iters, values, strict=True))
        first = all(v == 0 for it, v in zip(block.iters, values, strict=True) if it.kind == "reduce")
        if block.init is not None and first:
            self.stmt(block.init)
        self.stmt(block.body)

    def write(self, store: Store, value: Value) -> None:
        index = self.indices(store.buffer, store.indices, None)
        self.memory[store.buffer][index] = value

    # Whole nests ------------------------------------------------------------------------------------------------

    def try_nest(self, loop: For) -> bool:
        """Evaluate the nest at once, if it can be; False leaves everything as it was."""
        if id(loop) not in self._nests:
            self._nests[id(loop)] = _as_nest(loop)
        nest = self._nests[id(loop)]
        if nest is None:
            return False
        extents = tuple(self.dim(each.extent) for each in nest.loops)
        if math.prod(extents) > _MAX_LANES:
            return False
        if math.prod(extents) > 0:
            for axis, (each, extent) in enumerate(zip(nest.loops, extents, strict=True)):
                steps = [1] * len(extents)
                steps[axis] = extent
                self.env[each.var] = np.arange(extent).reshape(steps)
            return self.run_nest(nest, extents)
        return True

    def run_nest(self, nest: _Nest, extents: tuple[int, ...]) -> bool:
        """Evaluate the nest; False, with nothing done, where an element begins anew among its updates."""
        block = nest.block
        mask = self.expr(block.predicate, None)
        if not np.any(mask):
            return True
        values = [self.expr(binding, mask) for binding in block.bindings]
        self.env.update((it.var, value) for it, value in zip(block.iters, values, strict=True))
        if nest.init is not None:
            first: Mask = mask
            for it, value in zip(block.iters, values, strict=True):
                if it.kind == "reduce":
                    first = np.logical_and(first, np.equal(value, 0))
            if np.any(first):
                if not self.begins_first(nest.init, nest.store, first, mask, extents):
                    return False
                self.scatter(nest.init, self.expr(nest.init.value, first), first, extents, None)
        self.scatter(nest.store, self.expr(nest.update, mask), mask, extents, nest.combiner)
        return True

    def begins_first(self, init: Store, store: Store, first: Mask, mask: Mask, extents: tuple[int, ...]) -> bool:
        """Whether every element that `init` sets is set once, before all updates of it."""
        initial, begun = self.places(init, first, extents)
        active, updated = self.places(store, mask, extents)
        own = (np.cumsum(active) - 1)[initial]  # which of the active lanes they are
        elements, earliest = np.unique(updated, return_index=True)
        same = np.array_equal(updated[own], begun)
        return same and np.array_equal(earliest[np.searchsorted(elements, begun)], own)

    def places(self, store: Store, mask: Mask, extents: tuple[int, ...]) -> tuple[Array, Array]:
        """Which lanes are active, in the order of the loops, and to which element each of them stores."""
        lanes = np.broadcast_to(mask, extents).reshape(-1)
        index = self.indices(store.buffer, store.indices, mask)
        flat = np.ravel_multi_index(index, self.memory[store.buffer].shape) if index else np.zeros((), "int64")
        return lanes, np.broadcast_to(flat, extents).reshape(-1)[lanes]

    def scatter(self, store: Store, value: Value, mask: Mask, extents: tuple[int, ...], combiner: str | None) -> None:
        """Store the active lanes in the order of the loops, combining with what is there if so asked."""
        lanes, where = self.places(store, mask, extents)
        target = self.memory[store.buffer]
        values = np.broadcast_to(value, extents).reshape(-1)[lanes].astype(target.dtype)
        if combiner is None:
            target.reshape(-1)[where] = values
        else:
            _COMBINE[combiner].at(target.reshape(-1), where, values)

    # Expressions ------------------------------------------------------------------------------------------------

    def expr(self, expr: Expr, mask: Mask) -> Value:
        """The value of `expr`; lanes outside `mask` may hold anything."""
        return self.evaluator(expr)(mask)

    def evaluator(self, expr: Expr) -> _Evaluator:
        """What computes `expr` where a mask holds: made once, since loops come to an expression again and again."""
        found = self._evaluators.get(expr)
        if found is None:
            found = self._evaluators[expr] = self._make(expr)
        return found

    def _make(self, expr: Expr) -> _Evaluator:
        match expr:
            case Const(value=value, dtype=dtype):
                literal = value if dtype in ("int64", "bool") else np.dtype(dtype).type(value)
                return lambda mask: literal
            case Var():
                return partial(self._variable, expr)
            case Binary(op="and" | "or"):
                return self._logic(expr)
            case Binary():
                return self._binary(expr)
            case Load(buffer=buffer, indices=indices):
                at, memory = self.places_of(buffer, indices), self.memory
                return lambda mask: memory[buffer][at(mask)]
            case Select():
                return self._select(expr)
            case Cast(value=value, dtype=dtype):
                given = self.evaluator(value)
                return lambda mask: _cast(given(mask), dtype)
            case Call():
                return self._call(expr)
        raise TypeError(f"not an expression of the tensor IR: {expr!r}")

    def _variable(self, var: Var, mask: Mask) -> Value:
        return self.env[var]

    def _binary(self, expr: Binary) -> _Evaluator:
        left, right = self.evaluator(expr.a), self.evaluator(expr.b)
        compute = _operation(expr)
        whole = _OF_NUMBERS.get(expr.op)
        if whole is None or expr.a.dtype != "int64":
            return lambda mask: compute(left(mask), right(mask))

        def indexing(mask: Mask) -> Value:
            a, b = left(mask), right(mask)
            if type(a) is int and type(b) is int and (b or expr.op not in _REMAINDERS):
                result = whole(a, b)
                if _LEAST <= result <= _LARGEST:
                    return result
            return compute(a, b)

        return indexing

    def _logic(self, expr: Binary) -> _Evaluator:
        left, right = self.evaluator(expr.a), self.evaluator(expr.b)
        decides = expr.op == "or"  # the value of the left side with which the right one does not count

        def logic(mask: Mask) -> Value:
            a = left(mask)
            if type(a) is bool:
                return a if a is decides else right(mask)
            # The right side counts, and is safe to evaluate, only where the left one does not decide.
            rest = _meet(mask, np.logical_not(a) if decides else a)
            if not np.any(rest):
                return a
            b = right(rest)
            return np.logical_or(a, b) if decides else np.logical_and(a, b)

        return logic

    def _select(self, expr: Select) -> _Evaluator:
        asked, first, second = self.evaluator(expr.condition), self.evaluator(expr.a), self.evaluator(expr.b)

        def select(mask: Mask) -> Value:
            condition = asked(mask)
            if type(condition) is bool or np.ndim(condition) == 0:
                return first(mask) if condition else second(mask)
            yes, no = _meet(mask, condition), _meet(mask, np.logical_not(condition))
            if not np.any(yes):
                return second(no)
            if not np.any(no):
                return first(yes)
            return np.where(condition, first(yes), second(no))

        return select

    def _call(self, expr: Call) -> _Evaluator:
        args, compute, dtype = [self.evaluator(arg) for arg in expr.args], _INTRINSIC[expr.name], expr.dtype

        def call(mask: Mask) -> Value:
            given = [arg(mask) for arg in args]
            if dtype in HALVES:  # several steps in numpy, and one rounding here
                given = [_cast(value, "float32") for value in given]
            return _cast(compute(*given), dtype)

        return call

    def indices(self, buffer: Buffer, indices: tuple[Expr, ...], mask: Mask) -> tuple[Value, ...]:
        """The indices as numbers, or as arrays of one shape; those of lanes outside `mask` are inside of the buffer."""
        return self.places_of(buffer, indices)(mask)

    def places_of(self, buffer: Buffer, indices: tuple[Expr, ...]) -> _Places:
        """What computes `indices` where a mask holds, as `indices` does."""
        found = self._places.get((buffer, indices))
        if found is not None:
            return found
        evaluators, memory = [self.evaluator(index) for index in indices], self.memory

        def places(mask: Mask) -> tuple[Value, ...]:
            values = tuple(index(mask) for index in evaluators)
            shape = memory[buffer].shape
            if all(type(value) is int and 0 <= value < size for value, size in zip(values, shape, strict=True)):
                return values
            inside = tuple(
                _inside(value, size, mask, index, buffer)
                for value, size, index in zip(values, shape, indices, strict=True)
            )
            return tuple(np.broadcast_arrays(*inside)) if len(inside) > 1 else inside

        self._places[buffer, indices] = places
        return places


def _operation(expr: Binary) -> Callable[[Value, Value], Value]:
    """What computes an operator of numbers from its sides."""
    if expr.op == "truncdiv":
        return lambda a, b: np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))
    compute = _BINARY[expr.op]
    if expr.op in _REMAINDERS and expr.dtype in HALVES:
        return lambda a, b: _cast(compute(_cast(a, "float32"), _cast(b, "float32")), expr.dtype)
    return compute


def _inside(value: Value, size: int, mask: Mask, index: Expr, buffer: Buffer) -> Value:
    outside = np.logical_or(np.less(value, 0), np.greater_equal(value, size))
    if not np.any(outside):
        return value
    if np.any(_meet(mask, outside)):
        raise VerifyError(f"index {print_expr(index)} of {buffer.name} leaves its dim of size {size}")
    return np.where(outside, 0, value)


def _meet(mask: Mask, condition: Value) -> Mask:
    return condition if mask is None else np.logical_and(mask, condition)


def _cast(value: Value, dtype: str) -> Value:
    return converted(value, dtype)[()]
