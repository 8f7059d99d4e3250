"""Sliding windows over spatial axes: what convolution and pooling share.

Pads are given as all begins and then all ends. A window of size k and dilation d reaches (k - 1)·d + 1 elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge.compiler import te
from kedge.compiler.graph.dims import plain
from kedge.compiler.graph.ir import Attrs
from kedge.compiler.ops import common
from kedge.compiler.ops.registry import Array
from kedge.compiler.tir.expr import Dim, Expr, as_expr, ceildiv, const, logical_and, maximum, minimum, select


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows along each spatial axis, all lists of one length."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    ceil_mode: bool = False

    @property
    def reach(self) -> tuple[int, ...]:
        """The elements that a window spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def padded(self) -> bool:
        """Whether a window may reach outside of the input."""
        return self.ceil_mode or any(self.begins) or any(self.ends)

    def output(self, sizes: Sequence[Dim]) -> tuple[Dim, ...]:
        """The number of windows along each axis."""
        return tuple(self._count(axis, size) for axis, size in enumerate(sizes))

    def _count(self, axis: int, size: Dim) -> Dim:
        before, after, stride = self.begins[axis], self.ends[axis], self.strides[axis]
        room = size + before + after - self.reach[axis]
        # The last window may begin before its end in ceil mode: all it needs is a place to begin.
        enough = room > -stride if self.ceil_mode else room >= 0
        common.require(
            not isinstance(room, int) or bool(enough),
            f"the window of {self.reach[axis]} is larger than the padded input of spatial axis {axis}",
        )
        if not self.ceil_mode:
            return plain(room // stride + 1)
        # A last window that would start in the padding after the input is left out.
        rounded_up = minimum(ceildiv(room, stride) + 1, ceildiv(size + before, stride))
        return plain(rounded_up)

    def position(self, axis: int, out: Expr, tap: Expr | int) -> Expr:
        """The index in the unpadded input of a window's tap; outside of [0, size) it is padding."""
        index = out if self.strides[axis] == 1 else out * self.strides[axis]
        if not isinstance(tap, int) or tap:
            index = index + (tap if self.dilations[axis] == 1 else tap * self.dilations[axis])
        return index - self.begins[axis] if self.begins[axis] else index

    def axes(self) -> list[te.ReduceAxis]:
        """Reduction axes over a window's taps, named as is usual for two axes."""
        names = {1: ("kw",), 2: ("kh", "kw"), 3: ("kd", "kh", "kw")}.get(len(self.kernel))
        return [te.reduce_axis(k, names[axis] if names else f"k{axis}") for axis, k in enumerate(self.kernel)]


def of_attrs(attrs: Attrs, kernel: Sequence[int], *, ceil_mode: bool = False) -> Windows:
    """The windows that attributes describe; raises `ShapeError` on wrong lengths or values."""
    rank = len(kernel)
    strides = _per_axis(attrs, "strides", 1, rank)
    dilations = _per_axis(attrs, "dilations", 1, rank)
    pads = attrs["pads"] if attrs["pads"] is not None else (0,) * (2 * rank)
    common.require(len(pads) == 2 * rank, f"pads {tuple(pads)} must have {2 * rank} numbers, begins and then ends")
    common.require(all(pad >= 0 for pad in pads), f"pads {tuple(pads)} must not be negative")
    common.require(all(k > 0 for k in kernel), f"kernel {tuple(kernel)} must be positive")
    return Windows(tuple(kernel), strides, dilations, tuple(pads[:rank]), tuple(pads[rank:]), ceil_mode)


def _per_axis(attrs: Attrs, name: str, default: int, rank: int) -> tuple[int, ...]:
    given = attrs[name]
    result = (default,) * rank if given is None else tuple(given)
    common.require(
        len(result) == rank and all(value > 0 for value in result), f"{name} {result} must be {rank} positive numbers"
    )
    return result


def pad_array(x: Array, windows: Windows, fill: Any) -> Array:
    """`x` padded along its spatial (last) axes so that every window lies inside of it."""
    rank = len(windows.kernel)
    sizes = x.shape[x.ndim - rank :]
    widths = [(0, 0)] * (x.ndim - rank)
    for axis, count in enumerate(windows.output(sizes)):
        needed = (int(str(count)) - 1) * windows.strides[axis] + windows.reach[axis]
        before = windows.begins[axis]
        widths.append((before, max(windows.ends[axis], needed - before - sizes[axis])))
    return np.pad(x, widths, constant_values=fill)


def view(x: Array, windows: Windows) -> Array:
    """All windows of a padded array: shape (…, outputs…, taps…), without copying."""
    rank = len(windows.kernel)
    spatial = tuple(range(x.ndim - rank, x.ndim))
    slid = np.lib.stride_tricks.sliding_window_view(x, windows.reach, axis=spatial)
    steps = (slice(None),) * (x.ndim - rank)
    steps += tuple(slice(None, None, stride) for stride in windows.strides)
    steps += tuple(slice(None, None, dilation) for dilation in windows.dilations)
    return np.asarray(slid[steps])


def pad_tensor(x: te.Tensor, windows: Windows, fill: float | int) -> te.Tensor:
    """`x` padded along its spatial axes by the begins and ends of `windows` (without what ceil_mode adds).

    Those come after batch and channels; behind them there may be the lanes of a block of channels.
    """
    lead = 2
    spatial, lanes = x.shape[lead : lead + len(windows.kernel)], x.shape[lead + len(windows.kernel) :]
    shape = [
        plain(size + before + after) for size, before, after in zip(spatial, windows.begins, windows.ends, strict=True)
    ]

    def body(*indices: Expr) -> Expr:
        inner = indices[lead + len(spatial) :]
        own = [index - begin for index, begin in zip(indices[lead : lead + len(spatial)], windows.begins, strict=True)]
        guards: list[Expr] = []
        for index, size, begin, end in zip(own, spatial, windows.begins, windows.ends, strict=True):
            guards += [index >= 0] if begin else []
            guards += [index < as_expr(size)] if end else []
        value = x.at((*indices[:lead], *own, *inner))
        return select(logical_and(*guards), value, const(fill, x.dtype)) if guards else value

    return te.compute((*x.shape[:lead], *shape, *lanes), body, name="pad")


def taps_inside(windows: Windows, axis: int, out: Expr, low: int, size: Expr) -> Expr:
    """How many taps of the window at `out` lie in `[low, size)` of the unpadded input, as an int64 expression."""
    base = windows.position(axis, out, 0)
    dilation, kernel = windows.dilations[axis], windows.kernel[axis]
    first = maximum(ceildiv(as_expr(low) - base, dilation), 0)
    last = minimum(ceildiv(size - base, dilation), kernel)
    return last - first
