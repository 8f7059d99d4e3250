"""Dot products: sums over elements that lie together in both operands, such as `a @ x` and `x @ w.T`.

A tile of results has a vector of partial sums each, several where the tile is small, so that the latency of an
accumulator is hidden; at the end halves of these are added until one is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.rules.analysis import (
    block_named,
    extent_of,
    inline_producers,
    lanes,
    reductions,
    spatial,
    store_of,
    strides,
)
from kedge.compiler.schedule.rules.maps import schedule_map_by_model
from kedge.compiler.schedule.rules.partial import halve
from kedge.compiler.schedule.rules.product import operands
from kedge.compiler.schedule.rules.rule import Decisions, Space, TargetModel
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, parallelize
from kedge.compiler.schedule.rules.tile import take_consumer
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.schedule.tree import blocks_in
from kedge.compiler.tir.stmt import Block, PrimFunc, Store
from kedge.compiler.tir.visitor import free_vars

#: Accumulators that hide the latency of a multiply-add on most cores, and stay far from all registers.
_ACCUMULATORS = 8
_MOST = 8


@dataclass(frozen=True, slots=True)
class Dot:
    """Tiles of dot products with vectors of partial sums; what follows element by element happens where one is done.

    Decisions: `row` and `column`, the spatial dims that only the one and only the other operand has; `rows` and
    `columns` of the tile; `width` of a vector of partial sums, and how many `vectors` of them; `parallel`.
    """

    name: str = "dot"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Whether the one reduction sums products over a dim that is whole vectors, together in both operands."""
        found = reductions(func)
        if len(found) != 1 or not all(isinstance(block.body, Store) for block in blocks_in(func.body)):
            return False
        (block,) = found
        depth = block.iters[-1]
        if operands(block) is None or sum(it.kind == "reduce" for it in block.iters) != 1 or depth.kind != "reduce":
            return False
        if store_of(block).buffer.dtype not in ("float32", "float64") or not spatial(block):
            return False
        width = _width(block, target)
        return width > 1 and 4 * width >= lanes(target, block) and strides(block, depth.var)[1:] == [1, 1]

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """See the class."""
        block = reductions(func)[0]
        row, column = _own_dims(block)
        width, depth = _width(block, target), extent_of(block.iters[-1].extent) or 0
        return {
            "row": (None, *row),
            "column": (None, *column),
            "rows": tuple(range(1, _MOST + 1)),
            "columns": tuple(range(1, _MOST + 1)),
            "width": tuple(1 << i for i in range(1, width.bit_length())),
            "vectors": tuple(v for v in (1, 2, 4) if depth % (v * width) == 0),
            "parallel": (False, True),
        }

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """A tile that has accumulators enough and, of two long dims, elements of both."""
        block = reductions(func)[0]
        own = [_longest(block, dims) for dims in _own_dims(block)]
        row, column = own
        most = [1 if dim is None else extent_of(spatial(block)[dim].extent) or 1 for dim in own]
        side = 4 if target.vector_registers >= 32 else 2
        rows = min(most[0], side if most[1] >= side else _ACCUMULATORS // max(1, most[1]))
        columns = min(most[1], side if rows >= side else _ACCUMULATORS // rows)
        width = _width(block, target)
        depth = extent_of(block.iters[-1].extent) or width
        vectors = max(
            v for v in (1, 2, 4) if v == 1 or (depth % (v * width) == 0 and v * rows * columns <= _ACCUMULATORS)
        )
        return {
            "row": row,
            "column": column,
            "rows": rows,
            "columns": columns,
            "width": width,
            "vectors": vectors,
            "parallel": is_worth_threads([block], target),
        }

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetModel) -> None:
        """See the class."""
        name = reductions(sch.func)[0].name
        _check(block_named(sch.func, name), decisions)
        inline_producers(sch)
        done = _schedule_dots(sch, name, decisions, target)
        for block in blocks_in(sch.func.body):
            if block.name not in done:
                schedule_map_by_model(sch, block.name, target)


def _own_dims(block: Block) -> tuple[list[int], list[int]]:
    """The spatial dims of which only the first, and only the second operand knows."""
    found = operands(block)
    assert found is not None, f"{block.name} was not matched"
    first, second = ({var for index in load.indices for var in free_vars(index)} for load in found)
    axes = list(enumerate(it.var for it in spatial(block)))
    return [n for n, var in axes if var in first - second], [n for n, var in axes if var in second - first]


def _longest(block: Block, dims: list[int]) -> int | None:
    """The longest of the dims, of known size before a free one."""
    return max(dims, key=lambda dim: (extent_of(spatial(block)[dim].extent) or 0, dim), default=None)


def _check(block: Block, decisions: Decisions) -> None:
    """Refuse decisions that these dot products cannot have."""
    row, column = _own_dims(block)
    if decisions["row"] not in (None, *row) or decisions["column"] not in (None, *column):
        raise ScheduleError(f"dot products of block {block.name!r}: row is one of {row}, column one of {column}")
    sizes = {key: decisions[key] for key in ("rows", "columns", "width", "vectors")}
    depth = extent_of(block.iters[-1].extent)
    wide = sizes["width"] * sizes["vectors"]
    if min(sizes.values()) < 1 or sizes["width"] < 2 or wide & (wide - 1) or depth is None or depth % wide:
        hint = "sizes are above 0, width a power of two, vectors times width one that divides the sum"
        raise ScheduleError(f"dot products of block {block.name!r}: {sizes} do not suit it", hint=hint)


def _schedule_dots(sch: Schedule, name: str, decisions: Decisions, target: TargetModel) -> set[str]:
    """Rewrite the sums and what follows them; returns the names of the blocks that are in the tiles.

    Rewrite:
        for i, j, k: block   ->   for i_0, j_0 in parallel(…):
                                    partial = 0
                                    for k_0: for i, j, k_1: partial[i, j, k_1] += a[i, k] * b[j, k]
                                    halves added up to one, tile by tile
                                    y[…] = tile   (with the consumer's computation)
    """
    ref = sch.get_block(name)
    total = cycles(block_named(sch.func, name), target)
    *outer, depth = sch.get_loops(ref)
    inner: list[LoopRef] = []
    for dim, size in ((decisions["row"], decisions["rows"]), (decisions["column"], decisions["columns"])):
        if dim is not None and size > 1:
            outer[dim], step = sch.split(outer[dim], [None, size])
            inner.append(step)
    wide = decisions["vectors"] * decisions["width"]
    along, lane = sch.split(depth, [None, wide])
    sch.reorder(*outer, along, *inner, lane)
    copy = sch.cache_write(ref, outer[-1], "register")
    take_consumer(sch, copy)
    parts = halve(sch, ref, lane, wide, decisions["width"])
    blocks = [(copy, 1), (ref, 1), (sch.decompose_reduction(ref, sch.get_loops(ref)[len(outer)]), 1)]
    for part, size in parts:
        blocks += [(part, size), (sch.decompose_reduction(part, sch.get_loops(part)[len(outer)]), size)]
    seen = {*outer, along}
    for block, size in blocks:
        own = list(sch.get_loops(block))
        if size > decisions["width"]:
            own[-1:] = sch.split(own[-1], [None, decisions["width"]])
        if size > 1:
            sch.vectorize(own.pop())
        for loop in own:
            if loop not in seen:
                seen.add(loop)
                sch.unroll(loop)
    if decisions["parallel"]:
        parallelize(sch, outer, total, target)
    return {block.name for block, _ in blocks}


def _width(block: Block, target: TargetModel) -> int:
    """The lanes of a vector, or of a part of one, such that the sum is whole vectors."""
    length, width = extent_of(block.iters[-1].extent), lanes(target, block)
    if not length:
        return 1
    while length % width:
        width //= 2
    return width
