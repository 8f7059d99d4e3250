"""Spreading loops over cores: whether it pays, and from how many iterations on where that is known only at run time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from kedge.compiler.schedule.rules.analysis import at_least, lanes, work
from kedge.compiler.schedule.rules.rule import TargetModel
from kedge.compiler.schedule.schedule import LoopRef, Schedule
from kedge.compiler.target import free
from kedge.compiler.tir.expr import Const
from kedge.compiler.tir.simplify import Simplifier
from kedge.compiler.tir.stmt import Block

#: Cycles of one core from which spreading a loop over threads pays: about 10 us, since waking a thread takes some 5 us.
PARALLEL_CYCLES = 1 << 15
#: Vector operations in a cycle of well scheduled code.
_PER_CYCLE = 2
#: Iterations per core with which chunks of whole iterations are balanced well enough, and where they divide evenly.
_PER_CORE = 16
_FEW_PER_CORE = 4


def cycles(block: Block, target: TargetModel) -> float:
    """Cycles of the block on one core, at the least size of its symbolic dims."""
    return work(block) / (lanes(target, block) * _PER_CYCLE)


def is_worth_threads(blocks: Iterable[Block], target: TargetModel) -> bool:
    """Whether the blocks, taken together, are big enough for the target's cores, or may be at run time."""
    if target.num_cores < 2:
        return False
    listed = tuple(blocks)
    if any(_is_open(block) for block in listed):
        return True
    return sum(cycles(block, target) for block in listed) >= PARALLEL_CYCLES


def parallelize(sch: Schedule, loops: list[LoopRef], total_cycles: float, target: TargetModel) -> list[LoopRef]:
    """Spread perfectly nested `loops` over threads; `total_cycles` is what they cost at their least size.

    Returns the innermost of them, which stay as they are.

    Only as many of the outermost are fused as give every core enough iterations: taking an iteration apart again costs
    divisions, which the loops inside of it then do without.

    Where the number of iterations is known only at run time, the loop carries the `grain` below which it is not worth
    the threads and runs on the calling one. Chunks are static: these iterations cost the same, and the next loop finds
    in each core's cache what this one left there.

    Rewrite:
        for i: for j: …   ->   for i_j in parallel(…):  # grain=n
    """
    count = _enough(sch, loops, target.num_cores)
    outermost = loops[:count]
    loop = sch.fuse(*outermost) if len(outermost) > 1 else outermost[0]
    sch.parallel(loop)
    extent = sch.extent(loop)
    if not isinstance(extent, Const):
        per_iteration = max(1.0, total_cycles / at_least(extent))
        sch.annotate(loop, "grain", math.ceil(PARALLEL_CYCLES / per_iteration))
    return loops[count:]


def keeps_busy(count: int, cores: int) -> bool:
    """Whether `count` equal iterations keep all cores equally busy."""
    return count >= _PER_CORE * cores or (count >= _FEW_PER_CORE * cores and count % cores == 0)


def _enough(sch: Schedule, loops: Sequence[LoopRef], cores: int) -> int:
    """How many of the outermost loops have iterations enough to keep all cores equally busy.

    Free dims within the outermost loop are taken to have some: where they were all fused for fear of a size of 1, each
    element of a transpose would be divided out of one number.
    """
    count = 1
    for number, loop in enumerate(loops, 1):
        extent = sch.extent(loop)
        open_ = number > 1 and not isinstance(extent, Const)
        count *= max(at_least(extent), free.ITERATIONS) if open_ else at_least(extent)
        if keeps_busy(count, cores):
            return number
    return len(loops)


def _is_open(block: Block) -> bool:
    """Whether an extent has no known upper bound."""
    return any(Simplifier().bounds(it.extent)[1] is None for it in block.iters if it.kind == "spatial")
