"""What data costs a core: the part of the analytic model that graph passes and schedule rules share."""

from __future__ import annotations

import math
from typing import Final

from kedge.compiler.target.core import TargetModel

#: Bytes of a cache line, of nearly every processor that kedge knows. The Cortex-A9's has 32, which is what its tiles
#: read of a row.
LINE_BYTES: Final = 64
#: Places that a second-level cache has for lines of one set, at least, nearly everywhere.
_WAYS = 8
#: Bytes that a core gets in a cycle from its second cache, from the third and from memory: what a Zen 4 was seen to
#: get, and of that order elsewhere. Boards without a third cache have slower memory: some gigabytes in a second.
_L2_RATE, _L3_RATE, _MEMORY_RATE, _BOARD_RATE = 32.0, 10.0, 6.0, 3.0
#: Cycles from asking memory for a line of a page that was not read for long, until it is there: some 200 ns.
MEMORY_LATENCY = 800


#: Bytes that a core multiplies in a cycle from which what lies far apart, or far away, is too slow in coming: Intel's
#: with two units of 512 bits, and Zen 5.
_FAST_BYTES = 128


def multiplies_fast(core: TargetModel) -> bool:
    """Whether a core multiplies faster than the hardware asks for what it multiplies."""
    return core.fma_per_cycle * core.vector_bits / 8 >= _FAST_BYTES


def asks_for_next(core: TargetModel, panels: int, size: int, tiles: int) -> bool:
    """Whether it pays to ask for the next of `panels`, `size` bytes in all, while `tiles` go over this one.

    It does where they come from beyond the second cache and a core multiplies fast: the first tile on a panel would
    wait for it. All of its tiles ask for a part of the next one; a single one would have to ask for all.
    """
    return multiplies_fast(core) and panels > 1 and tiles > 1 and 2 * size > core.l2_bytes


def stream_rate(core: TargetModel, size: int) -> float:
    """Bytes in a cycle in which a core reads data that takes `size` bytes of its caches, again and again."""
    if size <= core.l2_bytes * 3 / 4:
        return _L2_RATE
    if size <= core.l3_share_bytes:
        return _L3_RATE
    return _MEMORY_RATE if core.l3_share_bytes else _BOARD_RATE


def stays_near(core: TargetModel, rows: int, row_bytes: int, step: int) -> bool:
    """Whether `rows` rows, whose starts are `step` bytes apart, stay in the second cache of a core while it uses them.

    They take half of it at most, and no set has more of their lines than there are ways: rows a power of two apart meet
    in few sets.
    """
    way = core.l2_bytes // _WAYS
    apart = math.gcd(step, way)
    return 2 * rows * row_bytes <= core.l2_bytes and rows * max(apart, row_bytes) <= _WAYS * way


def transform_cycles(core: TargetModel) -> float:
    """Cycles for one vector of a tile's two-step transform: twice loaded, added to two or three others, stored."""
    return 2 / core.loads_per_cycle + 2 / core.stores_per_cycle + 2 / core.fma_per_cycle
