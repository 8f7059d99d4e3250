"""The rule for everything else: the loops as lowering made them."""

from __future__ import annotations

from dataclasses import dataclass

from kedge.compiler.schedule.rules.rule import Decisions, Space, TargetModel
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.stmt import PrimFunc


@dataclass(frozen=True, slots=True)
class Fallback:
    """Run the loops serially: right for any function, fast for none."""

    name: str = "fallback"

    def match(self, func: PrimFunc, target: TargetModel) -> bool:
        """Always."""
        return True

    def space(self, func: PrimFunc, target: TargetModel) -> Space:
        """Nothing to decide."""
        return {}

    def default(self, func: PrimFunc, target: TargetModel) -> Decisions:
        """Nothing to decide."""
        return {}

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetModel) -> None:
        """Leave the function as it is."""
