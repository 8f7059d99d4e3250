"""Effects on their way out: in the order in which they were decided, each only when its facts are durable.

One message does not wait for the disk: an assignment. A tracker that dies before it is stored has promised nobody
anything by it: the device then holds a lease that no tracker knows and whose result counts for nothing, and a job that
was accepted before is assigned anew. So the disk's time and the job's first steps on its device overlap.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from kedge.rpc.messages import AssignJob, ResultAccepted
from kedge.rpc.tracker.facts import CloseAgent, Fact, Send, ToAgent


@dataclass(slots=True, eq=False)
class Parcel:
    """What follows from one event, as far as it has not left; `released` is done when all has."""

    facts: Sequence[Fact]
    sends: list[Send] = field(default_factory=list)
    durable: bool = False
    released: asyncio.Future[None] | None = None

    def connections(self) -> Iterator[int]:
        """Those of agents that could notice if something overtook this."""
        return (send.connection for send in self.sends if _keeps_its_place(send))


def _keeps_its_place(send: Send) -> TypeGuard[ToAgent | CloseAgent]:
    """Whether an agent could notice if a job overtook this; a result's receipt may be overtaken."""
    return isinstance(send, CloseAgent) or (isinstance(send, ToAgent) and not isinstance(send.body, ResultAccepted))


class Outbox:
    """The parcels that wait for the disk."""

    def __init__(self) -> None:
        self._parcels: deque[Parcel] = deque()
        self._waited_for: Counter[int] = Counter()

    def put(self, parcel: Parcel, *, hasten: bool = True) -> list[ToAgent]:
        """Take a parcel; returns the assignments that leave it at once, none unless `hasten`."""
        early: list[ToAgent] = []
        if hasten and not parcel.durable:
            later: list[Send] = []
            behind = set(self._waited_for)
            for send in parcel.sends:
                if isinstance(send, ToAgent) and isinstance(send.body, AssignJob) and send.connection not in behind:
                    early.append(send)
                    continue
                later.append(send)
                if _keeps_its_place(send):
                    behind.add(send.connection)
            parcel.sends = later
        self._parcels.append(parcel)
        self._waited_for.update(parcel.connections())
        return early

    def released(self) -> Iterator[Parcel]:
        """The parcels that may leave now, in order."""
        while self._parcels and self._parcels[0].durable:
            parcel = self._parcels.popleft()
            self._waited_for -= Counter(parcel.connections())
            yield parcel
