"""The data caches of this machine, as Linux describes them: what a compiler and an agent say of the same processor."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, NamedTuple, Optional, Set

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Caches(NamedTuple):
    """Bytes of data cache of each level; 0 where there is none.

    The first two are a core's: one that cores share counts by its part. The third is all that one core can reach.
    """

    l1_bytes: int
    l2_bytes: int
    l3_bytes: int


def read_caches(cpus: Iterable[int], root: Path = Path("/")) -> Optional[Caches]:
    """The caches of the largest core among `cpus`, or None where the kernel describes no first level.

    Where cores differ, kernels number the large ones first (x86) or last (ARM), so these two are looked at.

    Args:
        cpus: Linux's numbers of the CPUs that code may run on.
        root: where /sys is looked up.
    """
    numbers = sorted(cpus)
    found = [_read_core(root / f"sys/devices/system/cpu/cpu{number}/cache") for number in {numbers[0], numbers[-1]}]
    return max((caches for caches in found if caches is not None), default=None)


def _read_core(folder: Path) -> Optional[Caches]:
    sizes, sharers = {}, {}
    for index in sorted(folder.glob("index*")):
        try:
            level = int((index / "level").read_text())
            kind = (index / "type").read_text().strip()
            size = _bytes((index / "size").read_text().strip())
            shared = len(_cpu_list((index / "shared_cpu_list").read_text().strip()))
        except (OSError, ValueError):
            continue  # an entry that is not there or not understood says nothing
        if kind in ("Data", "Unified"):
            sizes[level], sharers[level] = size, shared
    if 1 not in sizes:
        return None
    # Threads of one core share its first level; the second is divided by cores, not by threads.
    cores = max(1, sharers.get(2, 1) // max(1, sharers[1]))
    return Caches(sizes[1], sizes.get(2, 0) // cores, sizes.get(3, 0))


def _bytes(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text)


def _cpu_list(text: str) -> Set[int]:
    """The numbers of a list as Linux writes it: 0-3,8."""
    numbers: Set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
