"""Converters of normalisation over groups of elements: statistics of the data itself, which are computed each time."""

from __future__ import annotations

from collections.abc import Sequence

from kedge.compiler.dtypes import HALVES
from kedge.compiler.frontend.onnx.node import Node, converter
from kedge.compiler.graph.dims import divide, format_dim
from kedge.compiler.graph.ir import Value


def _deviation(node: Node, x: Value, axes: Sequence[int]) -> tuple[Value, Value]:
    """x - mean over `axes`, and the mean."""
    mean = node.emit("reduce_mean", x, axes=tuple(axes), keepdims=True)
    return node.emit("sub", x, mean), mean


def _inverse_root(node: Node, x: Value, axes: Sequence[int], epsilon: float) -> Value:
    """1 / sqrt(mean of squares over `axes` + epsilon)."""
    squares = node.emit("reduce_mean", node.emit("mul", x, x), axes=tuple(axes), keepdims=True)
    return node.emit("rsqrt", node.emit("add", squares, node.constant(epsilon, x.type.dtype)))


def _wide(node: Node, x: Value) -> Value:
    """Statistics of floats of 16 bits are computed in float32, as `stash_type` says."""
    return node.emit("cast", x, dtype="float32") if x.type.dtype in HALVES else x


def _narrow(node: Node, x: Value, like: Value) -> Value:
    return x if x.type.dtype == like.type.dtype else node.emit("cast", x, dtype=like.type.dtype)


def _require_images(node: Node, x: Value) -> None:
    if x.type.rank < 3:
        raise node.error(f"its input has rank {x.type.rank}; it needs (N, C, spatial dims…)")


def _epsilon(node: Node) -> float:
    return float(node.attr("epsilon", 1e-5))


@converter("InstanceNormalization")
def _instance_normalization(node: Node) -> Value:
    """(x - mean) / sqrt(var + epsilon) * scale + bias, the statistics over the spatial dims of each image."""
    x, scale, bias = node.values()
    _require_images(node, x)
    axes = range(2, x.type.rank)
    deviation, _ = _deviation(node, _wide(node, x), axes)
    normal = _narrow(node, node.emit("mul", deviation, _inverse_root(node, deviation, axes, _epsilon(node))), x)
    per_channel = tuple(range(1, x.type.rank - 1))
    scaled = node.emit("mul", normal, node.emit("unsqueeze", scale, axes=per_channel))
    return node.emit("add", scaled, node.emit("unsqueeze", bias, axes=per_channel))


def _last_axes(node: Node, x: Value) -> range:
    axis = int(node.attr("axis", -1))
    if not -x.type.rank <= axis < x.type.rank:
        raise node.error(f"axis {axis} is outside of rank {x.type.rank}")
    return range(axis % x.type.rank, x.type.rank)


@converter("LayerNormalization")
def _layer_normalization(node: Node) -> tuple[Value, ...]:
    """(x - mean) / sqrt(var + epsilon) * scale + bias over the dims from `axis` on; mean and 1 / sqrt(…) as well."""
    x = node.value(0)
    axes = _last_axes(node, x)
    deviation, mean = _deviation(node, _wide(node, x), axes)
    inverse = _inverse_root(node, deviation, axes, _epsilon(node))
    result = node.emit("mul", _narrow(node, node.emit("mul", deviation, inverse), x), node.value(1))
    if node.has(2):
        result = node.emit("add", result, node.value(2))
    return result, mean, inverse


@converter("RMSNormalization")
def _rms_normalization(node: Node) -> Value:
    """x / sqrt(mean of squares + epsilon) * scale over the dims from `axis` on."""
    x = node.value(0)
    wide = _wide(node, x)
    normal = node.emit("mul", wide, _inverse_root(node, wide, _last_axes(node, x), _epsilon(node)))
    return node.emit("mul", _narrow(node, normal, x), node.value(1))


@converter("GroupNormalization")
def _group_normalization(node: Node) -> Value:
    """As InstanceNormalization, with statistics over groups of channels; scale and bias are per channel.

    ONNX deprecates the operator of opsets before 21, whose scale and bias are per group; its checker refuses it.
    """
    x, scale, bias = node.values()
    _require_images(node, x)
    batch, channels, *spatial = x.type.shape
    groups = int(node.attr("num_groups"))
    per_group = divide([channels], [groups]) if groups > 0 else None
    if per_group is None:
        raise node.error(f"{format_dim(channels)} channels are not a multiple of num_groups {groups}")
    apart = node.emit("reshape", x, shape=(batch, groups, per_group, *spatial))
    axes = range(2, apart.type.rank)
    deviation, _ = _deviation(node, _wide(node, apart), axes)
    normal = _narrow(node, node.emit("mul", deviation, _inverse_root(node, deviation, axes, _epsilon(node))), x)
    shape = (groups, per_group, *(1 for _ in spatial))
    scaled = node.emit("mul", normal, node.emit("reshape", scale, shape=shape))
    shifted = node.emit("add", scaled, node.emit("reshape", bias, shape=shape))
    return node.emit("reshape", shifted, shape=x.type.shape)


@converter("LpNormalization")
def _lp_normalization(node: Node) -> Value:
    """x over its 1- or 2-norm along `axis`; rows of zeros stay."""
    x = node.value(0)
    axis, order = int(node.attr("axis", -1)), int(node.attr("p", 2))
    if order not in (1, 2):
        raise node.error(f"p is {order}", hint="it is 1 or 2")
    powers = node.emit("abs", x) if order == 1 else node.emit("mul", x, x)
    norm = node.emit("reduce_sum", powers, axes=(axis,), keepdims=True)
    norm = norm if order == 1 else node.emit("sqrt", norm)
    is_zero = node.emit("equal", norm, node.constant(0, x.type.dtype))
    return node.emit("div", x, node.emit("where", is_zero, node.constant(1, x.type.dtype), norm))
