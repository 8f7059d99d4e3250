"""Rules for GPUs: loops over outputs spread over threads, long reductions shared by the threads of a group.

They are right for every function and good for what memory bounds; tiles in shared memory are scheduled by hand so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.nest import loop_vars
from kedge.compiler.schedule.rules.analysis import block_named, inline_producers, is_reduction
from kedge.compiler.schedule.rules.rule import Decisions, Space
from kedge.compiler.schedule.schedule import BlockRef, LoopRef, Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, loops_on
from kedge.compiler.tir.simplify import Simplifier
from kedge.compiler.tir.stmt import For, PrimFunc, Store
from kedge.compiler.tir.updates import as_update

_GROUP = 256
#: Outputs from which there are threads enough without sharing a reduction: a few waves of a large GPU.
_MANY = 1 << 15


class GpuModel(Protocol):
    """What rules may know of a GPU."""

    @property
    def max_threads(self) -> int:
        """Threads that one group may have."""

    @property
    def warp(self) -> int:
        """Threads that run in lockstep; 1 where that is not known."""


@dataclass(frozen=True, slots=True)
class GpuThreads:
    """Each output by a thread of its own; where outputs are few and reductions long, each by a group of threads."""

    name: str = "gpu threads"

    def match(self, func: PrimFunc, target: GpuModel) -> bool:
        """Always."""
        return True

    def space(self, func: PrimFunc, target: GpuModel) -> Space:
        """Threads of a group, and how long a reduction must be for a group to share it."""
        return {"group": _sizes(target), "shared_reduction": (32, 128, 512)}

    def default(self, func: PrimFunc, target: GpuModel) -> Decisions:
        """Groups of 256 threads; reductions of 128 elements are shared."""
        sizes = _sizes(target)
        return {"group": max((size for size in sizes if size <= _GROUP), default=sizes[0]), "shared_reduction": 128}

    def apply(self, sch: Schedule, decisions: Decisions, target: GpuModel) -> None:
        """See the class."""
        inline_producers(sch)
        for name in [block.name for block in blocks_in(sch.func.body)]:
            _spread(sch, sch.get_block(name), decisions["group"], decisions["shared_reduction"])


def _sizes(target: GpuModel) -> tuple[int, ...]:
    """Sizes of groups: whole warps, as far as the target goes; all of it where that is less."""
    whole = (size for size in (32, 64, 128, 256, 512, 1024) if size % target.warp == 0)
    return tuple(size for size in whole if size <= target.max_threads) or (target.max_threads,)


def _spread(sch: Schedule, ref: BlockRef, group: int, shared: int) -> None:
    """Bind the loops of one block, which stands in loops of its own."""
    loops, nodes = sch.get_loops(ref), loops_on(block_path(sch.func, ref.name))
    if not loops:
        return  # one thread computes the one element
    block = block_named(sch.func, ref.name)
    reducing, placing = loop_vars(block, "reduce"), loop_vars(block, "spatial")
    outputs = [loop for loop, node in zip(loops, nodes, strict=True) if node.var not in reducing]
    reduced = [loop for loop, node in zip(loops, nodes, strict=True) if node.var in reducing]
    whole = loops[: len(outputs)] == tuple(outputs) and not reducing & placing
    length = _most([node for node in nodes if node.var in reducing])
    few = _most([node for node in nodes if node.var not in reducing]) < _MANY
    shares = is_reduction(block) and isinstance(block.body, Store) and as_update(block.body) is not None
    try:
        if not whole:
            raise ScheduleError(f"{ref.name}: loops of its output stand inside those of its reduction")
        if shares and few and length >= shared:
            _share(sch, outputs, reduced, group)
        elif outputs:
            _threads(sch, ref, outputs, group, accumulates=is_reduction(block) and isinstance(block.body, Store))
        else:
            _alone(sch, ref)
    except ScheduleError:
        _alone(sch, ref)


def _most(nodes: list[For]) -> float:
    """An upper bound of the iterations of a nest; infinite where a free dim has none."""
    tops = [Simplifier().bounds(node.extent)[1] for node in nodes]
    return math.prod(math.inf if top is None else top for top in tops)


def _share(sch: Schedule, outputs: list[LoopRef], reduced: list[LoopRef], group: int) -> None:
    """A group for each output, whose threads take turns in the reduction."""
    loop = sch.fuse(*reduced) if len(reduced) > 1 else reduced[0]
    rounds, thread = sch.split(loop, [None, group])
    sch.reorder(thread, rounds)
    if outputs:
        sch.bind(sch.fuse(*outputs) if len(outputs) > 1 else outputs[0], "blockIdx.x")
    sch.bind(thread, "threadIdx.x")


def _threads(sch: Schedule, ref: BlockRef, outputs: list[LoopRef], group: int, *, accumulates: bool) -> None:
    """A thread for each output."""
    loop = sch.fuse(*outputs) if len(outputs) > 1 else outputs[0]
    blocks, thread = sch.split(loop, [None, group])
    if accumulates:
        sch.cache_write(ref, thread, "local")
    sch.bind(blocks, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")


def _alone(sch: Schedule, ref: BlockRef) -> None:
    """One thread for what no threads can share, because iterations need one another."""
    if all(node.kind == "serial" for node in loops_on(block_path(sch.func, ref.name))):
        only, _ = sch.split(sch.get_loops(ref)[0], [1, None])
        sch.bind(only, "blockIdx.x")
