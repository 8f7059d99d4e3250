"""Max and average pooling over any number of spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np

from kedge.compiler import te
from kedge.compiler.dtypes import FLOATS
from kedge.compiler.graph.ir import Attrs, TensorType
from kedge.compiler.ops import common, registry, windows
from kedge.compiler.ops.blocked import block, unblock
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.ops.windows import Windows
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Dim, Expr, as_expr, const, logical_and, minimum, select

#: With `lanes`, x is blocked, (N, C/c, S…, c): see `ops.blocked`.
_ATTRS = {"kernel": REQUIRED, "strides": None, "pads": None, "dilations": None, "ceil_mode": False, "lanes": False}


def _windows(attrs: Attrs) -> Windows:
    result = windows.of_attrs(attrs, attrs["kernel"], ceil_mode=attrs["ceil_mode"])
    for reach, before, after in zip(result.reach, result.begins, result.ends, strict=True):
        common.require(before < reach and after < reach, f"pads {attrs['pads']} would make windows of padding only")
    return result


def _infer_with(allowed: frozenset[str], types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x = types[0]
    common.require_dtype(x, allowed)
    rank, lanes = len(attrs["kernel"]), int(attrs["lanes"])
    wanted = rank + 2 + lanes
    common.require(rank >= 1 and x.rank == wanted, f"a kernel of {rank} dims wants an input of rank {wanted}")
    spatial = _windows(attrs).output(x.shape[2 : 2 + rank])
    return (TensorType((*x.shape[:2], *spatial, *x.shape[2 + rank :]), x.dtype, x.space),)


def _infer_max(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    return _infer_with(common.NUMBERS, types, attrs)


def _infer_avg(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    return _infer_with(FLOATS, types, attrs)


def _tap_axes(x: Array, window: Windows) -> tuple[int, ...]:
    return tuple(range(x.ndim, x.ndim + len(window.kernel)))


def _blockwise(pool: Callable[[Array, Attrs], Array]) -> Callable[[Sequence[Array], Attrs], tuple[Array, ...]]:
    """The reference that takes blocked arrays apart before `pool` and puts its result together again."""

    def reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
        (x,) = arrays
        if not attrs["lanes"]:
            return (pool(x, attrs),)
        return (np.ascontiguousarray(block(pool(unblock(x), attrs), x.shape[-1])),)

    return reference


def _max_pool(x: Array, attrs: Attrs) -> Array:
    window = _windows(attrs)
    slid = windows.view(windows.pad_array(x, window, common.lowest(str(x.dtype))), window)
    return np.asarray(slid.max(axis=_tap_axes(x, window)))


def _avg_pool(given: Array, attrs: Attrs) -> Array:
    x = common.wide(given)
    window = _windows(attrs)
    rank = len(window.kernel)
    ones = np.ones(x.shape[2:], x.dtype)
    if attrs["count_include_pad"]:
        ones = np.pad(ones, list(zip(window.begins, window.ends, strict=True)), constant_values=1)
        unpadded = Windows(window.kernel, window.strides, window.dilations, (0,) * rank, (0,) * rank, window.ceil_mode)
        counted = windows.view(_pad_to(ones, window, x.shape[2:]), unpadded)
    else:
        counted = windows.view(windows.pad_array(ones, window, 0), window)
    totals = windows.view(windows.pad_array(x, window, 0), window).sum(axis=_tap_axes(x, window))
    counts = counted.sum(axis=tuple(range(rank, 2 * rank)))
    return np.asarray((totals / counts).astype(given.dtype))


def _pad_to(ones: Array, window: Windows, sizes: tuple[int, ...]) -> Array:
    """`ones` (already padded) followed by the zeros that the last windows of ceil_mode reach over."""
    widths = []
    for axis, count in enumerate(window.output(sizes)):
        needed = (int(str(count)) - 1) * window.strides[axis] + window.reach[axis]
        widths.append((0, max(0, needed - ones.shape[axis])))
    return np.pad(ones, widths)


def _lower_max(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    window = _windows(attrs)
    taps = window.axes()
    fill = const(common.lowest(x.dtype), common.wide_dtype(x.dtype))
    return (
        common.reduction(types[0], "max_pool", te.max, lambda *out: _tap(x, window, out, taps, fill), taps),
    )  # fmt: skip


def _lower_avg(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    window = _windows(attrs)
    taps = window.axes()
    dtype = common.wide_dtype(x.dtype)
    zero = const(0, dtype)
    totals = te.compute(
        types[0].shape, lambda *out: te.sum(_tap(x, window, out, taps, zero), taps), name="pool_sum"
    )  # fmt: skip

    def mean(*indices: Expr) -> Expr:
        if not window.padded or (attrs["count_include_pad"] and not window.ceil_mode):
            return totals.at(indices) * const(1 / reduce(lambda a, b: a * b, window.kernel), dtype)
        counts = [
            _taps(window, axis, indices[2 + axis], x.shape[2 + axis], attrs) for axis in range(len(window.kernel))
        ]
        return totals.at(indices) / common.cast(reduce(lambda a, b: a * b, counts), dtype)

    return (common.elementwise(types[0], "avg_pool", mean),)


def _tap(
    x: Tensor, window: Windows, out: Sequence[Expr], taps: Sequence[te.ReduceAxis], fill: Expr
) -> Expr:  # fmt: skip
    """The input under one tap of a window, `fill` where that is padding."""
    end = 2 + len(taps)
    at = [window.position(axis, i, tap) for axis, (i, tap) in enumerate(zip(out[2:end], taps, strict=True))]
    value = common.read(x, (*out[:2], *at, *out[end:]))
    guards = [
        common.inside(index, size) for axis, (index, size) in enumerate(zip(at, x.shape[2:end], strict=True))
        if window.ceil_mode or window.begins[axis] or window.ends[axis]
    ]  # fmt: skip
    return select(logical_and(*guards), value, fill) if guards else value


def _taps(window: Windows, axis: int, out: Expr, size: Dim, attrs: Attrs) -> Expr:
    if attrs["count_include_pad"]:
        end = as_expr(size) + window.ends[axis]
        return windows.taps_inside(window, axis, out, -window.begins[axis], end)
    return minimum(windows.taps_inside(window, axis, out, 0, as_expr(size)), window.kernel[axis])


registry.register(OpDef("max_pool", FusionKind.REDUCTION, _infer_max, _blockwise(_max_pool), _lower_max, _ATTRS))
registry.register(
    OpDef(
        "avg_pool", FusionKind.REDUCTION, _infer_avg, _blockwise(_avg_pool), _lower_avg,
        {**_ATTRS, "count_include_pad": False},
    )
)  # fmt: skip
