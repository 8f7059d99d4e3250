"""What data costs a core: the part of the analytic model that graph passes and schedule rules share."""

from __future__ import annotations

from typing import Protocol

#: Bytes that a core gets in a cycle from its second cache, from the third and from memory: what a Zen 4 was seen to
#: get, and of that order elsewhere. Boards without a third cache have slower memory: some gigabytes in a second.
_L2_RATE, _L3_RATE, _MEMORY_RATE, _BOARD_RATE = 32.0, 10.0, 6.0, 3.0


class Core(Protocol):
    """What the model knows of a core."""

    @property
    def l2_bytes(self) -> int:
        """Bytes of second-level cache that a core has to itself."""

    @property
    def l3_share_bytes(self) -> int:
        """A core's part of the third level while all cores work."""

    @property
    def fma_per_cycle(self) -> float:
        """Multiply-adds of whole vectors that a core starts in a cycle, at most."""

    @property
    def loads_per_cycle(self) -> float:
        """Vectors that a core loads in a cycle, at most."""

    @property
    def stores_per_cycle(self) -> float:
        """Vectors that a core stores in a cycle, at most."""


def stream_rate(core: Core, size: int) -> float:
    """Bytes in a cycle in which a core reads data that takes `size` bytes of its caches, again and again."""
    if size <= core.l2_bytes * 3 / 4:
        return _L2_RATE
    if size <= core.l3_share_bytes:
        return _L3_RATE
    return _MEMORY_RATE if core.l3_share_bytes else _BOARD_RATE


def transform_cycles(core: Core) -> float:
    """Cycles for one vector of a tile's two-step transform: twice loaded, added to two or three others, stored."""
    return 2 / core.loads_per_cycle + 2 / core.stores_per_cycle + 2 / core.fma_per_cycle
