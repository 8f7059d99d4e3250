"""Converters of operators that move elements: reshaping, slicing, joining, padding, gathering."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kedge.compiler.frontend.onnx.fold import literal
from kedge.compiler.frontend.onnx.node import Entry, Node, converter
from kedge.compiler.frontend.onnx.symbolic import as_items
from kedge.compiler.graph.dims import at_least, broadcast_shape, divide, format_dim, plain, product
from kedge.compiler.graph.ir import Constant, Value
from kedge.compiler.ops.movement import PAD_MODES
from kedge.compiler.tir.expr import Dim, as_expr, ceildiv


@converter("Shape")
def _shape(node: Node) -> Entry:
    shape = node.shape(0)
    return literal(as_items(shape[slice(node.attr("start", 0), node.attr("end"))]), "int64")


@converter("Size")
def _size(node: Node) -> Entry:
    items = np.empty((), dtype=object)
    items[()] = product(node.shape(0))
    return literal(items, "int64")


@converter("Reshape")
def _reshape(node: Node) -> Value:
    x = node.value(0)
    return node.emit("reshape", x, shape=_new_shape(node, x.type.shape, node.dims(1, "shape")))


def _new_shape(node: Node, old: Sequence[Dim], asked: Sequence[Dim]) -> tuple[Dim, ...]:
    """`asked` with 0 (keep) and -1 (the rest) worked out."""
    new: list[Dim] = list(asked)
    if not node.attr("allowzero", 0):
        for axis, dim in enumerate(new):
            if isinstance(dim, int) and dim == 0:
                if axis >= len(old):
                    raise node.error(f"shape[{axis}] is 0 (keep the dim), but its input has rank {len(old)}")
                new[axis] = old[axis]
    free = [axis for axis, dim in enumerate(new) if isinstance(dim, int) and dim == -1]
    if len(free) > 1:
        raise node.error(f"its shape {_shown(asked)} has more than one -1")
    if free:
        others = [dim for axis, dim in enumerate(new) if axis != free[0]]
        rest = divide(old, others)
        if rest is None:
            known = all(isinstance(dim, int) for dim in (*old, *others))
            raise node.error(
                f"{_shown(old)} cannot be reshaped to {_shown(asked)}",
                hint=None if known else "it may fit for some sizes only: fix the dims with shapes={...}",
            )
        new[free[0]] = rest
    return tuple(new)


def _shown(shape: Sequence[Dim]) -> str:
    return f"[{', '.join(map(format_dim, shape))}]"


@converter("Flatten")
def _flatten(node: Node) -> Value:
    return node.emit("flatten", node.value(0), axis=int(node.attr("axis", 1)))


@converter("Transpose")
def _transpose(node: Node) -> Value:
    perm = node.attr("perm")
    return node.emit("transpose", node.value(0), perm=None if perm is None else tuple(perm))


@converter("Squeeze")
def _squeeze(node: Node) -> Value:
    return node.emit("squeeze", node.value(0), axes=node.ints(1, "axes") if node.has(1) else None)


@converter("Unsqueeze")
def _unsqueeze(node: Node) -> Value:
    return node.emit("unsqueeze", node.value(0), axes=node.ints(1, "axes"))


@converter("Concat")
def _concat(node: Node) -> Value:
    return node.emit("concat", *node.values(), axis=int(node.attr("axis")))


@converter("Split")
def _split(node: Node) -> tuple[Value, ...]:
    x = node.value(0)
    axis = int(node.attr("axis", 0))
    if not -x.type.rank <= axis < x.type.rank:
        raise node.error(f"axis {axis} is outside of rank {x.type.rank}")
    if node.has(1):
        sizes: tuple[Dim, ...] = node.dims(1, "split")
    else:
        sizes = _equal_parts(node, x.type.shape[axis], int(node.attr("num_outputs", len(node.proto.output))))
    return node.emit_all("split", x, axis=axis, sizes=sizes)


def _equal_parts(node: Node, size: Dim, count: int) -> tuple[Dim, ...]:
    """`size` in `count` parts, the last one smaller where it does not divide."""
    if count < 1:
        raise node.error(f"a dim cannot be split into {count} parts")
    if isinstance(size, int):
        part = -(-size // count)
        sizes = [min(part, size - part * index) for index in range(count)]
        if min(sizes) < 0:
            raise node.error(f"a dim of {size} cannot be split into {count} parts of {part}")
        return tuple(sizes)
    even = divide([size], [count])
    if even is not None:
        return (even,) * count
    if node.attr("num_outputs") is None:
        return (plain(as_expr(size) // count),) * count  # the call that runs says whether the dim divides
    part_ = plain(ceildiv(as_expr(size), count))
    rest = plain(as_expr(size) - product([part_, count - 1]))
    if not at_least(rest, 0):
        raise node.error(
            f"the dim {format_dim(size)} is not known to fill {count} parts of {format_dim(part_)}",
            hint="fix the dim: shapes={...} or --shape NAME=1,3,224,224",
        )
    return (*(part_,) * (count - 1), rest)


@converter("Slice")
def _slice(node: Node) -> Value:
    x = node.value(0)
    starts, ends = node.dims(1, "starts"), node.dims(2, "ends")
    axes = node.ints(3, "axes") if node.has(3) else tuple(range(len(starts)))
    steps = node.ints(4, "steps") if node.has(4) else (1,) * len(starts)
    return node.emit("slice", x, starts=starts, ends=ends, axes=axes, steps=steps)


@converter("Pad")
def _pad(node: Node) -> Value:
    x = node.value(0)
    rank = x.type.rank
    given = node.dims(1, "pads")
    axes = node.ints(3, "axes") if node.has(3) else tuple(range(rank))
    if len(given) != 2 * len(axes) or any(not -rank <= axis < rank for axis in axes):
        raise node.error(f"{len(given)} pads for the axes {list(axes)} of a tensor of rank {rank}")
    pads: list[Dim] = [0] * (2 * rank)
    for position, axis in enumerate(axes):
        pads[axis % rank] = given[position]
        pads[axis % rank + rank] = given[position + len(axes)]
    mode = node.attr("mode", "constant")
    if mode not in PAD_MODES:
        raise node.error(f"mode {mode!r} is not supported", hint=f"it is one of {', '.join(PAD_MODES)}")
    value = node.const(2, "constant_value").reshape(()).item() if node.has(2) and mode == "constant" else 0
    x = _crop(node, x, pads)
    pads = [max(dim, 0) if isinstance(dim, int) else dim for dim in pads]
    if all(isinstance(dim, int) and dim == 0 for dim in pads):
        return x
    return node.emit("pad", x, pads=tuple(pads), mode=mode, value=value)


def _crop(node: Node, x: Value, pads: Sequence[Dim]) -> Value:
    """Negative pads cut elements off."""
    rank = x.type.rank
    negative = [(min(a, 0) if isinstance(a, int) else 0, min(b, 0) if isinstance(b, int) else 0)
                for a, b in zip(pads[:rank], pads[rank:], strict=True)]  # fmt: skip
    for axis, (size, cut) in enumerate(zip(x.type.shape, negative, strict=True)):
        if isinstance(size, int) and size + sum(cut) < 0:
            raise node.error(f"it cuts {-sum(cut)} elements off axis {axis}, which has {size}")
    axes = tuple(axis for axis, cut in enumerate(negative) if cut != (0, 0))
    if not axes:
        return x
    starts = tuple(-negative[axis][0] for axis in axes)
    ends = tuple(plain(as_expr(x.type.shape[axis]) + negative[axis][1]) for axis in axes)
    return node.emit("slice", x, starts=starts, ends=ends, axes=axes, steps=(1,) * len(axes))


@converter("Expand")
def _expand(node: Node) -> Value:
    x = node.value(0)
    return node.emit("broadcast_to", x, shape=broadcast_shape(x.type.shape, node.dims(1, "shape")))


@converter("Tile")
def _tile(node: Node) -> Value:
    """A new dim before each axis, broadcast to the number of repeats, and merged into the axis."""
    x = node.value(0)
    repeats = node.dims(1, "repeats")
    if len(repeats) != x.type.rank:
        raise node.error(f"{len(repeats)} repeats for a tensor of rank {x.type.rank}")
    pairs = list(zip(repeats, x.type.shape, strict=True))
    wide = node.emit("unsqueeze", x, axes=tuple(range(0, 2 * x.type.rank, 2)))
    wide = node.emit("broadcast_to", wide, shape=tuple(dim for pair in pairs for dim in pair))
    return node.emit("reshape", wide, shape=tuple(product(pair) for pair in pairs))


@converter("Gather")
def _gather(node: Node) -> Value:
    x, indices = node.value(0), node.value(1)
    axis = int(node.attr("axis", 0))
    if not -x.type.rank <= axis < x.type.rank:
        raise node.error(f"axis {axis} is outside of rank {x.type.rank}")
    size = x.type.shape[axis]
    known = node.literal(1)
    if known is None:
        return node.emit("gather", x, indices, axis=axis)
    if isinstance(size, int):
        if known.size and not (-size <= known.min() and known.max() < size):
            raise node.error(f"indices from {known.min()} to {known.max()} are outside of a dim of {size}")
        return node.emit("gather", x, Constant(np.where(known < 0, known + size, known)), axis=axis)
    if known.size == 1 and known.min() < 0:
        # x[-1] of a free dim is a slice that counts from the end.
        at = int(known.reshape(()))
        end: Dim = at + 1 if at < -1 else size
        part = node.emit("slice", x, starts=(at,), ends=(end,), axes=(axis,), steps=(1,))
        squeezed = node.emit("squeeze", part, axes=(axis,))
        new = tuple(range(axis % x.type.rank, axis % x.type.rank + known.ndim))
        return node.emit("unsqueeze", squeezed, axes=new) if new else squeezed
    return node.emit("gather", x, indices, axis=axis)


def _image(node: Node, x: Value) -> tuple[Dim, Dim, Dim, Dim]:
    if x.type.rank != 4:
        raise node.error(f"it takes images of rank 4, not {x.type.rank}")
    n, c, h, w = x.type.shape
    return n, c, h, w


@converter("DepthToSpace")
def _depth_to_space(node: Node) -> Value:
    x, b = node.value(0), int(node.attr("blocksize"))
    n, c, h, w = _image(node, x)
    depth = divide([c], [b * b])
    if depth is None:
        raise node.error(f"{format_dim(c)} channels are not a multiple of blocksize² = {b * b}")
    if node.attr("mode", "DCR") == "DCR":
        return node.emit("depth_to_space", x, blocks=(b, b))
    blocks = node.emit("reshape", x, shape=(n, depth, b, b, h, w))
    blocks = node.emit("transpose", blocks, perm=(0, 1, 4, 2, 5, 3))
    return node.emit("reshape", blocks, shape=(n, depth, product([h, b]), product([w, b])))


@converter("SpaceToDepth")
def _space_to_depth(node: Node) -> Value:
    x, b = node.value(0), int(node.attr("blocksize"))
    n, c, h, w = _image(node, x)
    mode = node.attr("mode", "DCR")
    rows, columns = divide([h], [b]), divide([w], [b])
    if rows is None or columns is None:
        raise node.error(f"{format_dim(h)} x {format_dim(w)} is not a multiple of blocksize {b}")
    blocks = node.emit("reshape", x, shape=(n, c, rows, b, columns, b))
    blocks = node.emit("transpose", blocks, perm=(0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return node.emit("reshape", blocks, shape=(n, product([c, b * b]), rows, columns))
