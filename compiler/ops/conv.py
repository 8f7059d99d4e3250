"""Convolution (cross-correlation, as in every framework) over any number of spatial axes, grouped or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kedge.compiler import te
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry, windows
from kedge.compiler.ops.registry import Agreement, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Dim, Expr, const


def weight_shape(types: Sequence[TensorType]) -> list[int]:
    """The known shape of the weight of a convolution, transposed or not, over its input; raises `ShapeError`."""
    x, w = types[:2]
    common.require_same_dtype(types)
    common.require_dtype(x, common.NUMBERS)
    common.require(x.rank >= 3, "the input must have rank 3 or more: batch, channels, spatial axes")
    common.require(w.rank == x.rank, f"the weight has rank {w.rank}, the input {x.rank}")
    shape = [dim for dim in w.shape if isinstance(dim, int)]
    common.require(len(shape) == w.rank, "the weight's shape must be known")
    return shape


def _infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, groups, shape = types[0], attrs["groups"], weight_shape(types)
    common.require(
        groups > 0 and same_dim(x.shape[1], shape[1] * groups) and shape[0] % groups == 0,
        f"weight {tuple(shape)} and groups={groups} want {shape[1] * groups} input channels and {groups} to divide "
        f"the {shape[0]} output channels",
    )
    if len(types) == 3:
        bias = types[2]
        common.require(bias.rank == 1 and same_dim(bias.shape[0], shape[0]), f"the bias must have shape [{shape[0]}]")
    spatial = windows.of_attrs(attrs, shape[2:]).output(x.shape[2:])
    return (TensorType((x.shape[0], shape[0], *spatial), x.dtype, x.space),)


def _reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, w = common.wide(arrays[0]), common.wide(arrays[1])
    window = windows.of_attrs(attrs, w.shape[2:])
    rank, groups = len(window.kernel), attrs["groups"]
    slid = windows.view(windows.pad_array(x, window, 0), window)
    parts = []
    for part, weight in zip(np.split(slid, groups, axis=1), np.split(w, groups, axis=0), strict=True):
        # (N, C, outputs…, taps…) with (O, C, taps…) over C and taps, then O back to axis 1.
        taps = [1, *range(2 + rank, 2 + 2 * rank)]
        product = np.tensordot(part, weight, axes=(taps, [1, *range(2, 2 + rank)]))
        parts.append(np.moveaxis(product, -1, 1))
    result = np.concatenate(parts, axis=1)
    if len(arrays) == 3:
        result = result + common.wide(arrays[2]).reshape(-1, *[1] * rank)
    return (result.astype(arrays[0].dtype),)


def _lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    x, w = tensors[:2]
    filters, per_group, *kernel = (int(str(dim)) for dim in w.shape)
    window = windows.of_attrs(attrs, kernel)
    source = windows.pad_tensor(x, window, 0) if window.padded else x
    unpadded = replace(window, begins=(0,) * len(kernel), ends=(0,) * len(kernel))
    channel, taps = te.reduce_axis(per_group, "c"), window.axes()
    axes = taps if per_group == 1 else [channel, *taps]  # no loop over one channel

    def body(n: Expr, o: Expr, *out: Expr) -> Expr:
        within: Expr | int = 0 if per_group == 1 else channel
        at = [unpadded.position(axis, index, tap) for axis, (index, tap) in enumerate(zip(out, taps, strict=True))]
        group = _group(o, filters // attrs["groups"], attrs["groups"])
        first = group if per_group == 1 else group * per_group
        value = common.read(source, (n, within if attrs["groups"] == 1 else first + within, *at))
        return te.sum(value * common.read(w, (o, within, *taps)), axes)

    result = te.compute(types[0].shape, body, name="conv")
    if len(tensors) == 3:
        bias = tensors[2]
        return (common.elementwise(types[0], "bias_add", lambda *i: result.at(i) + common.read(bias, i[1:2])),)
    if result.dtype != types[0].dtype:
        return (common.elementwise(types[0], "conv_cast", lambda *i: result.at(i)),)
    return (result,)


def _group(o: Expr, per_group: int, groups: int) -> Expr:
    """The group of output channel `o`."""
    if groups == 1:
        return const(0)
    return o if per_group == 1 else o // per_group


def agree(shapes: Sequence[Sequence[Dim]], attrs: Attrs, *, turned: bool = False) -> Iterator[Agreement]:
    """What the weight of a convolution (`turned`: a transposed one) says of its input's channels, and of its bias."""
    if len(shapes) < 2 or len(shapes[0]) != len(shapes[1]) or len(shapes[1]) < 3:
        return
    first, second = shapes[1][:2]
    if not (isinstance(first, int) and isinstance(second, int)):
        return
    in_groups = second * attrs.get("groups", 1)
    channels, filters = (first, in_groups) if turned else (in_groups, first)
    yield Agreement(((0, 1 - len(shapes[0])),), size=channels)
    if len(shapes) == 3 and len(shapes[2]) == 1:
        yield Agreement(((2, -1),), size=filters)


registry.register(
    OpDef(
        "conv", FusionKind.CONTRACTION, _infer, _reference, _lower,
        {"strides": None, "pads": None, "dilations": None, "groups": 1}, (2, 3), agree=agree,
    )
)  # fmt: skip
