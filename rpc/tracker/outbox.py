"""Effects on their way out: in the order in which they were decided, each only when its facts are durable.

Assignments do not wait for the disk, but for those of jobs that come while others wait for it. A tracker that dies
before one is stored has promised nobody anything by it: the device then holds a lease that no tracker knows and whose
result counts for nothing, and the job is assigned anew, or sent anew by its client, who was not told yet that it is
accepted. So the disk's time and the job's first steps on its device overlap. Where the disk then refuses the job, it
is called off at once. Neither overtakes what its agent could notice: its greeting, the receipt of an older result of
the same job, or an earlier word to call something off.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from kedge.rpc.messages import AbortJob, AssignJob, ResultAccepted
from kedge.rpc.tracker.facts import CloseAgent, Fact, JobAccepted, JobWithdrawn, Send, ToAgent


@dataclass(slots=True, eq=False)
class Parcel:
    """What follows from one event, as far as it has not left; `released` is done when all has."""

    facts: Sequence[Fact]
    sends: list[Send] = field(default_factory=list)
    durable: bool = False
    released: asyncio.Future[None] | None = None
    #: Why its facts can never be.
    problem: Exception | None = None

    def places(self) -> Iterator[_Place]:
        """What no assignment may overtake."""
        for fact in self.facts:
            if isinstance(fact, JobAccepted):
                yield fact.job_id
        for send in self.sends:
            yield from _place(send)


#: A connection whose agent would notice, a job whose assignment would come before the receipt of its last result there,
#: or a new job that came while others waited for the disk.
_Place: TypeAlias = int | tuple[int, str] | str


def _place(send: Send) -> Iterator[_Place]:
    if isinstance(send, CloseAgent):
        yield send.connection
    elif isinstance(send, ToAgent):
        yield (send.connection, send.body.job_id) if isinstance(send.body, ResultAccepted) else send.connection


class Outbox:
    """The parcels that wait for the disk."""

    def __init__(self) -> None:
        self._parcels: deque[Parcel] = deque()
        self._taken: Counter[_Place] = Counter()

    def put(self, parcel: Parcel, *, hasten: bool = True) -> list[ToAgent]:
        """Take a parcel; returns what leaves at once: assignments if `hasten`, and the end of jobs that never were."""
        early: list[ToAgent] = []
        withdrawn = {fact.job_id for fact in parcel.facts if isinstance(fact, JobWithdrawn)}
        if (hasten or withdrawn) and not parcel.durable:
            later: list[Send] = []
            # A job that comes alone is begun at once. Of many the tracker serves more where commits gather them.
            new = (fact.job_id for fact in parcel.facts if isinstance(fact, JobAccepted))
            own: set[_Place] = set(new) if self._parcels else set()
            for send in parcel.sends:
                if isinstance(send, ToAgent) and (
                    (hasten and isinstance(send.body, AssignJob))
                    or (isinstance(send.body, AbortJob) and send.body.lease.job_id in withdrawn)
                ):
                    job_id = send.body.lease.job_id
                    places: list[_Place] = [send.connection, (send.connection, job_id)]
                    places += [job_id] if isinstance(send.body, AssignJob) else []
                    if not any(place in own or place in self._taken for place in places):
                        early.append(send)
                        continue
                later.append(send)
                own.update(_place(send))
            parcel.sends = later
        self._parcels.append(parcel)
        for place in parcel.places():
            self._taken[place] += 1
        return early

    def released(self) -> Iterator[Parcel]:
        """The parcels that may leave now, in order."""
        while self._parcels and self._parcels[0].durable:
            parcel = self._parcels.popleft()
            for place in parcel.places():
                self._taken[place] -= 1
                if not self._taken[place]:
                    del self._taken[place]
            yield parcel
