"""Vectors of partial results: how a reduction over elements that lie together uses all lanes."""

from __future__ import annotations

from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule


def halve(sch: Schedule, ref: BlockRef, lane: LoopRef, wide: int, width: int) -> list[tuple[BlockRef, int]]:
    """Let reduction `ref` combine partial results of `wide` lanes, the iterations of `lane`, until one is left.

    Partial results of `wide` elements become those of one vector of `width`, of half of it, and so on. Returns the
    blocks that make them, with the number of their lanes.
    """
    parts = [(sch.rfactor(ref, lane), wide)]
    while wide > 2:
        step = wide // width if wide > width else 2
        wide //= step
        _, lane = sch.split(sch.get_loops(ref)[-1], [step, wide])
        parts.append((sch.rfactor(ref, lane), wide))
    return parts
