"""Converters of convolution and pooling, and the arithmetic of their windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.frontend.onnx.node import Node, converter
from kedge.compiler.graph.dims import format_dim, plain
from kedge.compiler.graph.ir import Value
from kedge.compiler.tir.expr import Dim, as_expr, ceildiv, maximum


@converter("Conv")
def _conv(node: Node) -> Value:
    x, weight = node.value(0), node.value(1)
    _require_image(node, x)
    kernel = _kernel(node, weight)
    strides, dilations = _per_axis(node, "strides", x), _per_axis(node, "dilations", x)
    x, pads = _padded(node, x, kernel, strides, dilations, 0)
    operands = [x, weight, node.value(2)] if node.has(2) else [x, weight]
    groups = int(node.attr("group", 1))
    return node.emit("conv", *operands, strides=strides, pads=pads, dilations=dilations, groups=groups)


@converter("ConvTranspose")
def _conv_transpose(node: Node) -> Value:
    x, weight = node.value(0), node.value(1)
    _require_image(node, x)
    kernel = _kernel(node, weight)
    strides, dilations = _per_axis(node, "strides", x), _per_axis(node, "dilations", x)
    added = _per_axis(node, "output_padding", x, default=0)
    pads, added = _transposed_pads(node, x, kernel, strides, dilations, added)
    operands = [x, weight, node.value(2)] if node.has(2) else [x, weight]
    return node.emit(
        "conv_transpose", *operands, strides=strides, pads=pads, dilations=dilations, output_padding=added,
        groups=int(node.attr("group", 1)),
    )  # fmt: skip


def _transposed_pads(
    node: Node, x: Value, kernel: Sequence[Dim], strides: Sequence[int], dilations: Sequence[int], added: Sequence[int]
) -> tuple[tuple[Dim, ...], tuple[int, ...]]:
    """What is cut off, all begins and then all ends, and what is added at the ends, to get the shape asked for."""
    spatial = x.type.shape[2:]
    auto = node.attr("auto_pad", "NOTSET")
    asked = node.attr("output_shape")
    if asked is None and not auto.startswith("SAME"):
        return _pads(node, x, kernel, strides, dilations), tuple(added)
    if asked is not None and len(asked) not in (len(spatial), x.type.rank):
        raise node.error(f"output_shape {list(asked)} has {len(asked)} entries for {len(spatial)} spatial dims")
    totals = []
    for axis, (size, extent) in enumerate(zip(spatial, kernel, strict=True)):
        if not isinstance(extent, int):
            raise node.error("the size of its kernel is not known while compiling")
        wanted: Dim = plain(as_expr(size) * strides[axis]) if asked is None else asked[axis - len(spatial)]
        whole = (as_expr(size) - 1) * strides[axis] + added[axis] + (extent - 1) * dilations[axis] + 1
        total = plain(whole - wanted)
        if not isinstance(total, int):
            raise node.error(
                f"output_shape {list(asked)} of an input with the free spatial dim {format_dim(size)}",
                hint="fix the spatial dims: shapes={...} or --shape NAME=1,3,224,224, or export with explicit pads",
            )
        totals.append(total)
    # Where the shape asked for is larger than what there is, zeros follow at the end.
    beyond = tuple(extra + max(-total, 0) for extra, total in zip(added, totals, strict=True))
    return _shared_out(totals, larger_first=auto != "SAME_UPPER"), beyond


@converter("MaxPool")
def _max_pool(node: Node) -> Value:
    if node.wants(1):
        raise node.error("its second output (Indices) is used", hint="kedge computes the maxima only")
    x = node.value(0)
    least = -math.inf if x.type.dtype in FLOATS else int(np.iinfo(x.type.dtype).min)
    return _pool(node, "max_pool", x, least)


@converter("AveragePool")
def _average_pool(node: Node) -> Value:
    x = node.value(0)
    _require_image(node, x)
    counted = bool(node.attr("count_include_pad", 0))
    if counted or all(isinstance(pad, int) for pad in _pads(node, x, *_taps(node, x))):
        return _pool(node, "avg_pool", x, 0, count_include_pad=counted)
    # The padding becomes part of the input: what share of each window is none is the mean of ones, padded alike.
    ones = node.emit("broadcast_to", node.constant(1, x.type.dtype), shape=(1, 1, *x.type.shape[2:]))
    means = [_pool(node, "avg_pool", each, 0, count_include_pad=True) for each in (x, ones)]
    return node.emit("div", *means)


def _taps(node: Node, x: Value) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Size, strides and dilations of a pooling operator's windows."""
    return tuple(node.attr("kernel_shape")), _per_axis(node, "strides", x), _per_axis(node, "dilations", x)


def _pool(node: Node, op: str, x: Value, padding: float, **attrs: bool) -> Value:
    """Windows of `x`; `padding` is the value that padding counts as, where it counts."""
    _require_image(node, x)
    kernel, strides, dilations = _taps(node, x)
    x, pads = _padded(node, x, kernel, strides, dilations, padding)
    # With auto_pad the number of windows is given by the padding alone.
    ceil_mode = bool(node.attr("ceil_mode", 0)) and node.attr("auto_pad", "NOTSET") == "NOTSET"
    return node.emit(
        op, x, kernel=kernel, strides=strides, pads=pads, dilations=dilations, ceil_mode=ceil_mode, **attrs
    )


