"""What a schedule rule is, and what it may know of a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, TypeVar

from kedge.compiler.errors import ScheduleError
from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.target.core import TargetModel
from kedge.compiler.tir.stmt import PrimFunc

__all__ = ["Decisions", "Rule", "Space", "TargetModel", "check_complete"]

#: A choice for each named decision of a rule's space. Plain JSON.
Decisions: TypeAlias = Mapping[str, Any]
#: The candidates of each named decision.
Space: TypeAlias = Mapping[str, tuple[Any, ...]]


TargetT = TypeVar("TargetT", contravariant=True)


class Rule(Protocol[TargetT]):
    """A way to schedule a family of functions.

    `default` picks decisions by a model of the target; tuning searches the same `space` by measuring. `apply` carries
    out either, so that a tuned kernel and a default kernel share all their code.
    """

    @property
    def name(self) -> str:
        """The rule's name, as reports and tuning records give it."""

    def match(self, func: PrimFunc, target: TargetT) -> bool:
        """Whether the rule is for functions like `func`."""

    def space(self, func: PrimFunc, target: TargetT) -> Space:
        """The decisions to be taken and their candidates."""

    def default(self, func: PrimFunc, target: TargetT) -> Decisions:
        """A good choice from `space`, without measuring."""

    def apply(self, sch: Schedule, decisions: Decisions, target: TargetT) -> None:
        """Schedule `sch`, which holds a function that the rule matches."""


def check_complete(rule: Rule[TargetT], func: PrimFunc, target: TargetT, decisions: Decisions) -> None:
    """Refuse decisions that lack one of the rule's, as those do that were saved before the rule had it."""
    missing = sorted(rule.space(func, target).keys() - decisions.keys())
    if missing:
        default = rule.default(func, target)
        raise ScheduleError(
            f"{func.name}: decisions of rule {rule.name!r} without {', '.join(missing)}",
            hint="tune again, or add what the rule itself takes: " + ", ".join(f"{k}={default[k]}" for k in missing),
        )
