"""Products of few rows: the second operand streams past row by row, and a block of results waits in the nearest cache.

Each element of the second operand is used just once for each of the rows, so that memory is what takes the time. It is
fastest read as it lies, which a register tile, with the whole sum inside, does not do where rows are long.
"""

from __future__ import annotations

from kedge.compiler.schedule.rules.analysis import block_named, extent_of
from kedge.compiler.schedule.rules.product import Product, aligned_loops
from kedge.compiler.schedule.rules.rule import Decisions, TargetModel
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, parallelize
from kedge.compiler.schedule.rules.tile import take_consumer
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.target.core import lanes_of

#: Rows up to which memory takes longer than the multiply-adds, their results being stored and loaded in between.
_MOST_ROWS = 4
#: Steps of the sum for which a result stays in its register: as many rows of the second operand are read at once.
_STEPS = 8
#: Bytes between rows that begin in one set of the first-level cache: half as many of them are read at once.
ALIAS = 4096
#: The part of the first-level cache that results may take: rows of the second operand pass through the rest.
PART_OF_L1 = 2
#: Tiles of columns that a block has at most; up to so many, any number of them.
MOST_BLOCK, MOST_TILES = 1024, 64


def streams(product: Product, target: TargetModel) -> bool:
    """Whether the product has few rows, and an operand that lies as it came, of more than one tile's columns."""
    row, columns = product.longest_row, product.extent(product.column)
    height = 1 if row is None else product.extent(row)
    if product.panel is not None or product.turned or height is None or height > _MOST_ROWS or columns is None:
        return False
    return columns * product.itemsize * 8 > 4 * target.vector_bits


def stream_decisions(product: Product, target: TargetModel) -> dict[str, int]:
    """Rows, vectors, steps of the sum and columns of a block: one for each core, if its results fit the cache."""
    row, columns = product.longest_row, product.extent(product.column)
    height = (1 if row is None else product.extent(row)) or 1
    depth = extent_of(product.depth.extent)
    vectors = 4 if height == 1 else 1
    step = vectors * lanes_of(target, product.itemsize)
    block = 1 << (max(1, target.l1_bytes // (PART_OF_L1 * product.itemsize * step)).bit_length() - 1)
    cores = target.num_cores if is_worth_threads([product.block], target) else 1
    if columns is not None:
        block = min(block, 1 << (-(-columns // (step * cores)) - 1).bit_length())
    block = min(block, MOST_BLOCK)
    steps = _STEPS // 2 if product.depth_bytes and product.depth_bytes % ALIAS == 0 else _STEPS
    unroll = steps if depth is None else min(steps, 1 << (depth.bit_length() - 1))
    return {"rows": height, "vectors": vectors, "unroll": unroll, "block": block}


def schedule_stream(sch: Schedule, product: Product, decisions: Decisions, target: TargetModel) -> set[str]:
    """Rewrite the product and what follows it; returns the names of the blocks that are done.

    Rewrite:
        for i, j, k: block   ->   for i_0, j_0 in parallel(…):
                                    for i, j: block = 0
                                    for k_0: for j: for k_1, i: block[i, j] += a[i, k] * b[k, j]
                                    for i, j: y[…] = block[…]   (with the consumer's computation)
    """
    ref = sch.get_block(product.block.name)
    total = cycles(block_named(sch.func, ref.name), target)
    loops = aligned_loops(sch, product, decisions)
    column, depth = loops[product.column], loops[-1]
    row = None if decisions["row"] is None else loops[decisions["row"]]
    outer = [loop for loop in loops[:-1] if loop is not column and loop is not row]
    inner: list[LoopRef] = []
    if row is not None:
        around, step = sch.split(row, [None, decisions["rows"]])
        outer.append(around)
        inner.append(step)
    width, vectors = decisions["width"], decisions["vectors"]
    block, chunk, vector, lane = sch.split(column, [None, max(1, decisions["block"]), vectors, width])
    outer.append(block)
    along, steps = sch.split(depth, [None, decisions["unroll"]])
    sch.reorder(*outer, along, chunk, steps, *inner, vector, lane)
    copy = sch.cache_write(ref, block, "local")
    take_consumer(sch, copy)
    init = sch.decompose_reduction(ref, along)
    for loop in (steps, *inner, vector):
        sch.unroll(loop)
    for each in (ref, init, copy):
        if width > 1:
            sch.vectorize(sch.get_loops(each)[-1])
    if decisions["parallel"]:
        parallelize(sch, outer, total, target)
    return {ref.name, init.name, copy.name}
