"""Operators that move elements: each element of the result is one element of an input, or a fill value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from kedge.compiler.graph.dims import at_least, divide, evaluate_shape, format_dim, plain, product, total
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry
from kedge.compiler.ops.common import ANY
from kedge.compiler.ops.registry import REQUIRED, Agreement, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Cast, Dim, Expr, as_expr, const, logical_and, maximum, minimum, select

INJECTIVE = FusionKind.INJECTIVE
#: From here on an end of a slice means "to the end", whatever the dim is.
HUGE = 2**31 - 1


# -- transpose ---------------------------------------------------------------------------------------------------


def permutation(attrs: Attrs, rank: int) -> tuple[int, ...]:
    """The permutation of a transpose, counted from the front; without one the axes are reversed."""
    given = attrs["perm"]
    if given is None:
        return tuple(reversed(range(rank)))
    perm = tuple(common.axis_of(axis, rank) for axis in given)
    common.require(sorted(perm) == list(range(rank)), f"perm {tuple(given)} does not permute {rank} axes")
    return perm


def _infer_transpose(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    return (TensorType(tuple(x.shape[axis] for axis in permutation(attrs, x.rank)), x.dtype, x.space),)


def _transpose(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (np.ascontiguousarray(np.transpose(arrays[0], permutation(attrs, arrays[0].ndim))).reshape(
        [arrays[0].shape[axis] for axis in permutation(attrs, arrays[0].ndim)]
    ),)  # fmt: skip


def _lower_transpose(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    perm = permutation(attrs, len(x.shape))
    return (
        common.elementwise(
            types[0], "transpose", lambda *i: common.read(x, [i[perm.index(axis)] for axis in range(len(perm))])
        ),
    )


registry.register(OpDef("transpose", INJECTIVE, _infer_transpose, _transpose, _lower_transpose, {"perm": None}))


# -- concat and split --------------------------------------------------------------------------------------------


def _infer_concat(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    first = types[0]
    dtype = common.require_same_dtype(types)
    axis = common.axis_of(attrs["axis"], first.rank)
    for type_ in types[1:]:
        common.require(type_.rank == first.rank, "ranks differ")
        for other, (a, b) in enumerate(zip(first.shape, type_.shape, strict=True)):
            common.require(
                other == axis or same_dim(a, b),
                f"dims {format_dim(a)} and {format_dim(b)} of axis {other} are not known to be equal",
            )
    length = total(type_.shape[axis] for type_ in types)
    return (TensorType((*first.shape[:axis], length, *first.shape[axis + 1 :]), dtype, first.space),)


def _concat(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (np.concatenate(arrays, axis=attrs["axis"]),)


def _lower_concat(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    axis = common.axis_of(attrs["axis"], len(types[0].shape))

    def element(*indices: Expr) -> Expr:
        ends: list[Dim] = []
        for tensor in tensors:
            ends.append(total([*ends[-1:], tensor.shape[axis]]))
        starts: list[Dim] = [0, *ends[:-1]]
        values: list[Expr] = []
        for tensor, start in zip(tensors, starts, strict=True):
            own = indices[axis] - as_expr(start) if not _is_zero(start) else indices[axis]
            values.append(common.read(tensor, (*indices[:axis], own, *indices[axis + 1 :])))

        def among(first: int, last: int) -> Expr:
            """The value among tensors `[first, last)`: halved, so that hundreds are a few choices deep."""
            if last - first == 1:
                return values[first]
            middle = (first + last) // 2
            return select(indices[axis] < as_expr(ends[middle - 1]), among(first, middle), among(middle, last))

        return among(0, len(values))

    return (common.elementwise(types[0], "concat", element),)


def _is_zero(dim: Dim) -> bool:
    return isinstance(dim, int) and dim == 0


def _agree_concat(shapes: Sequence[Sequence[Dim]], attrs: Attrs) -> Iterator[Agreement]:
    rank = max(map(len, shapes), default=0)
    if all(len(shape) == rank for shape in shapes):
        for axis in range(-rank, 0):
            if attrs["axis"] not in (axis, axis + rank):
                yield Agreement(tuple((n, axis) for n in range(len(shapes))))


registry.register(
    OpDef(
        "concat", INJECTIVE, _infer_concat, _concat, _lower_concat, {"axis": REQUIRED}, (1, None), agree=_agree_concat
    )
)  # fmt: skip


def _infer_split(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    axis = common.axis_of(attrs["axis"], x.rank)
    sizes = attrs["sizes"]
    common.require(len(sizes) > 0, "sizes is empty")
    common.require(
        same_dim(total(sizes), x.shape[axis]), f"sizes do not add up to {format_dim(x.shape[axis])} of axis {axis}"
    )
    return tuple(TensorType((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype, x.space) for size in sizes)


def _split(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return tuple(
        np.ascontiguousarray(part) for part in np.split(arrays[0], np.cumsum(attrs["sizes"])[:-1], axis=attrs["axis"])
    )


def _agree_split(shapes: Sequence[Sequence[Dim]], attrs: Attrs) -> Iterator[Agreement]:
    rank = len(shapes[0])
    axis = attrs["axis"]
    if -rank <= axis < rank and attrs["sizes"]:
        yield Agreement(((0, axis if axis < 0 else axis - rank),), size=total(attrs["sizes"]))


registry.register(
    OpDef(
        "split", INJECTIVE, _infer_split, _split, None, {"axis": REQUIRED, "sizes": REQUIRED}, (1, 1), single=False,
        agree=_agree_split,
    )
)  # fmt: skip


# -- slice -------------------------------------------------------------------------------------------------------


def slice_plan(shape: Sequence[Dim], attrs: Attrs) -> list[tuple[Dim, int, Dim]]:
    """For each axis: where the slice starts, its step, and how many elements it takes (ONNX's clamping)."""
    axes = attrs["axes"] if attrs["axes"] is not None else tuple(range(len(attrs["starts"])))
    steps = attrs["steps"] if attrs["steps"] is not None else (1,) * len(axes)
    common.require(
        len(axes) == len(steps) == len(attrs["starts"]) == len(attrs["ends"]),
        "starts, ends, axes and steps differ in length",
    )
    plan: list[tuple[Dim, int, Dim]] = [(0, 1, dim) for dim in shape]
    seen = set()
    for given, start, end, step in zip(axes, attrs["starts"], attrs["ends"], steps, strict=True):
        axis = common.axis_of(given, len(shape))
        common.require(axis not in seen, f"axis {axis} is sliced twice")
        common.require(step != 0, "a step is 0")
        seen.add(axis)
        plan[axis] = _slice_axis(shape[axis], start, end, step)
    return plan


def _slice_axis(size: Dim, start: Dim, end: Dim, step: int) -> tuple[Dim, int, Dim]:
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        if end <= -HUGE:
            end = -size - 1  # Python's slices have no other way to say "past the front"
        taken = range(size)[slice(start, end if step > 0 or end >= -size else None, step)]
        return taken.start, step, len(taken)
    low, high = (0, size) if step > 0 else (-1, plain(size - 1))
    first, last = _clamp(start, size, low, high), _clamp(end, size, low, high)
    span = plain(last - first) if step > 0 else plain(first - last)
    count = span if abs(step) == 1 else plain((as_expr(span) + (abs(step) - 1)) // abs(step))
    return first, step, count if at_least(count, 0) else plain(maximum(as_expr(count), 0))


def _clamp(index: Dim, size: Dim, low: Dim, high: Dim) -> Dim:
    """`index` (negative: from the end) brought into [low, high]."""
    if isinstance(index, int):
        if index >= HUGE:
            return high
        if index <= -HUGE:
            return low
        if index < 0:
            moved = plain(size + index)
            return moved if at_least(size, -index) else plain(maximum(as_expr(moved), as_expr(low)))
        if at_least(high, index):
            return index
    elif not at_least(index, 0):
        # Counted from the end where it turns out negative: `index + size * (index < 0)`, in the operations of sizes.
        is_negative = minimum(maximum(0 - index, 0), 1)
        return plain(minimum(maximum(index + is_negative * as_expr(size), as_expr(low)), as_expr(high)))
    return high if same_dim(index, high) else plain(minimum(as_expr(index), as_expr(high)))


def _infer_slice(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    return (TensorType(tuple(count for _, _, count in slice_plan(x.shape, attrs)), x.dtype, x.space),)


def _slice(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    (x,) = arrays
    for axis, (start, step, count) in enumerate(slice_plan(x.shape, attrs)):
        x = np.take(x, int(str(start)) + step * np.arange(int(str(count))), axis=axis)
    return (x,)


def _lower_slice(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    plan = slice_plan(x.shape, attrs)

    def element(*indices: Expr) -> Expr:
        scaled = [index if step == 1 else index * step for index, (_, step, _) in zip(indices, plan, strict=True)]
        return common.read(
            x, [i if _is_zero(start) else i + as_expr(start) for i, (start, _, _) in zip(scaled, plan, strict=True)]
        )

    return (common.elementwise(types[0], "slice", element),)


registry.register(
    OpDef(
        "slice", INJECTIVE, _infer_slice, _slice, _lower_slice,
        {"starts": REQUIRED, "ends": REQUIRED, "axes": None, "steps": None},
    )
)  # fmt: skip


# -- pad ---------------------------------------------------------------------------------------------------------


PAD_MODES = ("constant", "reflect", "edge", "wrap")


def _pads(attrs: Attrs, rank: int) -> tuple[tuple[Dim, ...], tuple[Dim, ...]]:
    pads = attrs["pads"]
    common.require(len(pads) == 2 * rank, f"pads must have {2 * rank} numbers, begins and then ends")
    common.require(all(not isinstance(pad, int) or pad >= 0 for pad in pads), "pads must not be negative; use slice")
    return pads[:rank], pads[rank:]


def _infer_pad(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    begins, ends = _pads(attrs, x.rank)
    common.require(attrs["mode"] in PAD_MODES, f"unknown mode {attrs['mode']!r}")
    for size, *widths in zip(x.shape, begins, ends, strict=True):
        for width in widths:
            if attrs["mode"] == "reflect" and isinstance(size, int) and isinstance(width, int):
                common.require(width < size, f"cannot reflect {width} elements of an axis of {size}")
    shape = tuple(total(parts) for parts in zip(begins, x.shape, ends, strict=True))
    return (TensorType(shape, x.dtype, x.space),)


def _pad(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    (x,) = arrays
    begins, ends = (evaluate_shape(pads, {}) for pads in _pads(attrs, x.ndim))
    widths = list(zip(begins, ends, strict=True))
    options: dict[str, Any] = {"constant_values": attrs["value"]} if attrs["mode"] == "constant" else {}
    return (np.pad(x, widths, mode=attrs["mode"], **options),)


def _lower_pad(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    begins, ends = _pads(attrs, len(x.shape))

    def element(*indices: Expr) -> Expr:
        guards: list[Expr] = []
        at: list[Expr] = []
        for index, size, begin, end in zip(indices, x.shape, begins, ends, strict=True):
            own = index if _is_zero(begin) else index - as_expr(begin)
            if attrs["mode"] == "constant":
                guards += [] if _is_zero(begin) else [own >= 0]
                guards += [] if _is_zero(end) else [own < as_expr(size)]
            elif not (_is_zero(begin) and _is_zero(end)):
                own = _fold_back(own, as_expr(size), attrs["mode"])
            at.append(own)
        value = common.read(x, at)
        if attrs["mode"] in ("edge", "wrap"):
            for size in x.shape:
                value = _unless_empty(size, value)
        return select(logical_and(*guards), value, const(attrs["value"], value.dtype)) if guards else value

    return (common.elementwise(types[0], "pad", element),)


def _fold_back(index: Expr, size: Expr, mode: str) -> Expr:
    last = size - 1
    if mode == "edge":
        return minimum(maximum(index, 0), last)
    if mode == "wrap":
        return index % size
    front = maximum(index, -index)
    return minimum(front, last * 2 - front)


def _unless_empty(size: Dim, value: Expr) -> Expr:
    """`value`, which is read at some index of an axis, or 0 where the axis has turned out empty."""
    return value if at_least(size, 1) else select(as_expr(size) >= 1, value, const(0, value.dtype))


registry.register(
    OpDef(
        "pad", INJECTIVE, _infer_pad, _pad, _lower_pad, {"pads": REQUIRED, "mode": "constant", "value": 0}
    )
)  # fmt: skip


# -- depth to space ----------------------------------------------------------------------------------------------


def _infer_depth_to_space(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    blocks = attrs["blocks"]
    wanted = 2 + len(blocks) + int(attrs["lanes"])
    common.require(x.rank == wanted, f"blocks of {len(blocks)} axes want an input of rank {wanted}")
    common.require(all(block > 0 for block in blocks), f"blocks {blocks} must be positive")
    channels = divide([x.shape[1]], blocks)
    common.require(channels is not None, f"blocks {blocks} do not divide the {format_dim(x.shape[1])} channels")
    assert channels is not None
    spatial = [product(pair) for pair in zip(x.shape[2 : 2 + len(blocks)], blocks, strict=True)]
    return (TensorType((x.shape[0], channels, *spatial, *x.shape[2 + len(blocks) :]), x.dtype, x.space),)


def _depth_to_space(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    (x,) = arrays
    blocks, rank = attrs["blocks"], len(attrs["blocks"])
    batch, channels, *rest = x.shape
    spatial, lanes = rest[:rank], rest[rank:]
    apart = x.reshape(batch, *blocks, channels // int(np.prod(blocks)), *spatial, *lanes)
    order = [axis for at in range(rank) for axis in (2 + rank + at, 1 + at)]
    woven = apart.transpose(0, 1 + rank, *order, *range(2 + 2 * rank, apart.ndim))
    shape = [size * block for size, block in zip(spatial, blocks, strict=True)]
    return (np.ascontiguousarray(woven).reshape(batch, -1, *shape, *lanes),)


def _lower_depth_to_space(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    blocks, channels = attrs["blocks"], as_expr(types[0].shape[1])

    def element(n: Expr, c: Expr, *rest: Expr) -> Expr:
        places, lanes = rest[: len(blocks)], rest[len(blocks) :]
        phase: Expr = const(0)
        for place, block in zip(places, blocks, strict=True):
            phase = phase * block + place % block
        at = [place // block for place, block in zip(places, blocks, strict=True)]
        return common.read(x, (n, phase * channels + c, *at, *lanes))

    return (common.elementwise(types[0], "depth_to_space", element),)


registry.register(
    OpDef(
        "depth_to_space", INJECTIVE, _infer_depth_to_space, _depth_to_space, _lower_depth_to_space,
        {"blocks": REQUIRED, "lanes": False},
    )
)  # fmt: skip


# -- gather ------------------------------------------------------------------------------------------------------


def _infer_gather(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, indices = types
    common.require(indices.dtype in ("int32", "int64"), f"indices are {indices.dtype}, not int32 or int64")
    common.require_dtype(x, ANY)
    axis = common.axis_of(attrs["axis"], x.rank)
    return (TensorType((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype, x.space),)


def _gather(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, indices = arrays
    size = x.shape[attrs["axis"]]
    wrapped = np.where(indices < 0, indices + size, indices)
    return (np.take(x, np.clip(wrapped, 0, size - 1), axis=attrs["axis"]),)


def _lower_gather(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    x, indices = tensors
    axis, rank = common.axis_of(attrs["axis"], len(x.shape)), len(indices.shape)
    size = as_expr(x.shape[axis])

    def element(*out: Expr) -> Expr:
        raw: Expr = indices.at(out[axis : axis + rank])
        index = raw if raw.dtype == "int64" else Cast(raw, "int64")
        wrapped = select(index < 0, index + size, index)
        # Memory stays safe whatever the indices are.
        safe = minimum(maximum(wrapped, 0), size - 1)
        return _unless_empty(x.shape[axis], common.read(x, (*out[:axis], safe, *out[axis + rank :])))

    return (common.elementwise(types[0], "gather", element),)


registry.register(OpDef("gather", INJECTIVE, _infer_gather, _gather, _lower_gather, {"axis": 0}, (2, 2)))
