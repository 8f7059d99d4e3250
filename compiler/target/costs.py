"""What data costs a core: the part of the analytic model that graph passes and schedule rules share."""

from __future__ import annotations

from kedge.compiler.target.core import TargetModel

#: Bytes that a core gets in a cycle from its second cache, from the third and from memory: what a Zen 4 was seen to
#: get, and of that order elsewhere. Boards without a third cache have slower memory: some gigabytes in a second.
_L2_RATE, _L3_RATE, _MEMORY_RATE, _BOARD_RATE = 32.0, 10.0, 6.0, 3.0


def stream_rate(core: TargetModel, size: int) -> float:
    """Bytes in a cycle in which a core reads data that takes `size` bytes of its caches, again and again."""
    if size <= core.l2_bytes * 3 / 4:
        return _L2_RATE
    if size <= core.l3_share_bytes:
        return _L3_RATE
    return _MEMORY_RATE if core.l3_share_bytes else _BOARD_RATE


def transform_cycles(core: TargetModel) -> float:
    """Cycles for one vector of a tile's two-step transform: twice loaded, added to two or three others, stored."""
    return 2 / core.loads_per_cycle + 2 / core.stores_per_cycle + 2 / core.fma_per_cycle
