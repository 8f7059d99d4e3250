"""Shape arithmetic: values computed from the shapes of tensors, folded away while importing.

Exporters write `x.view(x.size(0), -1)` as Shape, Gather, Unsqueeze, Concat and Reshape nodes. Here the tensors between
those nodes are small object arrays whose elements are ints or symbolic dims, and every node on them is evaluated at
once; nothing of it reaches the graph but what is used as data (`Node.value` has the operator `dims` for that).

Sizes that are scaled as floats (Shape, Cast, Mul, Floor, Cast) are exact fractions meanwhile. Only what float32
computes without rounding is folded so; other fractions would be rounded down to other sizes than those of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import Any, TypeAlias

import numpy as np
import onnx

from kedge.compiler.graph.dims import at_least, divide, factors, plain, product
from kedge.compiler.graph.ir import same_dim
from kedge.compiler.tir.expr import Binary, Const, Dim, Expr, Select, Var, as_expr, ceildiv, maximum, minimum

Array: TypeAlias = np.ndarray[Any, Any]
Attributes: TypeAlias = Mapping[str, Any]

#: Free dims are scaled by fractions of whole numbers up to this; others are rounded differently from size to size.
LARGEST_DENOMINATOR = 64
#: Bits of a float32's digits; half of them are for free dims.
_DIGITS = 24


@dataclass(frozen=True, slots=True, eq=False)
class Ratio:
    """`above / below` of a symbolic dim and a whole number above 1, as long as it is a float."""

    above: Expr
    below: int


@dataclass(frozen=True, slots=True, eq=False)
class Quotient:
    """`above / below` of two dims, of which the second is symbolic, as a float rounds it: a scale of Resize.

    Nothing else is computed from it while importing.
    """

    above: Dim
    below: Dim


@dataclass(frozen=True, slots=True, eq=False)
class Dims:
    """A tensor of rank 0 or more of whose elements some are symbolic expressions.

    `items` is an object array of ints (or bools), floats and expressions, in floats also `Ratio`s and `Quotient`s;
    `dtype` is what ONNX says the tensor's element type is: an integer, bool, float32 or float64.
    """

    items: Array
    dtype: str = "int64"


def as_items(dims: Sequence[Dim]) -> Array:
    """The object array of rank 1 with these dims."""
    items = np.empty(len(dims), dtype=object)
    items[:] = [plain(dim) for dim in dims]
    return items


def _expr(dim: Dim) -> Expr:
    return dim if isinstance(dim, Expr) else Const(int(dim))


def _pairwise(function: Callable[[Any, Any], Any]) -> Callable[[Sequence[Array], Attributes], Array]:
    """An element-wise folder with broadcasting."""
    pair = np.frompyfunc(function, 2, 1)
    return lambda operands, attributes: np.asarray(reduce(pair, operands), dtype=object)


def _each(function: Callable[[Dim, Dim], Any]) -> Callable[[Sequence[Array], Attributes], Array]:
    """An element-wise folder of whole numbers with broadcasting."""
    return _pairwise(lambda a, b: function(_whole(a), _whole(b)))


def _whole(item: Any) -> Dim:
    """An element as a dim; raises UndecidableError where it is no whole number."""
    above, below = parts(item)
    if below != 1:
        raise UndecidableError
    return above


def parts(item: Any) -> tuple[Dim, int]:
    """An element of `Dims.items` as numerator and denominator; raises UndecidableError where that is a dim, too."""
    if isinstance(item, Quotient):
        raise UndecidableError
    if isinstance(item, Ratio):
        return item.above, item.below
    if isinstance(item, float):
        return Fraction(item).as_integer_ratio()
    return plain(item), 1


def _ratio(above: Dim, below: int) -> Dim | float | Ratio:
    """`above / below` in its simplest form."""
    even = divide([above], [below])
    if even is not None:
        return even
    return Ratio(above, below) if isinstance(above, Expr) else above / below


def _quotient_of(above: Sequence[Dim], below: Sequence[Dim]) -> Dim | Quotient:
    """The quotient of products, whose divisor must be known to be positive; raises UndecidableError else."""
    divisor = product(below)
    if not at_least(divisor, 1):
        raise UndecidableError
    even = divide(above, below)
    return Quotient(product(above), divisor) if even is None else even


def _scaled(op: str) -> Callable[[Any, Any], Any]:
    """Products and quotients of floats, where float32 computes them without rounding."""

    def combine(a: Any, b: Any) -> Dim | float | Ratio | Quotient:
        (above, below), (times, by) = parts(a), parts(b)
        if op == "div" and isinstance(times, Expr):
            return _quotient_of([above, by], [below, times])
        if op == "div":
            if not isinstance(times, int) or times <= 0:
                raise UndecidableError
            times, by = by, times
            if below == 1 and times == 1:
                return _ratio(above, by)  # rounded once: down, it is the quotient of whole numbers all the same
        below *= by
        numbers = [factor for dim in (above, times) for factor in factors(dim)]
        known = math.prod(number for number in numbers if isinstance(number, int))
        digits = _DIGITS if all(isinstance(number, int) for number in numbers) else _DIGITS // 2
        if below & (below - 1) or below > LARGEST_DENOMINATOR or abs(known) > 1 << digits:
            raise UndecidableError
        return _ratio(product([above, times]), below)

    return combine


def _rounded(up: bool) -> Callable[[Sequence[Array], Attributes], Array]:
    """Floor and Ceil."""

    def rounded(item: Any) -> Dim:
        above, below = parts(item)
        return plain(ceildiv(as_expr(above), below) if up else as_expr(above) // below)

    return lambda operands, attributes: np.asarray(np.frompyfunc(rounded, 1, 1)(operands[0]), dtype=object)


def _cast(operands: Sequence[Array], attributes: Attributes) -> Array:
    to = onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])

    def convert(item: Any) -> Any:
        if to.kind == "f":
            return item  # sizes are whole numbers that float32 has
        above, below = parts(item)
        if to.kind == "b":
            if isinstance(above, Expr) and not at_least(above, 1):
                raise UndecidableError
            return not isinstance(above, int) or above != 0
        return above if below == 1 else _quotient(above, below)

    return np.asarray(np.frompyfunc(convert, 1, 1)(operands[0]), dtype=object)


def _binary(op: str) -> Callable[[Dim, Dim], Dim]:
    def combine(a: Dim, b: Dim) -> Dim:
        if op == "mul":
            return product([a, b])
        if op == "div":
            return _quotient(a, b)
        if op in ("min", "max"):
            return plain((minimum if op == "min" else maximum)(_expr(a), _expr(b)))
        return plain(_expr(a) + _expr(b) if op == "add" else _expr(a) - _expr(b))

    return combine


def _quotient(a: Dim, b: Dim) -> Dim:
    """`a / b` rounded towards zero, as ONNX does, where `b` is known to be positive; raises UndecidableError else."""
    if not at_least(b, 1):
        raise UndecidableError
    if not at_least(a, 0):
        above, below = (Binary("floordiv", maximum(side, 0), _expr(b)) for side in (_expr(a), 0 - _expr(a)))
        return plain(above - below)
    quotient = divide([a], [b])
    return quotient if quotient is not None else plain(Binary("floordiv", _expr(a), _expr(b)))


def _remainder(operands: Sequence[Array], attributes: Attributes) -> Array:
    """Mod: with the divisor's sign, or with `fmod` that of the dividend; the divisor must be known to be positive.

    Raises UndecidableError where it is not, or where the dividend's sign decides and is not known.
    """

    def remainder(a: Dim, b: Dim) -> Dim:
        if not at_least(b, 1) or (attributes.get("fmod", 0) and not at_least(a, 0)):
            raise UndecidableError
        return plain(Binary("floormod", _expr(a), _expr(b)))

    return _each(remainder)(operands, attributes)


def nesting(item: Any) -> tuple[int, int]:
    """How many divisions, minima, maxima and choices of an element are inside of each other, at most, and how many
    operations it takes where those that are used twice are written twice.
    """
    root = item.above if isinstance(item, (Ratio, Quotient)) else item
    if not isinstance(root, Expr):
        return 0, 0
    depths: dict[int, int] = {}
    lengths: dict[int, int] = {}
    waiting = [(root, False)]  # no recursion: the answer may be that there are thousands
    while waiting:
        expr, ready = waiting.pop()
        if id(expr) in depths:
            continue
        operands = [
            each for each in (getattr(expr, name, None) for name in ("condition", "a", "b")) if each is not None
        ]
        if ready:
            deepest = max((depths[id(each)] for each in operands), default=0)
            deep = isinstance(expr, Select) or (isinstance(expr, Binary) and expr.op not in ("add", "sub", "mul"))
            depths[id(expr)] = deepest + deep
            lengths[id(expr)] = sum(lengths[id(each)] for each in operands) + bool(operands)
        else:
            waiting += [(expr, True), *((each, False) for each in operands)]
    return depths[id(root)], lengths[id(root)]


class UndecidableError(Exception):
    """What becomes of symbolic dims is not known while compiling."""


def _equal(a: Dim, b: Dim) -> bool:
    if same_dim(a, b):
        return True
    for dim, other in ((a, b), (b, a)):
        if isinstance(dim, Var) and isinstance(other, int) and other < (dim.lower or 0):
            return False
    if isinstance(a, int) and isinstance(b, int):
        return False
    raise UndecidableError


def _axes(operands: Sequence[Array], attributes: Attributes, position: int) -> tuple[int, ...] | None:
    if len(operands) > position:
        return tuple(int(axis) for axis in operands[position].reshape(-1))
    axes = attributes.get("axes")
    return None if axes is None else tuple(axes)


def _slice(operands: Sequence[Array], attributes: Attributes) -> Array:
    data, starts, ends = operands[0], operands[1].reshape(-1), operands[2].reshape(-1)
    axes = _axes(operands, attributes, 3) or tuple(range(len(starts)))
    steps = operands[4].reshape(-1) if len(operands) > 4 else [1] * len(starts)
    index: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        stop = None if int(step) < 0 and int(end) < -data.shape[axis] else int(end)
        index[axis] = slice(int(start), stop, int(step))
    return data[tuple(index)]


def _gather(operands: Sequence[Array], attributes: Attributes) -> Array:
    return np.asarray(np.take(operands[0], operands[1].astype(np.int64), axis=attributes.get("axis", 0)), dtype=object)


def _squeeze(operands: Sequence[Array], attributes: Attributes) -> Array:
    axes = _axes(operands, attributes, 1)
    return np.asarray(np.squeeze(operands[0], axes), dtype=object)


def _unsqueeze(operands: Sequence[Array], attributes: Attributes) -> Array:
    axes = _axes(operands, attributes, 1) or ()
    return np.expand_dims(operands[0], axes)


def _reduce_prod(operands: Sequence[Array], attributes: Attributes) -> Array:
    items = np.empty((1,) * operands[0].ndim if attributes.get("keepdims", 1) else (), dtype=object)
    items[...] = product(list(operands[0].reshape(-1)))
    return items


def _where(operands: Sequence[Array], attributes: Attributes) -> Array:
    return np.where(operands[0].astype(bool), operands[1], operands[2])


def _negative(operands: Sequence[Array], attributes: Attributes) -> Array:
    return np.asarray(np.frompyfunc(lambda item: plain(0 - _expr(_whole(item))), 1, 1)(operands[0]), dtype=object)


#: What can be done to elements whatever they are: object arrays in, an object array out.
_MOVES: Mapping[str, Callable[[Sequence[Array], Attributes], Array]] = {
    "Where": _where,
    "Identity": lambda operands, attributes: operands[0],
    "Cast": _cast,
    "Concat": lambda operands, attributes: np.concatenate(operands, axis=attributes["axis"]),
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": lambda operands, attributes: operands[0].reshape([int(dim) for dim in operands[1]]),
}
#: What can be done to symbolic shape values, by ONNX operator.
FOLDERS: Mapping[str, Callable[[Sequence[Array], Attributes], Array]] = {
    **_MOVES,
    "Add": _each(_binary("add")),
    "Sub": _each(_binary("sub")),
    "Mul": _each(_binary("mul")),
    "Div": _each(_binary("div")),
    "Mod": _remainder,
    "Neg": _negative,
    "Min": _each(_binary("min")),
    "Max": _each(_binary("max")),
    "Equal": _each(_equal),
    "ReduceProd": _reduce_prod,
}
#: The same for floats.
FLOAT_FOLDERS: Mapping[str, Callable[[Sequence[Array], Attributes], Array]] = {
    **_MOVES,
    "Add": _each(_binary("add")),
    "Sub": _each(_binary("sub")),
    "Mul": _pairwise(_scaled("mul")),
    "Div": _pairwise(_scaled("div")),
    "Floor": _rounded(up=False),
    "Ceil": _rounded(up=True),
}
