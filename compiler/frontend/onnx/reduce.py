"""Converters of reductions and of softmax."""

from __future__ import annotations

import math

from kedge.compiler.dtypes import FLOATS
from kedge.compiler.frontend.onnx.elementwise import scalar
from kedge.compiler.frontend.onnx.node import Converter, Node, converter
from kedge.compiler.graph.ir import Value


def _axes(node: Node) -> tuple[int, ...] | None:
    """The axes to reduce, an attribute in older opsets and an input in newer ones; None for all, () for none."""
    axes = tuple(node.ints(1, "axes")) if node.has(1) else tuple(node.attr("axes", ()))
    if axes:
        return axes
    return () if node.attr("noop_with_empty_axes", 0) else None


def _reduce(node: Node, op: str, x: Value) -> Value:
    axes = _axes(node)
    if axes == ():
        return x
    return node.emit(op, x, axes=axes, keepdims=bool(node.attr("keepdims", 1)))


def _plain(op: str) -> Converter:
    return lambda node: _reduce(node, op, node.value(0))


for _name, _op in {"ReduceSum": "reduce_sum", "ReduceProd": "reduce_prod"}.items():
    converter(_name)(_plain(_op))


@converter("ReduceMean")
def _reduce_mean(node: Node) -> Value:
    x = node.value(0)
    if x.type.dtype in FLOATS or _axes(node) == ():
        return _reduce(node, "reduce_mean", x)
    axes = _axes(node)
    rank = x.type.rank
    if axes is not None and not all(-rank <= axis < rank for axis in axes):
        raise node.error(f"axes {list(axes)} are outside of rank {rank}")
    counted = x.type.shape if axes is None else [x.type.shape[axis] for axis in axes]
    count = math.prod(dim for dim in counted if isinstance(dim, int))
    if not all(isinstance(dim, int) for dim in counted) or count == 0:
        raise node.error(f"the mean of {x.type.dtype} is over a free or empty dim", hint="cast the input to float32")
    return node.emit("div", _reduce(node, "reduce_sum", x), node.constant(count, x.type.dtype))


def _extreme(op: str) -> Converter:
    def convert(node: Node) -> Value:
        x = node.value(0)
        if x.type.dtype != "bool":
            return _reduce(node, op, x)
        # Bools since opset 20: false is less than true.
        return node.emit("cast", _reduce(node, op, node.emit("cast", x, dtype="uint8")), dtype="bool")

    return convert


converter("ReduceMax")(_extreme("reduce_max"))
converter("ReduceMin")(_extreme("reduce_min"))


@converter("ReduceL1")
def _reduce_l1(node: Node) -> Value:
    return _reduce(node, "reduce_sum", node.emit("abs", node.value(0)))


@converter("ReduceL2")
def _reduce_l2(node: Node) -> Value:
    return node.emit("sqrt", _sum_of_squares(node))


@converter("ReduceSumSquare")
def _reduce_sum_square(node: Node) -> Value:
    return _sum_of_squares(node)


def _sum_of_squares(node: Node) -> Value:
    x = node.value(0)
    return _reduce(node, "reduce_sum", node.emit("mul", x, x))


@converter("ReduceLogSum")
def _reduce_log_sum(node: Node) -> Value:
    return node.emit("log", _reduce(node, "reduce_sum", node.value(0)))


@converter("ReduceLogSumExp")
def _reduce_log_sum_exp(node: Node) -> Value:
    """log(sum(exp(x))) with the largest element taken out first, so that nothing overflows; but for an infinite one.

    An infinity less itself is NaN: where that is the largest, the sum is of 0s or has infinities in any case.
    """
    x = node.value(0)
    axes = _axes(node)
    if axes == ():
        return x
    largest = node.emit("reduce_max", x, axes=axes, keepdims=True)
    finite = node.emit("less", node.emit("abs", largest), scalar(node, float("inf"), x))
    largest = node.emit("where", finite, largest, scalar(node, 0, x))
    total = node.emit("reduce_sum", node.emit("exp", node.emit("sub", x, largest)), axes=axes, keepdims=True)
    result = node.emit("add", node.emit("log", total), largest)
    if node.attr("keepdims", 1):
        return result
    return node.emit("squeeze", result, axes=axes if axes is not None else tuple(range(x.type.rank)))


def _arg(op: str) -> Converter:
    return lambda node: node.emit(
        op,
        node.value(0),
        axis=int(node.attr("axis", 0)),
        keepdims=bool(node.attr("keepdims", 1)),
        select_last=bool(node.attr("select_last_index", 0)),
    )


converter("ArgMax")(_arg("argmax"))
converter("ArgMin")(_arg("argmin"))


@converter("Softmax")
def _softmax(node: Node) -> Value:
    return node.emit("softmax", node.value(0), axis=int(node.attr("axis", -1)))


@converter("LogSoftmax")
def _log_softmax(node: Node) -> Value:
    return node.emit("log_softmax", node.value(0), axis=int(node.attr("axis", -1)))