@converter("GlobalAveragePool")
def _global_average_pool(node: Node) -> Value:
    return _global(node, "reduce_mean")


@converter("GlobalMaxPool")
def _global_max_pool(node: Node) -> Value:
    return _global(node, "reduce_max")


def _global(node: Node, op: str) -> Value:
    x = node.value(0)
    _require_image(node, x)
    return node.emit(op, x, axes=tuple(range(2, x.type.rank)), keepdims=True)


@converter("LpPool")
def _lp_pool(node: Node) -> Value:
    """(sum of |x| ** p over a window) ** (1 / p); padding counts nothing."""
    order = int(node.attr("p", 2))
    powers = _powers(node, node.value(0), order)
    mean = _pool(node, "avg_pool", powers, 0, count_include_pad=True)
    taps = math.prod(node.attr("kernel_shape"))
    if bool(node.attr("ceil_mode", 0)):
        raise node.error("ceil_mode is not supported", hint="export it with pads instead")
    return _root(node, node.emit("mul", mean, node.constant(taps, mean.type.dtype)), order)


@converter("GlobalLpPool")
def _global_lp_pool(node: Node) -> Value:
    x, order = node.value(0), int(node.attr("p", 2))
    _require_image(node, x)
    axes = tuple(range(2, x.type.rank))
    return _root(node, node.emit("reduce_sum", _powers(node, x, order), axes=axes, keepdims=True), order)


def _powers(node: Node, x: Value, order: int) -> Value:
    if order == 2:
        return node.emit("mul", x, x)
    size = node.emit("abs", x)
    return size if order == 1 else node.emit("pow", size, node.constant(order, x.type.dtype))


def _root(node: Node, x: Value, order: int) -> Value:
    if order == 2:
        return node.emit("sqrt", x)
    return x if order == 1 else node.emit("pow", x, node.constant(1 / order, x.type.dtype))


def _require_image(node: Node, x: Value) -> None:
    if x.type.rank < 3:
        raise node.error(f"its input has rank {x.type.rank}; it needs (N, C, spatial dims…)")


def _kernel(node: Node, weight: Value) -> tuple[Dim, ...]:
    """The spatial shape of a weight; what the node says of it must be the same."""
    kernel = weight.type.shape[2:]
    stated = node.attr("kernel_shape")
    if stated is not None and list(stated) != list(kernel):
        raise node.error(f"kernel_shape {list(stated)} is not that of the weight, {list(kernel)}")
    return kernel


def _per_axis(node: Node, name: str, x: Value, default: int = 1) -> tuple[int, ...]:
    """The attribute `name` with one entry for each spatial dim; `default` where it is left out."""
    spatial = x.type.rank - 2
    given = tuple(node.attr(name, (default,) * spatial))
    if len(given) != spatial:
        raise node.error(f"{name} {list(given)} has {len(given)} entries for {spatial} spatial dims")
    return given


def _padded(
    node: Node, x: Value, kernel: Sequence[Dim], strides: Sequence[int], dilations: Sequence[int], value: float
) -> tuple[Value, tuple[Dim, ...]]:
    """The input and the padding of its windows; what depends on free dims is joined to the input as `value`."""
    pads = _pads(node, x, kernel, strides, dilations)
    if all(isinstance(pad, int) for pad in pads):
        return x, pads
    spatial = len(pads) // 2
    wide = node.emit("pad", x, pads=(0, 0, *pads[:spatial], 0, 0, *pads[spatial:]), value=value)
    return wide, (0,) * len(pads)


def _pads(
    node: Node, x: Value, kernel: Sequence[Dim], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[Dim, ...]:
    """The padding, all begins and then all ends, with `auto_pad` worked out."""
    spatial = x.type.shape[2:]
    auto = node.attr("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = tuple(node.attr("pads", (0,) * (2 * len(spatial))))
        if len(pads) != 2 * len(spatial):
            raise node.error(f"pads {list(pads)} has {len(pads)} entries for {len(spatial)} spatial dims")
        return pads
    if auto == "VALID":
        return (0,) * (2 * len(spatial))
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        raise node.error(f"auto_pad is {auto!r}", hint="it is NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    totals = [
        _same_padding(node, size, extent, stride, dilation)
        for size, extent, stride, dilation in zip(spatial, kernel, strides, dilations, strict=True)
    ]
    return _shared_out(totals, larger_first=auto == "SAME_LOWER")


def _shared_out(totals: Sequence[Dim], *, larger_first: bool) -> tuple[Dim, ...]:
    """Halves of each total (0 where it is negative), all begins and then all ends."""
    kept = [max(total, 0) if isinstance(total, int) else total for total in totals]
    smaller = [plain(as_expr(total) // 2) for total in kept]
    larger = [plain(as_expr(total) - half) for total, half in zip(kept, smaller, strict=True)]
    return (*larger, *smaller) if larger_first else (*smaller, *larger)


def _same_padding(node: Node, size: Dim, kernel: Dim, stride: int, dilation: int) -> Dim:
    """How much padding makes the result ceil(size / stride) long."""
    if not isinstance(kernel, int):
        raise node.error("the size of its kernel is not known while compiling")
    reach = (kernel - 1) * dilation + 1
    if stride == 1 or reach == 1:
        return reach - 1
    total = plain((ceildiv(as_expr(size), stride) - 1) * stride + reach - size)
    # Only windows with gaps between them can end before the input does.
    return total if reach >= stride else plain(maximum(as_expr(total), 0))
