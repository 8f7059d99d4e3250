"""Scheduling a block that computes each element on its own: fuse, vectorize what is contiguous, spread over cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from kedge.compiler.schedule.rules.analysis import (
    Access,
    block_named,
    extent_of,
    fitting_lanes,
    lanes,
    spatial,
    store_of,
)
from kedge.compiler.schedule.rules.rule import TargetModel
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, parallelize
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.target import free
from kedge.compiler.tir.expr import Const, Expr, Load, Var, const
from kedge.compiler.tir.simplify import Simplifier, over, simplify
from kedge.compiler.tir.stmt import Block, IterVar, Range, Store
from kedge.compiler.tir.visitor import loads, substitute_expr

#: A square of fewer rows or columns is not worth its shuffles.
_LEAST_SQUARE = 4
#: Lanes that read elements so far apart are loaded as whole vectors and shuffled.
_NEAR = 2


def fused_dims(block: Block, target: TargetModel) -> int:
    """How many of the innermost dims can run as one vectorized loop: all accesses move by a fixed stride in it.

    0 where not even the innermost one can. Strided reads are fine, a strided store is not.
    """
    axes = spatial(block)
    width = lanes(target, block)
    for count in range(len(axes), 0, -1):
        step = fitting_lanes(width, extent_of(_fused_extent(block, count)))
        found = _lane_strides(block, count, step)
        if found is not None and found[0] in (0, 1):
            return count
    return 0


def schedule_map(sch: Schedule, name: str, target: TargetModel, *, fused: int, width: int, parallel: bool) -> None:
    """Schedule block `name`, alone in its loops: the `fused` innermost dims vectorized by `width`, the rest outside.

    Rewrite:
        for i, j: block   ->   for outer in parallel(…): for lane in vectorized(width): block
    """
    total = cycles(block_named(sch.func, name), target)
    loops = list(sch.get_loops(sch.get_block(name)))
    inner = fuse_all(sch, loops[len(loops) - fused :]) if fused else None
    outer = loops[: len(loops) - fused]
    if inner is not None and width > 1:
        chunk, lane = sch.split(inner, [None, width])
        sch.vectorize(lane)
        outer.append(chunk)
    elif inner is not None:
        outer.append(inner)
    if parallel and outer:
        parallelize(sch, outer, total, target)


def map_width(block: Block, target: TargetModel, fused: int) -> int:
    """The vector length for the `fused` innermost dims."""
    return fitting_lanes(lanes(target, block), extent_of(_fused_extent(block, fused))) if fused else 1


def schedule_map_by_model(sch: Schedule, name: str, target: TargetModel) -> None:
    """`schedule_map` with the choices of the analytic model; blocks that transpose do so in squares of elements.

    Rewrite:
        for i, j: y[i, j] = x[j, i]   ->   for i_0, j_0: for i_1 in unrolled(16): for j_1 in vectorized(16): …
    """
    block = block_named(sch.func, name)
    parallel = is_worth_threads([block], target)
    square = _square(block, target)
    if square is None:
        fused = fused_dims(block, target)
        schedule_map(sch, name, target, fused=fused, width=map_width(block, target, fused), parallel=parallel)
        return
    total = cycles(block, target)
    loops = list(sch.get_loops(sch.get_block(name)))
    count = len(loops) - square.fused
    first, last = square.rows
    chunk, lane = sch.split(fuse_all(sch, loops[count:]), [None, square.width])
    rows, row = sch.split(fuse_all(sch, loops[first:last]), [None, square.height])
    # Of what is stored, neighbours come one after the other as far as that goes.
    order = [*loops[:first], rows, *loops[last:count], chunk]
    sch.reorder(*order, row, lane)
    sch.unroll(row)
    sch.vectorize(lane)
    if parallel:
        parallelize(sch, order, total, target)


@dataclass(frozen=True, slots=True)
class _Square:
    """A block of elements that are read along one dim and stored along another.

    The `fused` innermost dims are stored in vectors of `width`; along the dims from the first to before the second of
    `rows`, put together, some load moves by one element, and there are `height` of them.
    """

    fused: int
    width: int
    rows: tuple[int, int]
    height: int


def _square(block: Block, target: TargetModel) -> _Square | None:
    """The square of a block that stores along one dim what it reads along another; None where it does not."""
    axes = spatial(block)
    most = fused_dims(block, target)
    if most == 0:
        return None
    for fused in range(most, 0, -1):
        width = fitting_lanes(lanes(target, block), extent_of(_fused_extent(block, fused)))
        steps = _lane_strides(block, fused, width)
        if width < _LEAST_SQUARE or steps is None or steps[0] != 1 or not _has_digits(axes[len(axes) - fused :]):
            continue
        apart = [number for number, step in enumerate(steps) if number and abs(step) > _NEAR]
        if not apart:
            continue
        for last in range(len(axes) - fused, 0, -1):
            for first in range(last):
                height = _height(block, (first, last), apart, width)
                if height is not None:
                    return _Square(fused, width, (first, last), height)
    return None


def _height(block: Block, rows: tuple[int, int], apart: Sequence[int], width: int) -> int | None:
    """How many rows a square has along dims that are put together; None where no load of those `apart` is in order."""
    axes = spatial(block)[rows[0] : rows[1]]
    extent = simplify(_product(axes))
    known = extent_of(extent)
    if (known is not None and known < _LEAST_SQUARE) or not _has_digits(axes):
        return None
    height = width
    while height >= _LEAST_SQUARE:
        steps = _strides_along(block, axes, extent, height)
        if any(steps[number] == 1 for number in apart):
            return height if known is None else min(height, known)
        height //= 2
    return None


def fuse_all(sch: Schedule, loops: list[LoopRef]) -> LoopRef:
    """Perfectly nested loops as one."""
    return sch.fuse(*loops) if len(loops) > 1 else loops[0]


def _fused_extent(block: Block, count: int) -> Expr:
    return simplify(_product(spatial(block)[len(spatial(block)) - count :]))


@lru_cache(maxsize=64)  # asked for again once it is known whether a block transposes
def _lane_strides(block: Block, count: int, width: int) -> tuple[int, ...] | None:
    """The strides of the store and the loads between lanes, or None where one of them is not fixed."""
    axes = spatial(block)[len(spatial(block)) - count :]
    found = _strides_along(block, axes, _fused_extent(block, count), width)
    return None if None in found else tuple(step for step in found if step is not None)


def _strides_along(block: Block, axes: Sequence[IterVar], extent: Expr, width: int) -> list[int | None]:
    """The strides of the store and the loads within `width` steps of `axes`, put together; None where not fixed."""
    chunk, lane = Var("chunk"), Var("lane")
    chunks = simplify((extent + (width - 1)) // width)
    value: Expr = chunk * width + lane
    mapping: dict[Var, Expr] = {}
    below: Expr = const(1)
    for axis in reversed(axes):
        digit = value if isinstance(below, Const) and below.value == 1 else value // below
        mapping[axis.var] = digit if axis is axes[0] else digit % axis.extent
        below = simplify(below * axis.extent)
    ranges: dict[Var, Range] = {it.var: over(it.extent) for it in block.iters}
    simplifier = Simplifier({**ranges, chunk: over(chunks), lane: over(width)})
    store = store_of(block)
    accesses: list[Store | Load] = [store, *loads(store.value)]
    return [
        Access([substitute_expr(index, mapping) for index in access.indices], access.buffer.shape, simplifier).stride(
            lane, free=free.STRIDE
        )
        for access in accesses
    ]


def _has_digits(axes: Sequence[IterVar]) -> bool:
    """Whether dims that are put together can be told apart again: their digits are of numbers, or of one free size."""
    return isinstance(simplify(_product(axes[1:])), Const | Var)


def _product(axes: Sequence[IterVar]) -> Expr:
    """How many values all of `axes` have together."""
    extent: Expr = const(1)
    for axis in axes:
        extent = extent * axis.extent
    return extent
