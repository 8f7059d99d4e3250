"""Runs of vectors that unrolled code loads at equal distances, as a depthwise convolution with a stride does.

    for kw in unrolled(3):
      for r in unrolled(7):
        for c in vectorized(4):
          y[r, c] += x[2 * r + kw, c] * w[kw, c]

Where addresses of vectors have no offsets, as on ARMv7, each run (a kw) has a pointer of its own that steps from one
vector to the next. What runs share is loaded again: it costs no more than a pointer to it, and no register meanwhile.
"""

from __future__ import annotations

from collections import Counter

from kedge.compiler.schedule.rules.analysis import stride
from kedge.compiler.tir.expr import Const, const
from kedge.compiler.tir.simplify import Ranges, over
from kedge.compiler.tir.stmt import Buffer, For, Store
from kedge.compiler.tir.visitor import loads


def in_runs(loop: For, ranges: Ranges) -> frozenset[Buffer]:
    """The buffers of which an iteration of `loop` adds vectors to a register tile that lie apart, one for each row.

    The tile is `rows` x `width` elements of any dtype, of a loop over rows that is unrolled and one over elements that
    is vectorized; of a buffer that is found, a row's vector begins more than `width` elements after the one before.
    `ranges` are those of the variables around. Empty where `loop` has another form.
    """
    match loop.body:
        case For(
            kind="unrolled",
            var=row,
            extent=rows,
            body=For(kind="vectorized", var=lane, extent=Const(value=width), body=Store() as store),
        ):
            pass
        case _:
            return frozenset()
    if store.buffer.scope != "register":
        return frozenset()
    known = {**ranges, loop.var: over(loop.extent), row: over(rows), lane: over(const(width))}
    found = list(loads(store.value))
    counts = Counter(load.buffer for load in found)
    result = set()
    for load in found:
        along, apart = (stride(load.indices, load.buffer.shape, var, known) for var in (lane, row))
        if counts[load.buffer] == 1 and load.buffer is not store.buffer and along == 1 and (apart or 0) > width:
            result.add(load.buffer)
    return frozenset(result)
