"""Cores that are kept for timings, and what others do on them meanwhile. Standard library only."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import AbstractSet, List, Optional, Sequence, Tuple

from kedge.rpc.errors import UsageError

#: The kernel counts time in steps; over less than this a share of it would be noise.
MIN_WATCH_S = 0.25


def parse_cores(text: str, allowed: AbstractSet[int]) -> Tuple[int, ...]:
    """The cores that "2-3,6" means.

    Raises:
        UsageError: that is no list of cores, this process may not use them all, or none is left for anything else.
    """
    cores: List[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
            raise UsageError(f"--measure-cores {text!r} is no list of cores", hint="such as 3, 2-3 or 0,2-3")
        cores += range(int(first), int(last if dash else first) + 1)
    strange = sorted(set(cores) - allowed)
    if strange:
        have = ", ".join(str(core) for core in sorted(allowed))
        raise UsageError(f"--measure-cores {text}: this process may not run on {strange[0]}", hint=f"it may on {have}")
    if set(cores) == set(allowed):
        raise UsageError(
            f"--measure-cores {text} leaves no core for the agent and for jobs that time nothing",
            hint="leave one out, best the first: interrupts go there",
        )
    return tuple(sorted(set(cores)))


class Watch:
    """What others than one process use of some cores, from now until `others_share` is asked."""

    def __init__(self, pid: int, cpus: Sequence[int], *, root: Path = Path("/")) -> None:
        self.cpus = tuple(cpus)
        self._pid = pid
        self._root = root
        self._began = time.monotonic()
        self._before = self._read()

    def others_share(self) -> Optional[float]:
        """The share of the cores' time, from 0 to 1; None where the kernel does not say, or it was too short."""
        wall, before, after = time.monotonic() - self._began, self._before, self._read()
        if wall < MIN_WATCH_S or before is None or after is None:
            return None
        others = (after[0] - before[0]) - (after[1] - before[1])
        return min(1.0, max(0.0, others / (wall * len(self.cpus))))

    def _read(self) -> Optional[Tuple[float, float]]:
        """Seconds that the cores were busy, stolen by other machines included, and those of the process alone."""
        try:
            busy = busy_s((self._root / "proc/stat").read_text(), self.cpus)
            # The name, in parentheses, may hold anything.
            fields = (self._root / f"proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            return None if busy is None else (busy, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
        except (OSError, ValueError, IndexError):
            return None


def busy_s(text: str, cpus: Sequence[int]) -> Optional[float]:
    """Seconds that these cores were not idle, out of /proc/stat; None unless it has them all."""
    ticks, found = 0, 0
    wanted = {f"cpu{cpu}" for cpu in cpus}
    for line in text.splitlines():
        name, *numbers = line.split()
        if name in wanted:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(number) for number in numbers[:8])
            ticks += user + nice + system + irq + softirq + steal
            found += 1
    return ticks / os.sysconf("SC_CLK_TCK") if found == len(wanted) else None
