"""Whether threads keep to elements of their own, by counting out all of them, where no proof is found.

Tiles that threads fill through fused and transposed indices (`x % 8 * 128 + x // 8 + turn * 32 + y * 2`) are beyond
what `schedule.dependence` proves, and small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kedge.compiler.schedule.dependence import Place
from kedge.compiler.tir.expr import Binary, Const, Expr, Var
from kedge.compiler.tir.simplify import Ranges
from kedge.compiler.tir.visitor import free_vars

#: More accesses than this are not counted out.
_MOST = 1 << 16
_Array = np.ndarray[Any, Any]
_OPERATIONS: Mapping[str, Callable[[_Array, _Array], _Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "floordiv": np.floor_divide, "floormod": np.mod,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip


def counted_apart(position: Var, ranges: Ranges, touching: Sequence[Place]) -> bool:
    """Whether no element is touched at two values of `position`, for all values of the variables in `ranges`.

    False where that is not known: for free dims, for values that memory gives, for too many accesses.
    """
    shape = [dim for dim in touching[0].buffer.shape if isinstance(dim, int)]
    if len(shape) < len(touching[0].buffer.shape):
        return False
    first, last = np.full(math.prod(shape), np.iinfo("int64").max), np.full(math.prod(shape), -1)
    for touch in touching:
        used = dict.fromkeys([position, *(var for index in touch.indices for var in free_vars(index))])
        extents = [ranges[var].extent if var in ranges else None for var in used]
        counts = [int(extent.value) for extent in extents if isinstance(extent, Const)]
        if len(counts) < len(used) or math.prod(counts) > _MOST:
            return False
        grids = dict(zip(used, np.meshgrid(*map(np.arange, counts), indexing="ij", sparse=True), strict=True))
        places = [_values(index, grids) for index in touch.indices]
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return False
        whole = (
            np.ravel_multi_index(np.broadcast_arrays(*known), shape, mode="clip") if known else np.zeros((), "int64")
        )
        where, who = (each.reshape(-1) for each in np.broadcast_arrays(whole, grids[position], *grids.values())[:2])
        np.minimum.at(first, where, who)
        np.maximum.at(last, where, who)
    return bool(np.all((last < 0) | (first == last)))


def _values(index: Expr, grids: Mapping[Var, _Array]) -> _Array | None:
    """An index at all points of the grids; None where it is no arithmetic alone."""
    match index:
        case Const(value=value):
            return np.asarray(int(value))
        case Var():
            return grids[index]
        case Binary(op=op, a=a, b=b) if op in _OPERATIONS:
            left, right = _values(a, grids), _values(b, grids)
            return None if left is None or right is None else _OPERATIONS[op](left, right)
    return None
