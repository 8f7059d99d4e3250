"""Convolutions over channels in blocks: what the layout pass makes of `conv`, never what a front end gives.

Blocked, a tensor (N, C, S…) is stored as (N, C/c, S…, c): `c` channels of one place lie together and fill vector
registers (oneDNN's nChw16c, ONNX Runtime's NCHWc). Weights are packed so that the innermost loops read them in order.

The last block may be wider than the channels that are left. What its further lanes hold means nothing: they are
computed like the others, and no sum over channels and no plain tensor takes them in. So infinities and NaN stay where
they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kedge.compiler import te
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry, windows
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Expr, const, select

_WINDOW = {"strides": None, "pads": None, "dilations": None}


# -- dense and grouped -------------------------------------------------------------------------------------------
#
# x (N, I/i, S…, i) and w (O/o, I/groups/i, K…, i, o); or x (N, I, S…) as the front ends have it and w
# (O/o, I/groups, K…, 1, o), for the few channels of an image. With `channels`, x has so many, and no more are read.


def _is_blocked(x: Sequence[object], w: Sequence[object]) -> bool:
    return len(x) == len(w) - 1


def _infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, w = types
    dtype = common.require_same_dtype(types)
    common.require_dtype(x, common.NUMBERS)
    common.require(x.rank in (w.rank - 1, w.rank - 2) and w.rank >= 5, f"x has rank {x.rank}, the weight {w.rank}")
    common.require(w.is_static, "the weight's shape must be known")
    blocks, inner, *kernel, lanes_in, lanes_out = (int(str(dim)) for dim in w.shape)
    groups, blocked = attrs["groups"], _is_blocked(x.shape, w.shape)
    common.require(groups > 0 and blocks % groups == 0, f"groups={groups} must divide the {blocks} blocks of outputs")
    common.require(
        same_dim(x.shape[1], inner * groups) and same_dim(x.shape[-1] if blocked else 1, lanes_in),
        f"the packed weight and groups={groups} want {inner * groups} blocks of {lanes_in} channels",
    )
    channels = attrs["channels"]
    common.require(
        channels is None or (groups == 1 and blocked and 0 < channels <= inner * lanes_in),
        f"{channels} channels in {inner} blocks of {lanes_in}, groups={groups}",
    )
    spatial = windows.of_attrs(attrs, kernel).output(x.shape[2 : 2 + len(kernel)])
    return (TensorType((x.shape[0], blocks, *spatial, lanes_out), dtype, x.space),)


def unblock(array: Array) -> Array:
    """(N, C/c, S…, c) as (N, C, S…)."""
    moved = np.moveaxis(array, -1, 2)
    return moved.reshape(moved.shape[0], moved.shape[1] * moved.shape[2], *moved.shape[3:])


def block(array: Array, lanes: int) -> Array:
    """(N, C, S…) as (N, C/lanes, S…, lanes)."""
    return np.moveaxis(array.reshape(array.shape[0], -1, lanes, *array.shape[2:]), 2, -1)


def _reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, w = arrays
    blocks, inner, *kernel, lanes_in, lanes_out = w.shape
    # (O/o, I/i, K…, i, o) as (O/o, o, I/i, i, K…).
    order = (0, w.ndim - 1, 1, w.ndim - 2, *range(2, w.ndim - 2))
    plain_w = w.transpose(order).reshape(blocks * lanes_out, inner * lanes_in, *kernel)
    plain_x = unblock(x) if _is_blocked(x.shape, w.shape) else x
    channels = attrs["channels"]
    if channels is not None:
        plain_x, plain_w = plain_x[:, :channels], plain_w[:, :channels]
    window = {name: attrs[name] for name in (*_WINDOW, "groups")}
    (result,) = registry.get("conv").reference([plain_x, plain_w], window)
    return (np.ascontiguousarray(block(result, lanes_out)),)


def _lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    x, w = tensors
    blocks, inner, *kernel, lanes_in, _ = (int(str(dim)) for dim in w.shape)
    blocked, groups = _is_blocked(x.shape, w.shape), attrs["groups"]
    window = windows.of_attrs(attrs, kernel)
    source = windows.pad_tensor(x, window, 0) if window.padded else x
    unpadded = replace(window, begins=(0,) * len(kernel), ends=(0,) * len(kernel))
    taps = window.axes()
    channel: Expr
    lane: Expr | int
    if attrs["channels"] is not None:
        number = te.reduce_axis(attrs["channels"], "i")
        channel, lane, axes = number // lanes_in, number % lanes_in, [*taps, number]
    else:
        part, within = te.reduce_axis(inner, "ib"), te.reduce_axis(lanes_in, "ii")
        channel, lane, axes = part, within if blocked else 0, [part, *taps, within] if blocked else [part, *taps]

    def body(n: Expr, ob: Expr, *rest: Expr) -> Expr:
        *out, oo = rest
        at = [unpadded.position(axis, index, tap) for axis, (index, tap) in enumerate(zip(out, taps, strict=True))]
        first: Expr = channel if groups == 1 else ob // (blocks // groups) * inner + channel
        value = common.read(source, (n, first, *at, lane) if blocked else (n, first, *at))
        return te.sum(value * common.read(w, (ob, channel, *taps, lane, oo)), axes)

    return _narrowed(te.compute(types[0].shape, body, name="conv"), types[0])


def _narrowed(result: Tensor, out: TensorType) -> tuple[Tensor, ...]:
    if result.dtype == out.dtype:
        return (result,)
    return (common.elementwise(out, "conv_cast", lambda *i: result.at(i)),)


registry.register(
    OpDef(
        "conv_blocked", FusionKind.CONTRACTION, _infer, _reference, _lower,
        {**_WINDOW, "groups": 1, "channels": None}, (2, 2),
    )
)  # fmt: skip


# -- depthwise: x (N, C/c, S…, c), w (C/c, K…, c) ----------------------------------------------------------------


def _infer_depthwise(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, w = types
    dtype = common.require_same_dtype(types)
    common.require_dtype(x, common.NUMBERS)
    common.require(x.rank == w.rank + 1 and w.rank >= 3, f"x has rank {x.rank}, the packed weight {w.rank}")
    common.require(w.is_static, "the weight's shape must be known")
    blocks, *kernel, lanes = (int(str(dim)) for dim in w.shape)
    common.require(
        same_dim(x.shape[1], blocks) and same_dim(x.shape[-1], lanes),
        f"the packed weight wants {blocks} blocks of {lanes} channels",
    )
    spatial = windows.of_attrs(attrs, kernel).output(x.shape[2:-1])
    return (TensorType((x.shape[0], blocks, *spatial, lanes), dtype, x.space),)


def _depthwise(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, w = arrays
    channels = w.shape[0] * w.shape[-1]
    plain_w = np.moveaxis(w, -1, 1).reshape(channels, 1, *w.shape[1:-1])
    (result,) = registry.get("conv").reference([unblock(x), plain_w], {**attrs, "groups": channels})
    return (np.ascontiguousarray(block(result, w.shape[-1])),)


def _lower_depthwise(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    x, w = tensors
    kernel = [int(str(dim)) for dim in w.shape[1:-1]]
    window = windows.of_attrs(attrs, kernel)
    source = windows.pad_tensor(x, window, 0) if window.padded else x
    unpadded = replace(window, begins=(0,) * len(kernel), ends=(0,) * len(kernel))
    taps = window.axes()

    def body(n: Expr, cb: Expr, *rest: Expr) -> Expr:
        *out, lane = rest
        at = [unpadded.position(axis, index, tap) for axis, (index, tap) in enumerate(zip(out, taps, strict=True))]
        return te.sum(common.read(source, (n, cb, *at, lane)) * common.read(w, (cb, *taps, lane)), taps)

    return _narrowed(te.compute(types[0].shape, body, name="depthwise"), types[0])


registry.register(
    OpDef("depthwise_blocked", FusionKind.CONTRACTION, _infer_depthwise, _depthwise, _lower_depthwise, _WINDOW, (2, 2))
)


# -- where blocks do not divide the channels: x (N, C, S…) and (N, ceil(C/c), S…, c) ------------------------------


def _infer_to_blocks(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    lanes = attrs["lanes"]
    common.require(x.rank >= 2 and isinstance(x.shape[1], int), "the number of channels must be known")
    common.require(lanes > 0, f"a block has at least one lane, not {lanes}")
    blocks = -(-int(str(x.shape[1])) // lanes)
    return (TensorType((x.shape[0], blocks, *x.shape[2:], lanes), x.dtype, x.space),)


def _to_blocks(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    (x,) = arrays
    lanes = attrs["lanes"]
    widths = [(0, 0), (0, -x.shape[1] % lanes), *[(0, 0)] * (x.ndim - 2)]
    return (np.ascontiguousarray(block(np.pad(x, widths), lanes)),)


def _lower_to_blocks(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    lanes, channels = attrs["lanes"], int(str(x.shape[1]))

    def element(n: Expr, b: Expr, *rest: Expr) -> Expr:
        *places, lane = rest
        channel = b * lanes + lane
        value = common.read(x, (n, channel, *places))
        return select(channel < channels, value, const(0, value.dtype)) if channels % lanes else value

    return (common.elementwise(types[0], "to_blocks", element),)


def _infer_from_blocks(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (x,) = types
    common.require(x.rank >= 3 and all(isinstance(x.shape[axis], int) for axis in (1, -1)), "blocks must be known")
    blocks, lanes, channels = int(str(x.shape[1])), int(str(x.shape[-1])), attrs["channels"]
    common.require(0 < channels <= blocks * lanes, f"{blocks} blocks of {lanes} do not hold {channels} channels")
    return (TensorType((x.shape[0], channels, *x.shape[2:-1]), x.dtype, x.space),)


def _from_blocks(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    return (np.ascontiguousarray(unblock(arrays[0])[:, : attrs["channels"]]),)


def _lower_from_blocks(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (x,) = tensors
    lanes = int(str(x.shape[-1]))

    def element(n: Expr, c: Expr, *places: Expr) -> Expr:
        return common.read(x, (n, c // lanes, *places, c % lanes))

    return (common.elementwise(types[0], "from_blocks", element),)


registry.register(
    OpDef("to_blocks", FusionKind.INJECTIVE, _infer_to_blocks, _to_blocks, _lower_to_blocks, {"lanes": REQUIRED})
)
registry.register(
    OpDef(
        "from_blocks", FusionKind.INJECTIVE, _infer_from_blocks, _from_blocks, _lower_from_blocks,
        {"channels": REQUIRED},
    )
)  # fmt: skip
