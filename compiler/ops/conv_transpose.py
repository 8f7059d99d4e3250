"""Transposed convolution: each input element adds its multiple of the kernel to the output, `strides` apart.

The transpose of the linear map that `conv` with the same attributes is (Dumoulin and Visin, "A guide to convolution
arithmetic for deep learning", 2016, section 4). The graph rewrites it into a convolution where it can
(`kedge.compiler.graph.passes.subpixel`); here is the form that takes every stride and dilation: each output element
gathers the input elements that reach it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from kedge.compiler import te
from kedge.compiler.graph.dims import evaluate, format_dim, plain
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry, windows
from kedge.compiler.ops.conv import agree, weight_shape
from kedge.compiler.ops.registry import Array, FusionKind, OpDef
from kedge.compiler.ops.windows import Windows
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Dim, Expr, as_expr, const, eq, logical_and, select


def extra_of(attrs: Attrs, rank: int) -> tuple[int, ...]:
    """The elements that `output_padding` adds at the end of each spatial axis; raises `ShapeError` on a wrong value."""
    given = attrs["output_padding"]
    result = (0,) * rank if given is None else tuple(given)
    common.require(
        len(result) == rank and all(value >= 0 for value in result),
        f"output_padding {result} must be {rank} numbers that are not negative",
    )
    return result


def output(window: Windows, extra: Sequence[int], sizes: Sequence[Dim]) -> tuple[Dim, ...]:
    """The spatial shape of the result of an input with the spatial shape `sizes`."""
    result = []
    for axis, size in enumerate(sizes):
        room = window.reach[axis] + extra[axis] - window.begins[axis] - window.ends[axis]
        dim = plain((as_expr(size) - 1) * window.strides[axis] + room)
        common.require(
            not isinstance(dim, int) or dim >= 0,
            f"pads {window.begins[axis]} and {window.ends[axis]} cut off more than the result of spatial axis {axis}",
        )
        result.append(dim)
    return tuple(result)


def _infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, groups, shape = types[0], attrs["groups"], weight_shape(types)
    common.require(
        groups > 0 and same_dim(x.shape[1], shape[0]) and shape[0] % groups == 0,
        f"weight {tuple(shape)} and groups={groups} want {shape[0]} input channels, not {format_dim(x.shape[1])}, and "
        f"{groups} to divide them",
    )
    filters = shape[1] * groups
    if len(types) == 3:
        bias = types[2]
        common.require(bias.rank == 1 and same_dim(bias.shape[0], filters), f"the bias must have shape [{filters}]")
    window = windows.of_attrs(attrs, shape[2:])
    spatial = output(window, extra_of(attrs, len(window.kernel)), x.shape[2:])
    return (TensorType((x.shape[0], filters, *spatial), x.dtype, x.space),)


def _reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, w = common.wide(arrays[0]), common.wide(arrays[1])
    window = windows.of_attrs(attrs, w.shape[2:])
    rank, groups = len(window.kernel), attrs["groups"]
    sizes = [evaluate(dim, {}) for dim in output(window, extra_of(attrs, rank), x.shape[2:])]
    per_group = w.shape[1]
    images = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    filters = w.reshape(groups, -1, *w.shape[1:])
    # Uncropped: as long as what is kept and what pads cut off.
    room = [n + p + q for n, p, q in zip(sizes, window.begins, window.ends, strict=True)]
    whole = np.zeros((x.shape[0], groups * per_group, *room), x.dtype)
    for tap in np.ndindex(*window.kernel):
        part = np.einsum("ngc...,gco->ngo...", images, filters[(..., *tap)])
        reached = [slice(None), slice(None)]
        for t, d, n, s in zip(tap, window.dilations, x.shape[2:], window.strides, strict=True):
            reached.append(slice(t * d, t * d + n * s, s))
        whole[tuple(reached)] += part.reshape(x.shape[0], groups * per_group, *x.shape[2:])
    kept = [slice(None), slice(None), *(slice(p, p + n) for p, n in zip(window.begins, sizes, strict=True))]
    result = whole[tuple(kept)]
    if len(arrays) == 3:
        result = result + common.wide(arrays[2]).reshape(-1, *[1] * rank)
    return (np.ascontiguousarray(result).astype(arrays[0].dtype),)


def _lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    x, w = tensors[:2]
    channels, per_group, *kernel = (int(str(dim)) for dim in w.shape)
    window, groups = windows.of_attrs(attrs, kernel), attrs["groups"]
    channel, taps = te.reduce_axis(channels // groups, "c"), window.axes()

    def body(n: Expr, o: Expr, *out: Expr) -> Expr:
        at, guards = [], []
        for axis, (index, tap) in enumerate(zip(out, taps, strict=True)):
            stride = window.strides[axis]
            reached = index + window.begins[axis] - tap * window.dilations[axis]
            source = reached // stride
            guards += [eq(reached % stride, 0)] if stride > 1 else []
            guards.append(common.inside(source, x.shape[2 + axis]))
            at.append(source)
        first = const(0) if groups == 1 else o // per_group * (channels // groups)
        value = common.read(x, (n, first + channel, *at))
        factor = common.read(w, (first + channel, o % per_group, *taps))
        return te.sum(select(logical_and(*guards), value * factor, const(0, value.dtype)), [channel, *taps])

    result = te.compute(types[0].shape, body, name="conv_transpose")
    if len(tensors) == 3:
        bias = tensors[2]
        return (common.elementwise(types[0], "bias_add", lambda *i: result.at(i) + common.read(bias, i[1:2])),)
    if result.dtype != types[0].dtype:
        return (common.elementwise(types[0], "conv_cast", lambda *i: result.at(i)),)
    return (result,)


registry.register(
    OpDef(
        "conv_transpose", FusionKind.CONTRACTION, _infer, _reference, _lower,
        {"strides": None, "pads": None, "dilations": None, "groups": 1, "output_padding": None}, (2, 3),
        agree=partial(agree, turned=True),
    )
)  # fmt: skip
