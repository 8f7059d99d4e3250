"""Resizing as one pass for each axis, with tables of indices and weights that are made while compiling."""

from __future__ import annotations

from kedge.compiler.graph.bind import frozen
from kedge.compiler.graph.builder import call
from kedge.compiler.graph.ir import Call, Constant, Value
from kedge.compiler.ops.resize import resized_axes, sampling_of, scale_of
from kedge.compiler.ops.sampling import table


def separate(old: Call) -> Value | None:
    """`resize` as `resample` along each axis; None where the size of one is not known while compiling.

    resize(x) {sizes: (n, c, 2h, 2w)} -> resample(resample(x, …) {axis: 3}, …) {axis: 2}

    Separate passes make fewer products than taps of all axes at once. Axes that shrink go first, outermost first, and
    those that grow last, innermost first: each pass works on as little as it can, and the innermost axis, whose
    elements are not read side by side, on the least.
    """
    x = old.inputs[0]
    sampling = sampling_of(old.attrs)
    sizes: dict[int, tuple[int, int]] = {}
    for axis in resized_axes(x.type.shape, old.attrs):
        before, after = x.type.shape[axis], old.type.shape[axis]
        if not isinstance(before, int) or not isinstance(after, int) or before == 0:
            return None
        sizes[axis] = before, after
    result = x
    for axis in sorted(sizes, key=lambda axis: _order(axis, *sizes[axis])):
        before, after = sizes[axis]
        scale = scale_of(old.attrs, axis, before, after) if after else 1.0
        tables = [data for data in table(sampling, before, after, scale) if data is not None]
        operands = [Constant(frozen(data)) for data in tables]
        result = call("resample", result, *operands, axis=axis, origin=old.origin)
    return result


def _order(axis: int, before: int, after: int) -> tuple[bool, int]:
    grows = after > before
    return grows, -axis if grows else axis
