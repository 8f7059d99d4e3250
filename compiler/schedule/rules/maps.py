"""Scheduling a block that computes each element on its own: fuse, vectorize what is contiguous, spread over cores."""

from __future__ import annotations

from kedge.compiler.schedule.rules.analysis import (
    block_named,
    extent_of,
    fitting_lanes,
    lanes,
    spatial,
    store_of,
    stride,
)
from kedge.compiler.schedule.rules.rule import TargetModel
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, parallelize
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.tir.expr import Const, Expr, Load, Var, const
from kedge.compiler.tir.simplify import over, simplify
from kedge.compiler.tir.stmt import Block, Range, Store
from kedge.compiler.tir.visitor import loads, substitute_expr


def fused_dims(block: Block, target: TargetModel) -> int:
    """How many of the innermost dims can run as one vectorized loop: all accesses move by a fixed stride in it.

    0 where not even the innermost one can. Strided reads are fine, a strided store is not.
    """
    axes = spatial(block)
    width = lanes(target, block)
    for count in range(len(axes), 0, -1):
        extent = _fused_extent(block, count)
        step = fitting_lanes(width, extent_of(extent))
        found = _lane_strides(block, count, extent, step)
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
    """`schedule_map` with the choices of the analytic model."""
    block = block_named(sch.func, name)
    fused = fused_dims(block, target)
    width = map_width(block, target, fused)
    schedule_map(sch, name, target, fused=fused, width=width, parallel=is_worth_threads([block], target))


def fuse_all(sch: Schedule, loops: list[LoopRef]) -> LoopRef:
    """Perfectly nested loops as one."""
    return sch.fuse(*loops) if len(loops) > 1 else loops[0]


def _fused_extent(block: Block, count: int) -> Expr:
    extent: Expr = const(1)
    for it in spatial(block)[len(spatial(block)) - count :]:
        extent = extent * it.extent
    return simplify(extent)


def _lane_strides(block: Block, count: int, extent: Expr, width: int) -> list[int] | None:
    """The strides of the store and the loads between lanes, or None where one of them is not fixed."""
    axes = spatial(block)[len(spatial(block)) - count :]
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
    ranges |= {chunk: over(chunks), lane: over(width)}
    store = store_of(block)
    found: list[int] = []
    accesses: list[Store | Load] = [store, *loads(store.value)]
    for access in accesses:
        indices = [substitute_expr(index, mapping) for index in access.indices]
        step = stride(indices, access.buffer.shape, lane, ranges)
        if step is None:
            return None
        found.append(step)
    return found
