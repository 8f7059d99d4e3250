"""What analytic models may know of a processor: those of schedule rules, of register tiles, and of graph passes."""

from __future__ import annotations

from typing import Protocol


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
        """Whether a multiply-add takes one element of a vector register for all lanes."""

    @property
    def memory_operands(self) -> bool:
        """Whether arithmetic takes an operand from memory; else all that is loaded wants a register."""


def lanes_of(target: TargetModel, itemsize: int) -> int:
    """Elements of `itemsize` bytes in one vector register; 1 without vectors."""
    return max(1, target.vector_bits // (8 * itemsize))
