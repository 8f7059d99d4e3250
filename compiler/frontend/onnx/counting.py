"""Converters of operators that compare positions: ranges, masks, one-hot rows, running sums."""

from __future__ import annotations

import math

import numpy as np

from kedge.compiler.frontend.onnx.model import dtype_name
from kedge.compiler.frontend.onnx.node import Node, converter
from kedge.compiler.frontend.onnx.symbolic import LARGEST_DENOMINATOR, parts
from kedge.compiler.graph.dims import at_least, format_dim, plain, product
from kedge.compiler.graph.ir import Value
from kedge.compiler.tir.expr import Dim, Expr, as_expr

#: Larger floats are not all of the whole numbers.
_LARGEST_EXACT = 1 << 53


@converter("Range")
def _range(node: Node) -> Value:
    """start, start + delta, … below limit."""
    known = [node.literal(index) for index in range(3)]
    if all(part is not None for part in known):
        start, limit, delta = (part.reshape(()) for part in known if part is not None)
        if not delta:
            raise node.error("its delta is 0")
        # ONNX says how many there are, and that each is computed on its own.
        count = max(int(np.ceil((limit - start) / delta)), 0)
        values = start.astype(np.float64) + np.arange(count) * delta.astype(np.float64)
        exact = start + np.arange(count) * delta
        return node.constant(exact if start.dtype.kind in "iu" else values, str(start.dtype))
    items = [node.items(index, what)[0] for index, what in enumerate(("start", "limit", "delta"))]
    fractions = [parts(item) for item in items]
    # Of wholes, or of floats that are even parts of one: how many there are is exact.
    scale = math.lcm(*(below for _, below in fractions))
    start_, limit_, delta_ = (product([above, scale // below]) for above, below in fractions)
    if not isinstance(delta_, int) or delta_ == 0:
        raise node.error(f"its delta is {format_dim(delta_)}", hint="kedge takes one that is known, and not 0")
    if isinstance(start_, Expr):
        raise node.error(f"its start {format_dim(start_)} depends on a free dim", hint="fix the dims with shapes={...}")
    if scale > LARGEST_DENOMINATOR or max(abs(start_), abs(delta_)) >= _LARGEST_EXACT:
        raise node.error(
            f"from {items[0]} in steps of {items[2]} how many elements it has is rounded, for each size in its own way",
            hint="fix the dims with shapes={...}",
        )
    span = as_expr(limit_) - start_ if delta_ > 0 else as_expr(start_) - limit_
    size = plain((span + (abs(delta_) - 1)) // abs(delta_))
    if not at_least(size, 0):
        raise node.error(
            f"it is not known to have {format_dim(size)} elements, which may be negative",
            hint="fix the dims with shapes={...}",
        )
    dtype = node.dtype(0)
    result = node.emit("iota", size=size)
    if dtype != "int64":
        result = node.emit("cast", result, dtype=dtype)
    if delta_ != scale:
        result = node.emit("mul", result, node.constant(items[2], dtype))
    return node.emit("add", result, node.constant(items[0], dtype)) if start_ else result


@converter("CumSum")
def _cum_sum(node: Node) -> Value:
    (axis,) = node.ints(1, "axis")
    return node.emit(
        "cumsum", node.value(0), axis=axis, exclusive=bool(node.attr("exclusive", 0)),
        reverse=bool(node.attr("reverse", 0)),
    )  # fmt: skip


@converter("Trilu")
def _trilu(node: Node) -> Value:
    """The upper or lower triangle of the last two dims, zeros elsewhere."""
    x = node.value(0)
    if x.type.rank < 2:
        raise node.error(f"its input has rank {x.type.rank}; it needs rows and columns")
    (offset,) = node.ints(1, "k") if node.has(1) else (0,)
    rows, columns = _grid(node, x.type.shape[-2], x.type.shape[-1], offset)
    kept = node.emit("greater_equal" if node.attr("upper", 1) else "less_equal", columns, rows)
    return node.emit("where", kept, x, node.constant(0, x.type.dtype))


@converter("EyeLike")
def _eye_like(node: Node) -> Value:
    """Ones on a diagonal."""
    shape = node.shape(0)
    if len(shape) != 2:
        raise node.error(f"its input has rank {len(shape)}, not 2")
    to = node.attr("dtype")
    dtype = node.value(0).type.dtype if to is None else dtype_name(node.importer.model, to, f"node {node.label!r}")
    rows, columns = _grid(node, *shape, int(node.attr("k", 0)))
    return node.emit("cast", node.emit("equal", columns, rows), dtype=dtype)


def _grid(node: Node, rows: Dim, columns: Dim, offset: int) -> tuple[Value, Value]:
    """The numbers of rows, plus `offset`, and of columns, to be compared with each other."""
    down = node.emit("unsqueeze", node.emit("iota", size=rows), axes=(1,))
    return node.emit("add", down, node.constant(offset, "int64")), node.emit("iota", size=columns)


@converter("OneHot")
def _one_hot(node: Node) -> Value:
    """values[1] where a new axis counts up to the index, values[0] elsewhere; negative indices count from the end."""
    indices, values = node.value(0), node.value(2)
    (depth,) = (int(number) for number in node.const(1, "depth").reshape(-1))
    indices = node.emit("cast", indices, dtype="int64")
    below = node.emit("less", indices, node.constant(0, "int64"))
    indices = node.emit("where", below, node.emit("add", indices, node.constant(depth, "int64")), indices)
    rank = indices.type.rank + 1
    axis = int(node.attr("axis", -1))
    if not -rank <= axis < rank:
        raise node.error(f"axis {axis} is outside of rank {rank}")
    hit = _counted(node, node.emit("unsqueeze", indices, axes=(axis,)), depth, axis % rank)
    off, on = (
        node.emit("reshape", node.emit("slice", values, starts=(at,), ends=(at + 1,), axes=(0,)), shape=())
        for at in (0, 1)
    )
    return node.emit("where", hit, on, off)


@converter("Hardmax")
def _hardmax(node: Node) -> Value:
    """1 at the first largest element along `axis`, 0 elsewhere."""
    x = node.value(0)
    axis = int(node.attr("axis", -1))
    if not -x.type.rank <= axis < x.type.rank:
        raise node.error(f"axis {axis} is outside of rank {x.type.rank}")
    best = node.emit("argmax", x, axis=axis, keepdims=True)
    return node.emit("cast", _counted(node, best, x.type.shape[axis], axis % x.type.rank), dtype=x.type.dtype)


def _counted(node: Node, position: Value, size: Dim, axis: int) -> Value:
    """Whether `position`, of size 1 along `axis`, is the number of the element along that axis of `size`."""
    after = position.type.rank - 1 - axis
    numbers = node.emit("iota", size=size)
    numbers = node.emit("unsqueeze", numbers, axes=tuple(range(1, after + 1))) if after else numbers
    return node.emit("equal", position, numbers)
