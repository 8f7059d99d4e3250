"""Transposed convolution as a convolution of the input's own size and a move of the result's elements.

With stride s, output elements whose positions are equal modulo s, a *phase*, are an ordinary convolution of the input
with every s-th tap of the kernel. So one convolution with the s phases as output channels gives all of them, and
depth-to-space puts them in order (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016).
Nothing is multiplied by the zeros that inserting them between inputs would need; a kernel of s taps becomes 1x1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kedge.compiler.graph.builder import call, make_call
from kedge.compiler.graph.dims import plain, product, same_shape
from kedge.compiler.graph.ir import Call, Value
from kedge.compiler.ops import windows
from kedge.compiler.ops.conv_transpose import extra_of


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis. Output position t is phase (t + shift) % stride of window (t + shift) // stride.

    That window covers the inputs from `window - last` to `window - first`; from input `window - m` it takes the tap
    `phase + m * stride - shift + begin`, where the kernel has one.
    """

    kernel: int
    stride: int
    dilation: int  # 1 unless the stride is 1
    shift: int
    first: int
    last: int
    begin: int  # zeros before and after the input, for the convolution
    end: int
    start: int  # where the output begins in what depth-to-space gives

    @property
    def taps(self) -> int:
        """The taps of a phase."""
        return self.kernel if self.stride == 1 else self.last - self.first + 1


def subpixel(old: Call) -> Value | None:
    """`conv_transpose` as conv, depth_to_space and slice; None where both stride and dilation are over 1.

    conv_transpose(x, w) {strides: (2, 2)} -> depth_to_space(conv(x, phases(w)))
    """
    x, w = old.inputs[:2]
    attrs = old.attrs
    rank = x.type.rank - 2
    filters, *kernel = (int(str(dim)) for dim in w.type.shape[1:])
    window = windows.of_attrs(attrs, kernel)
    if any(s > 1 and d > 1 for s, d in zip(window.strides, window.dilations, strict=True)):
        return None
    if any(isinstance(dim, int) and dim == 0 for dim in (*x.type.shape, *w.type.shape, *old.type.shape)):
        return None  # the convolution would have windows over nothing
    extra = extra_of(attrs, rank)
    axes = [
        _axis(*numbers)
        for numbers in zip(
            kernel, window.strides, window.dilations, window.begins, window.ends, extra, strict=True
        )
    ]  # fmt: skip
    strides = [axis.stride for axis in axes]
    groups, origin = attrs["groups"], old.origin
    operands = [x, _phases(w, axes, window.begins, groups, origin)]
    if len(old.inputs) == 3:
        operands.append(_repeated(old.inputs[2], math.prod(strides), groups, origin))
    result = call(
        "conv", *operands, pads=[*(axis.begin for axis in axes), *(axis.end for axis in axes)],
        dilations=[axis.dilation for axis in axes], groups=groups, origin=origin,
    )  # fmt: skip
    result = _woven(result, filters, groups, strides, origin)
    starts = tuple(axis.start for axis in axes)
    spatial = tuple(range(2, 2 + rank))
    if not any(starts) and same_shape(result.type.shape, old.type.shape):
        return result
    ends = tuple(plain(size + start) for size, start in zip(old.type.shape[2:], starts, strict=True))
    return call("slice", result, starts=starts, ends=ends, axes=spatial, origin=origin)


def applied_before_order(function: Call) -> Value | None:
    """An element-wise `function` of what `subpixel` gives, applied to the convolution itself, whose epilogue it joins.

    relu(depth_to_space(conv(x, w))) -> depth_to_space(relu(conv(x, w)))
    """
    moves: list[Call] = []
    value = function.inputs[0]
    while isinstance(value, Call) and value.op in ("reshape", "transpose", "depth_to_space", "slice"):
        moves.append(value)
        value = value.inputs[0]
    if not moves or not isinstance(value, Call) or value.op != "conv":
        return None
    result: Value = make_call(function.op, (value,), function.attrs, function.origin)
    for move in reversed(moves):
        result = make_call(move.op, (result,), move.attrs, move.origin)
    return result


def _axis(kernel: int, stride: int, dilation: int, begin: int, end: int, extra: int) -> _Axis:
    """The axis with the shift whose phases have the fewest taps: 0, which needs no slice before, where that does."""
    reach = (kernel - 1) * dilation + 1

    def shifted(shift: int) -> _Axis:
        first = -((begin + stride - 1 - shift) // stride)
        last = (reach - 1 - begin + shift) // stride
        beyond = (extra + reach - 1 - begin - end + shift) // stride  # of the last window over the last input
        before = max(last, 0)
        start = shift + (before - last) * stride
        return _Axis(kernel, stride, dilation, shift, first, last, before, max(beyond - first, 0), start)

    return min((shifted(shift) for shift in (0, begin % stride)), key=lambda axis: axis.taps)


def _phases(w: Value, axes: Sequence[_Axis], begins: Sequence[int], groups: int, origin: tuple[str, ...]) -> Value:
    """The weight (C, O / groups, K…) as the convolution takes it: (groups·phases·O / groups, C / groups, taps…)."""
    channels, filters, *kernel = (int(str(dim)) for dim in w.type.shape)
    rank = len(axes)
    befores = [0 if axis.stride == 1 else axis.shift - begin - axis.first * axis.stride
               for axis, begin in zip(axes, begins, strict=True)]  # fmt: skip
    afters = [axis.taps * axis.stride - size - before
              for axis, size, before in zip(axes, kernel, befores, strict=True)]  # fmt: skip
    if any(befores) or any(afters):
        w = call("pad", w, pads=(0, 0, *befores, 0, 0, *afters), origin=origin)
    split = [size for axis in axes for size in (axis.taps, axis.stride)]
    w = call("reshape", w, shape=(groups, channels // groups, filters, *split), origin=origin)
    taps, phases = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
    w = call("transpose", w, perm=(0, *phases, 2, 1, *taps), origin=origin)
    rows = groups * filters * math.prod(axis.stride for axis in axes)
    w = call("reshape", w, shape=(rows, channels // groups, *(axis.taps for axis in axes)), origin=origin)
    flipped = tuple(2 + at for at, axis in enumerate(axes) if axis.taps > 1)
    if not flipped:
        return w
    ends = (-(2**31),) * len(flipped)
    return call("slice", w, starts=(-1,) * len(flipped), ends=ends, axes=flipped, steps=(-1,) * len(flipped),
                origin=origin)  # fmt: skip


def _repeated(bias: Value, times: int, groups: int, origin: tuple[str, ...]) -> Value:
    """The bias of each group's channels once for each phase."""
    if times == 1:
        return bias
    size = int(str(product(bias.type.shape)))
    column = call("reshape", bias, shape=(groups, 1, size // groups), origin=origin)
    wide = call("broadcast_to", column, shape=(groups, times, size // groups), origin=origin)
    return call("reshape", wide, shape=(size * times,), origin=origin)


def _woven(x: Value, filters: int, groups: int, strides: Sequence[int], origin: tuple[str, ...]) -> Value:
    """(N, groups · phases · filters, S…) with the phases of each axis put between the elements of that axis."""
    times = math.prod(strides)
    if times == 1:
        return x
    if groups > 1:  # phases first
        batch, _, *sizes = x.type.shape
        apart = call("reshape", x, shape=(batch, groups, times, filters, *sizes), origin=origin)
        moved = call("transpose", apart, perm=(0, 2, 1, *range(3, apart.type.rank)), origin=origin)
        x = call("reshape", moved, shape=(batch, groups * times * filters, *sizes), origin=origin)
    return call("depth_to_space", x, blocks=tuple(strides), origin=origin)
