"""Shape arithmetic: values computed from the shapes of tensors, folded away while importing.

Exporters write `x.view(x.size(0), -1)` as Shape, Gather, Unsqueeze, Concat and Reshape nodes. Here the tensors between
those nodes are small object arrays whose elements are ints or symbolic dims, and every node on them is evaluated at
once; nothing of it reaches the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler.graph.dims import at_least, divide, plain, product
from kedge.compiler.graph.ir import same_dim
from kedge.compiler.tir.expr import Binary, Const, Dim, Expr, Var, maximum, minimum

Array: TypeAlias = np.ndarray[Any, Any]
Attributes: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Dims:
    """An integer (or bool) tensor of rank 0 or more whose elements are ints or symbolic expressions.

    `items` is an object array; `dtype` is what ONNX says the tensor's element type is.
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


def _each(function: Callable[[Dim, Dim], Any]) -> Callable[[Sequence[Array], Attributes], Array]:
    """An element-wise folder with broadcasting."""

    def fold(operands: Sequence[Array], attributes: Attributes) -> Array:
        pair = np.frompyfunc(lambda a, b: function(plain(a), plain(b)), 2, 1)
        return np.asarray(reduce(pair, operands), dtype=object)

    return fold


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


#: What can be done to symbolic shape values, by ONNX operator: object arrays in, an object array out.
FOLDERS: Mapping[str, Callable[[Sequence[Array], Attributes], Array]] = {
    "Add": _each(_binary("add")),
    "Sub": _each(_binary("sub")),
    "Mul": _each(_binary("mul")),
    "Div": _each(_binary("div")),
    "Min": _each(_binary("min")),
    "Max": _each(_binary("max")),
    "Equal": _each(_equal),
    "Where": _where,
    "Identity": lambda operands, attributes: operands[0],
    "Cast": lambda operands, attributes: operands[0],
    "Concat": lambda operands, attributes: np.concatenate(operands, axis=attributes["axis"]),
    "Gather": _gather,
    "Slice": _slice,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Reshape": lambda operands, attributes: operands[0].reshape([int(dim) for dim in operands[1]]),
    "ReduceProd": _reduce_prod,
}
