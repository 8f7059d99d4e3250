"""Which waiting job gets which idle device: priority first, then first come, first served. Pure.

Jobs that want the same thing (selector, and what their artifact runs on) stand in one line, so that a plan looks at
the heads of the lines and not at every job.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kedge.rpc.tracker.facts import Needs


@dataclass(frozen=True, slots=True)
class Want:
    """What a job asks of a device."""

    selector: str
    needs: Needs


Matches = Callable[[Want, str], bool]
#: Smaller goes first: (-priority, sequence number, job id).
Place = tuple[int, int, str]


class Queue:
    """The waiting jobs."""

    def __init__(self) -> None:
        self._lines: dict[Want, list[Place]] = {}
        self._waiting: dict[str, Want] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._waiting

    def wants(self) -> Iterable[Want]:
        """What is waited for, each once."""
        return self._lines.keys()

    def push(self, job_id: str, want: Want, priority: int, seq: int) -> None:
        """Put a job in its line; a job that was there before keeps its place by its `seq`."""
        self._waiting[job_id] = want
        heapq.heappush(self._lines.setdefault(want, []), (-priority, seq, job_id))

    def remove(self, job_id: str) -> None:
        """The job waits no longer."""
        want = self._waiting.pop(job_id)
        line = self._lines[want]
        # A place further back is forgotten when its turn comes.
        while line and line[0][2] not in self._waiting:
            heapq.heappop(line)
        if not line:
            del self._lines[want]

    def assign(self, idle: Iterable[str], matches: Matches) -> list[tuple[str, str]]:
        """Take out the jobs that can start now, each with its device.

        `idle` names devices, longest idle first. A job takes the device that the fewest lines could use, so that a
        job which asks for little does not occupy the one device that another has to have.
        """
        assigned: list[tuple[str, str]] = []
        free = list(idle)
        usable = {want: [name for name in free if matches(want, name)] for want in self._lines}
        while True:
            heads = [(line[0], want) for want, line in self._lines.items() if usable.get(want)]
            if not heads:
                return assigned
            (_, _, job_id), want = min(heads, key=lambda head: head[0])
            device = min(usable[want], key=lambda name: sum(name in names for names in usable.values()))
            self.remove(job_id)
            assigned.append((job_id, device))
            if want not in self._lines:
                del usable[want]
            for names in usable.values():
                if device in names:
                    names.remove(device)
