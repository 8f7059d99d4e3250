"""Vectors of partial results: how a reduction over elements that lie together uses all lanes."""

from __future__ import annotations

from collections.abc import Iterable

from kedge.compiler.schedule.rules.analysis import block_named, store_of
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.schedule.tree import writers


def halve(sch: Schedule, ref: BlockRef, lane: LoopRef, wide: int, width: int) -> list[tuple[BlockRef, int]]:
    """Let reduction `ref` combine partial results of `wide` lanes, the iterations of `lane`, until one is left.

    Partial results of `wide` elements become those of one vector of `width`, of half of it, and so on: a result of
    shape [S…] comes from partial ones of [wide, S…], [width, S…], [width / 2, S…] … [2, S…], of its dtype. Both numbers
    are powers of two. Returns the blocks that make them, with the number of their lanes.

    Raises:
        ScheduleError: `ref` does not reduce along `lane`, or its sum cannot be taken apart (see `Schedule.rfactor`).
    """
    parts = [(sch.rfactor(ref, lane), wide)]
    while wide > 2:
        step = wide // width if wide > width else 2
        wide //= step
        _, lane = sch.split(sch.get_loops(ref)[-1], [step, wide])
        parts.append((sch.rfactor(ref, lane), wide))
    return parts


def initialize(sch: Schedule, ref: BlockRef, depth: int) -> BlockRef:
    """The block that initialises reduction `ref` inside its `depth` outermost loops.

    Where a vector is not full, there is one already.
    """
    block = block_named(sch.func, ref.name)
    if block.init is not None:
        return sch.decompose_reduction(ref, sch.get_loops(ref)[depth])
    (found,) = (each for each in writers(sch.func, store_of(block).buffer) if each is not block)
    return sch.get_block(found.name)


def vectorize_lanes(
    sch: Schedule, blocks: Iterable[tuple[BlockRef, int]], width: int, around: Iterable[LoopRef]
) -> None:
    """Run the lanes of `blocks`, given with the number of these, in vectors of `width`, and unroll their other loops
    but those in `around`."""
    done = set(around)
    for block, lanes in blocks:
        loops = list(sch.get_loops(block))
        if lanes > width:
            loops[-1:] = sch.split(loops[-1], [None, width])
        if lanes > 1:
            sch.vectorize(loops.pop())
        for loop in loops:
            if loop not in done:
                done.add(loop)
                sch.unroll(loop)
