"""The schedule a function gets without tuning: the first rule that matches, with the decisions of its model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypeVar

from kedge.compiler.errors import ScheduleError
from kedge.compiler.lower.program import Kernel
from kedge.compiler.schedule.rules.contraction import Contraction
from kedge.compiler.schedule.rules.dot import Dot
from kedge.compiler.schedule.rules.fallback import Fallback
from kedge.compiler.schedule.rules.gpu import GpuThreads
from kedge.compiler.schedule.rules.injective import Injective
from kedge.compiler.schedule.rules.matmul import Matmul
from kedge.compiler.schedule.rules.reduction import Reduction
from kedge.compiler.schedule.rules.rule import Decisions, Rule, TargetModel, check_complete
from kedge.compiler.schedule.rules.winograd import Winograd
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import block_path, blocks_in, loops_in, loops_on
from kedge.compiler.target.gpu import GpuTarget
from kedge.compiler.tir.expr import Const
from kedge.compiler.tir.stmt import PrimFunc

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: All rules for CPUs, the more special first. The last one matches everything.
RULES: tuple[Rule[TargetModel], ...] = (
    Injective(),
    Winograd(),
    Matmul(),
    Dot(),
    Contraction(),
    Reduction(),
    Fallback(),
)
#: Those for GPUs, likewise.
GPU_RULES: tuple[Rule[GpuTarget], ...] = (GpuThreads(),)


def is_scheduled(func: PrimFunc) -> bool:
    """Whether a function shows that it was scheduled: by its loops, annotations, or scopes of its buffers."""
    special = any(loop.kind != "serial" or loop.annotations for loop in loops_in(func.body))
    noted = any(block.annotations for block in blocks_in(func.body))
    return special or noted or any(buffer.scope != "global" for buffer in func.allocs) or not is_plain(func)


def _is_empty(func: PrimFunc) -> bool:
    return any(isinstance(loop.extent, Const) and loop.extent.value == 0 for loop in loops_in(func.body))


def is_plain(func: PrimFunc) -> bool:
    """Whether every block stands in loops of its own, one per iteration variable in order, as lowering makes them."""
    for block in blocks_in(func.body):
        loops = loops_on(block_path(func, block.name))
        if [id(loop.var) for loop in loops] != [id(binding) for binding in block.bindings]:
            return False
    return True


def schedule_func(
    func: PrimFunc, target: TargetModel | GpuTarget, *, decisions: Decisions | None = None, origin: Sequence[str] = ()
) -> Kernel:
    """`func` scheduled for `target`: the function, the rule, its decisions and the trace that replays.

    `decisions` (from a tuning record) replace those of the rule's model. There is always a rule that applies: where
    one that matches is refused by a primitive, the next takes its place, and `decisions["refused"]` says so.

    Raises:
        ScheduleError: `decisions` were given and lack one of the rule's, or cannot be carried out.
    """
    if isinstance(target, GpuTarget):
        return _by_rules(func, GPU_RULES, target, decisions, origin)
    # What somebody has reshaped already is beyond the rules, but for the last, which leaves it as it is; so is what
    # computes nothing.
    rules = RULES if is_plain(func) and not _is_empty(func) else RULES[-1:]
    return _by_rules(func, rules, target, decisions, origin)


def _by_rules(
    func: PrimFunc, rules: Sequence[Rule[_T]], target: _T, decisions: Decisions | None, origin: Sequence[str]
) -> Kernel:
    refused: dict[str, Any] = {}
    for rule in rules:
        if not rule.match(func, target):
            continue
        if decisions is None:
            chosen = rule.default(func, target)
        else:
            check_complete(rule, func, target, decisions)
            chosen = decisions
        sch = Schedule(func)
        try:
            rule.apply(sch, chosen, target)
        except ScheduleError as error:
            if decisions is not None:
                raise
            reason = error.message.splitlines()[0]
            of = f" (node {', '.join(origin)})" if origin else ""
            _log.warning("%s%s: rule %s does not apply: %s", func.name, of, rule.name, reason)
            refused[rule.name] = reason
            continue
        taken = {**chosen, "refused": refused} if refused else dict(chosen)
        return Kernel(sch.func, rule.name, taken, tuple(sch.trace), tuple(origin))
    raise AssertionError("the last rule matches and applies to everything")
