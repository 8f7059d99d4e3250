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
    with_operands_inlined,
)
from kedge.compiler.schedule.rules.maps import schedule_map_by_model
from kedge.compiler.schedule.rules.partial import halve, initialize, vectorize_lanes
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
#: Vectors of a sum from which its end is no matter.
_LONG = 4


@dataclass(frozen=True, slots=True)
class Dot:
    """Tiles of dot products with vectors of partial sums; what follows element by element happens where one is done.

    Decisions: `row` and `column`, the spatial dims that only the one and only the other operand has; `rows` and
    `columns` of the tile; `width` of a vector of partial sums, and how many `vectors` of them; `parallel`.
    """

    name: str = "dot"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Whether the one reduction sums products of floats over a dim along which both operands lie together."""
        if len(reductions(func)) != 1 or not all(isinstance(block.body, Store) for block in blocks_in(func.body)):
            return False
        block = _main(func)
        depth = block.iters[-1]
        if operands(block) is None or sum(it.kind == "reduce" for it in block.iters) != 1 or depth.kind != "reduce":
            return False
        if store_of(block).buffer.dtype not in ("float32", "float64") or not spatial(block):
            return False
        return _width(block, target) > 1 and strides(block, depth.var)[1:] == [1, 1]

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """See the class."""
        block = _main(func)
        row, column = _own_dims(block)
        most = lanes(target, block)
        return {
            "row": (None, *row),
            "column": (None, *column),
            "rows": tuple(range(1, _MOST + 1)),
            "columns": tuple(range(1, _MOST + 1)),
            "width": tuple(1 << i for i in range(1, most.bit_length())),
            "vectors": (1, 2, 4),
            "parallel": (False, True),
        }

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """A tile that has accumulators enough and, of two long dims, elements of both."""
        block = _main(func)
        own = [_longest(block, dims) for dims in _own_dims(block)]
        row, column = own
        most = [1 if dim is None else extent_of(spatial(block)[dim].extent) or 1 for dim in own]
        side = 4 if target.vector_registers >= 32 else 2
        rows = min(most[0], side if most[1] >= side else _ACCUMULATORS // max(1, most[1]))
        columns = min(most[1], side if rows >= side else _ACCUMULATORS // rows)
        width = _width(block, target)
        depth = extent_of(block.iters[-1].extent)
        known = width if depth is None else depth
        vectors = max(
            v for v in (1, 2, 4) if v == 1 or (known % (v * width) == 0 and v * rows * columns <= _ACCUMULATORS)
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
        name = _main(sch.func).name
        _check(_main(sch.func), decisions)
        inline_producers(sch)
        done = _schedule_dots(sch, name, decisions, target)
        for block in blocks_in(sch.func.body):
            if block.name not in done:
                schedule_map_by_model(sch, block.name, target)


def _main(func: PrimFunc) -> Block:
    """The reduction, with its operands where they come from."""
    return reductions(with_operands_inlined(func))[0]


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
    wide = sizes["width"] * sizes["vectors"]
    if min(sizes.values()) < 1 or sizes["width"] < 2 or wide & (wide - 1):
        hint = "sizes are above 0, width and vectors powers of two"
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
        blocks += [(part, size), (initialize(sch, part, len(outer)), size)]
    vectorize_lanes(sch, blocks, decisions["width"], (*outer, along))
    if decisions["parallel"]:
        parallelize(sch, outer, total, target)
    return {block.name for block, _ in blocks}


def _width(block: Block, target: TargetModel) -> int:
    """The lanes of a vector; of a half or a quarter of one, if a short sum is a few of just these."""
    length, width = extent_of(block.iters[-1].extent), lanes(target, block)
    if length is None or length >= _LONG * width:
        return width
    exact = next((part for part in (width, width // 2, width // 4) if part > 1 and length % part == 0), None)
    if exact is not None:
        return exact
    while width > length:
        width //= 2
    return width
