"""What a schedule rule is, and what it may know of a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias, TypeVar

from kedge.compiler.schedule.schedule import Schedule
from kedge.compiler.tir.stmt import PrimFunc

#: A choice for each named decision of a rule's space. Plain JSON.
Decisions: TypeAlias = Mapping[str, Any]
#: The candidates of each named decision.
Space: TypeAlias = Mapping[str, tuple[Any, ...]]


class TargetModel(Protocol):
    """The analytic model of a processor that rules choose by."""

    @property
    def vector_bits(self) -> int:
        """Bits of a vector register; 0 where there are none."""

    @property
    def num_cores(self) -> int:
        """Cores that a parallel loop may use."""

    @property
    def vector_registers(self) -> int:
        """Vector registers that a program can name."""

    @property
    def l1_bytes(self) -> int:
        """Bytes of the first-level data cache of a core."""

    @property
    def l2_bytes(self) -> int:
        """Bytes of second-level cache that a core has to itself."""

    @property
    def l3_bytes(self) -> int:
        """Bytes of third-level cache that a core reaches and others share; 0 where there is none."""

    @property
    def l3_share_bytes(self) -> int:
        """A core's part of the third level while all cores work."""

    @property
    def fma_per_cycle(self) -> float:
        """Multiply-adds of whole vectors that a core starts in a cycle, at most; below 1 where one takes longer."""

    @property
    def fma_latency(self) -> int:
        """Cycles from one multiply-add to the next of the same accumulator."""

    @property
    def loads_per_cycle(self) -> float:
        """Vectors that a core loads from its first-level cache in a cycle, at most."""

    @property
    def stores_per_cycle(self) -> float:
        """Vectors that a core stores in a cycle, at most."""

    @property
    def fma(self) -> bool:
        """Whether multiply and add are one instruction."""

    @property
    def fma_by_element(self) -> bool:
        """Whether a multiply-add takes one element of a register for all lanes; none of its operands is in memory."""


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
