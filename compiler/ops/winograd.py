"""Winograd's convolution: 3x3 windows at stride 1 over blocks of channels, with fewer multiplications.

An output tile of m x m needs (m + 2)² multiplications for each pair of channels instead of 9·m², after linear
transforms of the input's tile (m + 2) x (m + 2), of the weights and, back, of the products (Lavin & Gray, "Fast
Algorithms for Convolutional Neural Networks", 2015):

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A

m = 2 divides the multiplications by 2.25, m = 4 by 4. The products over all tiles are (m + 2)² matrix products. The
layout pass makes `conv_winograd` of `conv`, never a front end.

A transform is written as what it computes of one line of elements, with as few operations as there are: it serves
arrays and scalar expressions alike, and rows, then columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from kedge.compiler import pages, te
from kedge.compiler.graph.dims import plain
from kedge.compiler.graph.ir import Attrs, TensorType, same_dim
from kedge.compiler.ops import common, registry, windows
from kedge.compiler.ops.blocked import block, unblock
from kedge.compiler.ops.registry import REQUIRED, Array, FusionKind, OpDef
from kedge.compiler.te import Tensor
from kedge.compiler.tir.expr import Expr, ceildiv, const, eq, logical_and, select

#: The elements of a line to those of the transformed line: arrays or expressions.
_Line: TypeAlias = Callable[[Sequence[Any]], Sequence[Any]]

#: Elements along the side of a kernel.
KERNEL = 3
#: Kernels that weights are transformed of at once: their taps fit the second-level cache in float64.
_WEIGHTS_AT_ONCE = 1 << 13
#: Columns of one product of them: results stay in the cache, and BLAS starts no threads for as little.
_COLUMNS = 512


# -- transforms --------------------------------------------------------------------------------------------------


def _input_2(d: Sequence[Any]) -> Sequence[Any]:
    return d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]


def _weight_2(g: Sequence[Any]) -> Sequence[Any]:
    ends = (g[0] + g[2]) * 0.5
    middle = g[1] * 0.5
    return g[0], ends + middle, ends - middle, g[2]


def _output_2(p: Sequence[Any]) -> Sequence[Any]:
    return p[0] + (p[1] + p[2]), (p[1] - p[2]) + p[3]


def _input_4(d: Sequence[Any]) -> Sequence[Any]:
    even, odd = d[4] - d[2] * 4, d[3] - d[1] * 4
    outer, inner = d[4] - d[2], d[3] - d[1]
    first = d[0] * 4 + (d[4] - d[2] * 5)
    last = d[1] * 4 + (d[5] - d[3] * 5)
    return first, even + odd, even - odd, outer + inner * 2, outer - inner * 2, last


def _weight_4(g: Sequence[Any]) -> Sequence[Any]:
    ends, middle = (g[0] + g[2]) * (-1 / 6), g[1] * (1 / 6)
    far, near = g[0] * (1 / 24) + g[2] * (1 / 6), g[1] * (1 / 12)
    return g[0] * 0.25, ends - middle, ends + middle, far + near, far - near, g[2]


def _output_4(p: Sequence[Any]) -> Sequence[Any]:
    even, odd = p[1] + p[2], p[1] - p[2]
    far, near = p[3] + p[4], p[3] - p[4]
    return (p[0] + even) + far, odd + near * 2, even + far * 4, (odd + p[5]) + near * 8


_INPUT: dict[int, _Line] = {2: _input_2, 4: _input_4}
_WEIGHT: dict[int, _Line] = {2: _weight_2, 4: _weight_4}
_OUTPUT: dict[int, _Line] = {2: _output_2, 4: _output_4}


def _both(line: _Line, array: Array, axes: tuple[int, int]) -> Array:
    """A transform along two axes of an array."""
    for axis in axes:
        parts = list(np.moveaxis(array, axis, 0))
        array = np.moveaxis(np.stack(line(parts)), 0, axis)
    return array


def _chosen(index: Expr, values: Sequence[Expr]) -> Expr:
    """`values[index]`: schedules unroll the loop over `index`, which leaves one of them."""
    result = values[-1]
    for number in reversed(range(len(values) - 1)):
        result = select(eq(index, number), values[number], result)
    return result


def _tile_size(attrs: Attrs) -> int:
    m = int(attrs["m"])
    common.require(m in _INPUT, f"m={m}: output tiles have 2 or 4 elements along a side")
    return m


# -- weights: (O, I, 3, 3) to (m + 2, m + 2, O/o, I/i, i, o) ------------------------------------------------------


def _infer_weights(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    (w,) = types
    common.require_dtype(w, frozenset({"float32"}))
    m, (i, o) = _tile_size(attrs), attrs["lanes"]
    common.require(w.is_static and w.rank == 4, "the weight has a known shape of rank 4")
    filters, channels, *kernel = (int(str(dim)) for dim in w.shape)
    common.require(kernel == [KERNEL, KERNEL], f"the kernel is 3x3, not {'x'.join(map(str, kernel))}")
    common.require(
        i > 0 and o > 0 and channels % i == 0 and filters % o == 0,
        f"lanes ({i}, {o}) must divide the {channels} channels and {filters} filters",
    )
    side = m + KERNEL - 1
    return (TensorType((side, side, filters // o, channels // i, i, o), w.dtype, w.space),)


def _weights(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    """Both steps at once, G ⊗ G times the 9 taps, in float64; each element of the result is written once, rounded."""
    (w,) = arrays
    i, o = attrs["lanes"]
    filters, channels = w.shape[:2]
    line = np.stack([*_WEIGHT[_tile_size(attrs)](list(np.eye(KERNEL)))])
    both, side = np.kron(line, line), len(line)
    result = pages.empty((side * side, filters * channels), w.dtype)
    blocks = w.reshape(filters // o, o, channels // i, i, KERNEL * KERNEL).transpose(4, 0, 2, 3, 1)
    step = max(1, _WEIGHTS_AT_ONCE // max(1, channels * o))

    def transform(first: int) -> None:
        taps = blocks[:, first : first + step].astype(np.float64, order="C").reshape(KERNEL * KERNEL, -1)
        begin = first * o * channels
        scratch = np.empty((side * side, _COLUMNS))
        for at in range(0, taps.shape[1], _COLUMNS):
            columns = taps[:, at : at + _COLUMNS]
            part = np.matmul(both, columns, out=scratch[:, : columns.shape[1]])
            result[:, begin + at : begin + at + columns.shape[1]] = part

    pages.spread(transform, range(0, filters // o, step))
    return (result.reshape(side, side, filters // o, channels // i, i, o),)


def _lower_weights(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    (w,) = tensors
    line = _WEIGHT[_tile_size(attrs)]
    i, o = attrs["lanes"]
    side = types[0].shape[0]
    taps = range(KERNEL)

    def rows(k: Expr, q: Expr, f: Expr, c: Expr) -> Expr:
        return _chosen(k, line([te.cast(w.at((f, c, p, q)), "float64") for p in taps]))

    half = te.compute((side, KERNEL, *w.shape[:2]), rows, name="weight_rows")

    def columns(k: Expr, l: Expr, ob: Expr, ib: Expr, ii: Expr, oo: Expr) -> Expr:  # noqa: E741 - rows k, columns l
        return te.cast(_chosen(l, line([half.at((k, q, ob * o + oo, ib * i + ii)) for q in taps])), w.dtype)

    return (te.compute(types[0].shape, columns, name="winograd_weights"),)


registry.register(
    OpDef(
        "winograd_weights", FusionKind.OPAQUE, _infer_weights, _weights, _lower_weights,
        {"m": REQUIRED, "lanes": REQUIRED}, (1, 1),
    )
)  # fmt: skip


# -- the convolution: x (N, I/i, H, W, i), u (m + 2, m + 2, O/o, I/i, i, o) ---------------------------------------


def _infer(types: Sequence[TensorType], attrs: Attrs) -> tuple[TensorType, ...]:
    x, u = types
    dtype = common.require_same_dtype(types)
    common.require_dtype(x, frozenset({"float32"}))
    m = _tile_size(attrs)
    common.require(x.rank == 5 and u.rank == 6, f"x has rank {x.rank}, not 5, or the weight {u.rank}, not 6")
    common.require(u.is_static, "the weight's shape must be known")
    rows, columns, blocks, inner, lanes_in, lanes_out = (int(str(dim)) for dim in u.shape)
    side = m + KERNEL - 1
    common.require((rows, columns) == (side, side), f"m={m} wants weights of {side}x{side}, not {rows}x{columns}")
    common.require(
        same_dim(x.shape[1], inner) and same_dim(x.shape[-1], lanes_in),
        f"the transformed weight wants {inner} blocks of {lanes_in} channels",
    )
    spatial = windows.of_attrs(_window(attrs), (KERNEL, KERNEL)).output(x.shape[2:4])
    return (TensorType((x.shape[0], blocks, *spatial, lanes_out), dtype, x.space),)


def _window(attrs: Attrs) -> Attrs:
    return {"strides": None, "dilations": None, "pads": attrs["pads"]}


def _reference(arrays: Sequence[Array], attrs: Attrs) -> tuple[Array, ...]:
    x, u = arrays
    m = _tile_size(attrs)
    side, lanes = m + KERNEL - 1, u.shape[-1]
    window = windows.of_attrs(_window(attrs), (KERNEL, KERNEL))
    padded = windows.pad_array(unblock(x), window, 0).astype(np.float64)
    sizes = [size - KERNEL + 1 for size in padded.shape[2:]]
    tiles = [-(-size // m) for size in sizes]
    more = [(0, count * m + KERNEL - 1 - size) for count, size in zip(tiles, padded.shape[2:], strict=True)]
    whole = np.pad(padded, [(0, 0), (0, 0), *more])
    steps = np.lib.stride_tricks.sliding_window_view(whole, (side, side), (2, 3))[:, :, ::m, ::m]
    v = _both(_INPUT[m], steps, (4, 5))
    plain_u = u.transpose(0, 1, 2, 5, 3, 4).reshape(side, side, u.shape[2] * lanes, -1).astype(np.float64)
    products = np.einsum("ncyxkl,kloc->noyxkl", v, plain_u, optimize=True)
    y = _both(_OUTPUT[m], products, (4, 5))
    merged = y.transpose(0, 1, 2, 4, 3, 5).reshape(*y.shape[:2], tiles[0] * m, tiles[1] * m)
    return (np.ascontiguousarray(block(merged[:, :, : sizes[0], : sizes[1]], lanes), dtype=x.dtype),)


def _lower(tensors: Sequence[Tensor], attrs: Attrs, types: tuple[TensorType, ...]) -> tuple[Tensor, ...]:
    """Blocks `input_rows`, `input`, `product`, `output_rows` and `output`, over tiles by image, row and column."""
    x, u = tensors
    m = _tile_size(attrs)
    side, _, blocks, inner, lanes_in, lanes_out = (int(str(dim)) for dim in u.shape)
    window = windows.of_attrs(_window(attrs), (KERNEL, KERNEL))
    batch, _, height, width, _ = types[0].shape
    tiles = (batch, *(plain(ceildiv(size, m)) for size in (height, width)))
    lines = range(side)

    def element(n: Expr, ib: Expr, place: tuple[Expr, Expr], tap: tuple[Expr | int, Expr | int], ii: Expr) -> Expr:
        """The input at `tap` within the tile at `place`; 0 in the padding, and in tiles that reach further."""
        at = [index * m + k - begin for index, k, begin in zip(place, tap, window.begins, strict=True)]
        value = x.at((n, ib, *at, ii))
        ends = zip((height, width), window.begins, window.ends, strict=True)
        whole = [isinstance(out, int) and out % m == 0 and begin == end == 0 for out, begin, end in ends]
        guards = [common.inside(i, size) for i, size, fits in zip(at, x.shape[2:4], whole, strict=True) if not fits]
        return select(logical_and(*guards), value, const(0, x.dtype)) if guards else value

    def input_rows(k: Expr, q: Expr, ib: Expr, n: Expr, th: Expr, tw: Expr, ii: Expr) -> Expr:
        return _chosen(k, _INPUT[m]([element(n, ib, (th, tw), (p, q), ii) for p in lines]))

    half = te.compute((side, side, inner, *tiles, lanes_in), input_rows, name="input_rows")

    def input_columns(k: Expr, l: Expr, ib: Expr, n: Expr, th: Expr, tw: Expr, ii: Expr) -> Expr:  # noqa: E741
        return _chosen(l, _INPUT[m]([half.at((k, q, ib, n, th, tw, ii)) for q in lines]))

    v = te.compute((side, side, inner, *tiles, lanes_in), input_columns, name="input")
    channel, lane = te.reduce_axis(inner, "ib"), te.reduce_axis(lanes_in, "ii")

    def product(k: Expr, l: Expr, ob: Expr, n: Expr, th: Expr, tw: Expr, oo: Expr) -> Expr:  # noqa: E741
        return te.sum(v.at((k, l, channel, n, th, tw, lane)) * u.at((k, l, ob, channel, lane, oo)), [channel, lane])

    products = te.compute((side, side, blocks, *tiles, lanes_out), product, name="product")

    def output_rows(r: Expr, l: Expr, ob: Expr, n: Expr, th: Expr, tw: Expr, oo: Expr) -> Expr:  # noqa: E741
        return _chosen(r, _OUTPUT[m]([products.at((k, l, ob, n, th, tw, oo)) for k in lines]))

    back = te.compute((m, side, blocks, *tiles, lanes_out), output_rows, name="output_rows")

    def output(n: Expr, ob: Expr, h: Expr, w: Expr, oo: Expr) -> Expr:
        line = [back.at((h % m, l, ob, n, h // m, w // m, oo)) for l in lines]  # noqa: E741
        return _chosen(w % m, _OUTPUT[m](line))

    return (te.compute(types[0].shape, output, name="output"),)


registry.register(
    OpDef("conv_winograd", FusionKind.CONTRACTION, _infer, _reference, _lower, {"m": REQUIRED, "pads": None}, (2, 2))
)
