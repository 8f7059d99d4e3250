"""Reductions that are no contractions: pooling, sums over axes, softmax, normalisation."""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.nest import loop_vars
from kedge.compiler.schedule.rules.analysis import (
    block_named,
    extent_of,
    fitting_lanes,
    inline_producers,
    is_reduction,
    lanes,
    reductions,
    spatial,
    store_of,
    strides,
)
from kedge.compiler.schedule.rules.maps import schedule_map_by_model
from kedge.compiler.schedule.rules.partial import halve, initialize, vectorize_lanes
from kedge.compiler.schedule.rules.rule import Decisions, Space, TargetModel
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, parallelize
from kedge.compiler.schedule.rules.tile import schedule_tile, tile_by_model
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, loops_on
from kedge.compiler.tir.stmt import Block, PrimFunc, Store

#: Vectors of partial results that hide the latency of adding to one.
_MOST_VECTORS = 4


@dataclass(frozen=True, slots=True)
class Reduction:
    """Row by row where the elements of a row lie together (softmax), else each reduction in tiles of its own.

    By rows, all that follows the first reduction happens inside the loops over its rows, so that a row stays in the
    cache. Otherwise a reduction is vectorized along the outputs that lie together (pooling).
    """

    name: str = "reduction"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Whether some block reduces."""
        return bool(reductions(func)) and all(isinstance(b.body, Store) for b in blocks_in(func.body))

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """Whether to go row by row."""
        return {"by_rows": (False, True)}

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """By rows, if what follows can share them, no outputs fill vectors, and there is a reason to.

        That is a second reduction, or a row long enough for a vector of partial results.
        """
        sch = Schedule(func)
        inline_producers(sch)
        first = reductions(sch.func)[0]
        gains = len(reductions(sch.func)) > 1 or _partial_lanes(first, target)[0] > 1
        return {"by_rows": gains and tile_by_model(first, target).vector is None and _shares_rows(sch.func)}

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetModel) -> None:
        """See the class."""
        inline_producers(sch)
        if decisions["by_rows"]:
            _by_rows(sch, target)
            return
        for name in [block.name for block in reductions(sch.func)]:
            schedule_tile(sch, name, tile_by_model(block_named(sch.func, name), target), target)
        for block in blocks_in(sch.func.body):
            if _is_untouched(sch, block.name):
                schedule_map_by_model(sch, block.name, target)


def _is_untouched(sch: Schedule, name: str) -> bool:
    """Whether the block is element-wise and not yet part of a tile."""
    block = block_named(sch.func, name)
    buffers = [region.buffer for region in (*block.reads, *block.writes)]
    return not is_reduction(block) and all(buffer.scope == "global" for buffer in buffers) and not _is_init(sch, name)


def _is_init(sch: Schedule, name: str) -> bool:
    """Whether the block only prepares what a reduction then accumulates."""
    target = store_of(block_named(sch.func, name)).buffer
    return any(is_reduction(b) and store_of(b).buffer is target for b in blocks_in(sch.func.body))


def _gather_rows(sch: Schedule) -> list[LoopRef]:
    """Move every block after the first reduction into the loops over its rows; returns those loops."""
    first = reductions(sch.func)[0]
    ref = sch.get_block(first.name)
    rows = list(sch.get_loops(ref)[: len(spatial(first))])
    order = blocks_in(sch.func.body)
    for block in order[order.index(first) + 1 :]:
        sch.reverse_compute_at(sch.get_block(block.name), rows[-1])
    return rows


def _shares_rows(func: PrimFunc) -> bool:
    """Whether the rows of the first reduction serve for all that follows."""
    if not spatial(reductions(func)[0]):
        return False
    try:
        _gather_rows(Schedule(func))
    except ScheduleError:
        return False
    return True


def _by_rows(sch: Schedule, target: TargetModel) -> None:
    blocks = blocks_in(sch.func.body)
    threads = is_worth_threads(blocks, target)
    total = sum(cycles(block, target) for block in blocks)
    first = reductions(sch.func)[0].name
    order = [block.name for block in blocks_in(sch.func.body)]
    rows = _gather_rows(sch)
    for name in order[order.index(first) :]:
        if is_reduction(block_named(sch.func, name)):
            _accumulate(sch, name, rows, target)
        else:
            _vectorize_inner(sch, name, len(rows), target)
    for name in order[: order.index(first)]:
        schedule_map_by_model(sch, name, target)
    if threads:
        parallelize(sch, rows, total, target)


def _accumulate(sch: Schedule, name: str, rows: list[LoopRef], target: TargetModel) -> None:
    """Reduce in registers where what one row gives is a single element or a small fixed number of them.

    A row whose elements lie together is reduced to vectors of partial results first.
    """
    ref = sch.get_block(name)
    own = sch.get_loops(ref)[len(rows) :]
    nodes = loops_on(block_path(sch.func, name))[len(rows) :]
    reduced = loop_vars(block_named(sch.func, name), "reduce")
    reducing = [loop for loop, node in zip(own, nodes, strict=True) if node.var in reduced]
    if not reducing:
        return
    if len(reducing) < len(own):
        sch.decompose_reduction(ref, reducing[0])
        return
    vectors, width = _partial_lanes(block_named(sch.func, name), target)
    if width == 1:
        sch.cache_write(ref, rows[-1], "register")
        sch.decompose_reduction(ref, reducing[0])
        return
    along, lane = sch.split(reducing[-1], [None, vectors * width])
    sch.cache_write(ref, rows[-1], "register")
    parts = [*halve(sch, ref, lane, vectors * width, width), (ref, 1)]
    blocks = [(each, size) for part, size in parts for each in (initialize(sch, part, len(rows)), part)]
    vectorize_lanes(sch, blocks, width, (*rows, *reducing[:-1], along))


def _partial_lanes(block: Block, target: TargetModel) -> tuple[int, int]:
    """Vectors of partial results for the last dim that `block` reduces, and their width; (1, 1) where it has none.

    All that it reads lies together along that dim, or is the same.
    """
    depth = block.iters[-1]
    width = lanes(target, block)
    length = extent_of(depth.extent)
    steps = strides(block, depth.var)[1:]
    if depth.kind != "reduce" or set(steps) not in ({1}, {0, 1}) or (length is not None and length < 2 * width):
        return 1, 1
    if length is None:
        return _MOST_VECTORS, width
    fitting = [count for count in (1, 2, _MOST_VECTORS) if count * width <= length]
    even = [count for count in fitting if length % (count * width) == 0]
    return max(even or fitting), width


def _vectorize_inner(sch: Schedule, name: str, depth: int, target: TargetModel) -> None:
    """Vectorize the innermost loop of an element-wise block within a row, if its accesses allow."""
    own = sch.get_loops(sch.get_block(name))[depth:]
    block = block_named(sch.func, name)
    if not own:
        return
    axis = block.iters[-1]
    steps = strides(block, axis.var)
    width = fitting_lanes(lanes(target, block), extent_of(axis.extent))
    if width > 1 and steps[0] == 1 and all(step is not None for step in steps):
        sch.vectorize(sch.split(own[-1], [None, width])[1])
