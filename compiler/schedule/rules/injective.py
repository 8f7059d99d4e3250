"""Functions in which every element is computed on its own: element-wise chains, broadcasts, transposes, gathers."""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.schedule.rules.analysis import inline_producers, reductions
from kedge.compiler.schedule.rules.maps import schedule_map_by_model
from kedge.compiler.schedule.rules.rule import Decisions, Space, TargetModel
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.schedule.tree import blocks_in
from kedge.compiler.tir.stmt import PrimFunc, Store


@dataclass(frozen=True, slots=True)
class Injective:
    """Inline the chain, fuse the loops, vectorize what is contiguous, spread big ones over the cores."""

    name: str = "injective"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Whether no block reduces."""
        return not reductions(func) and all(isinstance(block.body, Store) for block in blocks_in(func.body))

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """Whether to inline; the loops themselves follow from the shapes."""
        return {"inline": (True, False)}

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """Inline."""
        return {"inline": True}

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetModel) -> None:
        """See the class."""
        if decisions["inline"]:
            inline_producers(sch)
        for block in blocks_in(sch.func.body):
            schedule_map_by_model(sch, block.name, target)
