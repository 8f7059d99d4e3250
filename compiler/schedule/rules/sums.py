"""Sums in blocks: products of few rows with a large second operand that lies as it came, on cores that multiply fast.

A panel of such an operand has a piece of each of its rows, which lie too far apart for the hardware to foresee. In
blocks of the sum, neighbouring panels are the next pieces of the same few rows, as the hardware expects.

The sum is split as in the outer loop of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
(TOMS 2008), whose blocks of k are there to keep packed panels near: blocking of k, as the field says. The
results of a block are what `rfactor` makes, and are added up one block after the other, not side by side.
"""

from __future__ import annotations

import math

from kedge.compiler.schedule.rules.analysis import block_named, extent_of, spatial
from kedge.compiler.schedule.rules.product import Product, aligned_loops
from kedge.compiler.schedule.rules.rule import Decisions, TargetModel
from kedge.compiler.schedule.rules.stream import MOST_TILES
from kedge.compiler.schedule.rules.threads import cycles, is_worth_threads, parallelize
from kedge.compiler.schedule.rules.tile import take_consumer
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.target.costs import multiplies_fast
from kedge.compiler.target.tiles import RegisterTile

#: Steps of the sum that a block may have. By default it has as many as there can be up to 64, and 16 at least: on an
#: Emerald Rapids 64 gave 16x2048x2048 93 GFLOP/s, 32 gave 88; in C 128 and 256 lost a third to a half of what 64 had
#: gained in time (docs/performance.md).
_STEPS, _USUAL_STEPS = range(2, 257), range(16, 65)
#: Panels that a core has at least: the next one that is asked for is its own then, mostly.
_LEAST_PANELS = 4
#: The part of the second-level cache that results may take: they come and go with each block of the sum.
_PART_OF_L2 = 4


def steps_of(product: Product) -> tuple[int, ...]:
    """The steps that a block of the sum can have: those that divide it, where all sizes are known."""
    depth = extent_of(product.depth.extent)
    sizes = [extent_of(axis.extent) for axis in spatial(product.block)]
    if depth is None or None in sizes or product.panel is not None or product.turned:
        return ()
    return tuple(steps for steps in _STEPS if steps < depth and depth % steps == 0)


def sum_decisions(product: Product, tile: RegisterTile, unroll: int, target: TargetModel) -> dict[str, int | bool]:
    """Steps of a block, and tiles of columns whose results wait meanwhile: a core's.

    Empty where cores have too few, or one tile of rows would have to ask for all of the next columns.
    """
    usual = [steps for steps in steps_of(product) if steps in _USUAL_STEPS and steps % unroll == 0]
    columns, row = product.extent(product.column), product.longest_row
    height = 1 if row is None else product.extent(row)
    if not usual or not multiplies_fast(target) or columns is None or height is None or height <= tile.rows:
        return {}
    cores = target.num_cores if is_worth_threads([product.block], target) else 1
    most = min(MOST_TILES, target.l2_bytes // (_PART_OF_L2 * height * tile.columns * product.itemsize))
    panels = math.ceil(columns / tile.columns)
    block = math.ceil(panels / (cores * math.ceil(panels / (cores * max(1, most)))))
    return {"depth": max(usual), "block": block, "next": True} if block >= _LEAST_PANELS else {}


def schedule_sums(sch: Schedule, product: Product, decisions: Decisions, target: TargetModel) -> set[str]:
    """Rewrite the product and what follows it; returns the names of the blocks that are done.

    Rewrite:
        for i, j, k: block   ->   for j_0 in parallel(…):
                                    for i, j: block = 0
                                    for k_0, j_1, i_0:
                                      tile = 0
                                      for k_1: tile += a[…] * b[…]
                                      block += tile
                                    for i, j: y[…] = block[…]   (with the consumer's computation)
    """
    results = sch.get_block(product.block.name)
    total = cycles(block_named(sch.func, results.name), target)
    loops = aligned_loops(sch, product, decisions)
    part, step = sch.split(loops[-1], [None, decisions["depth"]])
    sch.reorder(part, *loops[:-1], step)
    sums = sch.rfactor(results, part)
    *loops, part = sch.get_loops(results)
    column, row = loops[product.column], None if decisions["row"] is None else loops[decisions["row"]]
    outer = [loop for loop in loops if loop is not column and loop is not row]
    tiles: list[LoopRef] = []
    rows: list[LoopRef] = []
    if row is not None:
        tiles, rows = ([loop] for loop in sch.split(row, [None, decisions["rows"]]))
    width, vectors = decisions["width"], decisions["vectors"]
    block, panel, vector, lane = sch.split(column, [None, max(1, decisions["block"]), vectors, width])
    outer.append(block)
    sch.reorder(*outer, part, panel, *tiles, *rows, vector, lane)
    innermost = [panel, *tiles][-1]
    sch.compute_at(sums, innermost)
    copy = sch.cache_write(results, block, "local")
    take_consumer(sch, copy)
    *down, across, step = _inside(sch, sums, innermost)
    lanes = sch.split(across, [None, width])
    along, steps = sch.split(step, [None, decisions["unroll"]])
    sch.reorder(along, steps, *down, *lanes)
    sch.set_scope(sums, "register")
    first, init = sch.decompose_reduction(results, part), sch.decompose_reduction(sums, along)
    sch.unroll(steps)
    for each in (init, sums, results):
        for loop in _inside(sch, each, innermost)[:-1]:
            if loop not in (along, steps):
                sch.unroll(loop)
    made = (first, init, sums, results, copy)
    for each in made if width > 1 else ():
        sch.vectorize(sch.get_loops(each)[-1])
    if decisions["parallel"]:
        parallelize(sch, outer, total, target)
    if decisions["next"]:
        sch.prefetch(sums, product.b.buffer.name, panel, 1, spread=True)
    return {each.name for each in made}


def _inside(sch: Schedule, block: BlockRef, loop: LoopRef) -> list[LoopRef]:
    """The loops around a block that are inside of `loop`."""
    loops = list(sch.get_loops(block))
    return loops[loops.index(loop) + 1 :]
