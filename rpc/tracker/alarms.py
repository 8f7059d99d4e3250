"""When the tracker has to look at something, the earliest first. Pure; times are Unix milliseconds."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

#: Alarms that are of no use any more are dropped when they are more than all others, and this many.
_SPARE_ALARMS = 64


class Alarms:
    """Times at which to look at a job, a device ("device") or what changes for all devices ("fleet").

    What is looked at too early is looked at again.

    Args:
        lives: whether a job is not done; the alarms of others are of no use.
    """

    def __init__(self, lives: Callable[[str], bool]) -> None:
        self._lives = lives
        self._heap: list[tuple[int, str, str]] = []
        #: How many were of use when they were last looked through.
        self._kept = 0

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def next(self) -> int | None:
        """The time of the first one."""
        return self._heap[0][0] if self._heap else None

    def set(self, when: int, kind: str, name: str) -> None:
        """Look at "job", "device" or "fleet" of this name then."""
        heapq.heappush(self._heap, (when, kind, name))
        if len(self._heap) > 2 * self._kept + _SPARE_ALARMS:
            self._drop()

    def due(self, now: int) -> Iterator[tuple[str, str]]:
        """Take out what is to be looked at by now, those included that are set meanwhile."""
        while self._heap and self._heap[0][0] <= now:
            _, kind, name = heapq.heappop(self._heap)
            yield kind, name

    def _drop(self) -> None:
        """Keep the first alarm of each job and device that is there, and all of the fleet's."""
        first: dict[tuple[str, str], int] = {}
        for when, kind, name in sorted(self._heap, reverse=True):
            if kind != "job" or self._lives(name):
                first[kind, name] = when
        fleet = {when for when, kind, _ in self._heap if kind == "fleet"}
        kept = [(when, kind, name) for (kind, name), when in first.items() if kind != "fleet"]
        self._heap = [*kept, *((when, "fleet", "") for when in fleet)]
        heapq.heapify(self._heap)
        self._kept = len(self._heap)
