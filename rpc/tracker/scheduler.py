"""Which waiting job gets which idle device: priority first, then whoever has had the least, then first come. Pure.

Jobs that want the same thing (selector, what their artifact runs on, whose they are) stand in one line, so that a plan
looks at the heads of the lines and not at every job. Between lines of one priority the user goes first who holds the
fewest devices, and of those the one who has had the least device time of late: fair share with a memory that fades, as
in Kay and Lauder, "A Fair Share Scheduler" (CACM 31.1, 1988).
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kedge.rpc.tracker.facts import Needs


@dataclass(frozen=True, slots=True)
class Want:
    """What a job asks of a device, and for whom; `avoid` names devices that failed while they had it."""

    selector: str
    needs: Needs
    user: str = ""
    avoid: frozenset[str] = frozenset()


#: Those of idle devices that may have a job with a want, in the same order.
Takers = Callable[[Want, Sequence[str]], list[str]]
#: Within a line smaller goes first: (-priority, sequence number, job id).
Place = tuple[int, int, str]
#: Of jobs that have left, so many places are no reason to make a line anew.
_SPARE_PLACES = 16


class Shares:
    """What each user has of the fleet: devices held now, and device time of late, half of it after `half_life_ms`."""

    def __init__(self, half_life_ms: int) -> None:
        self._half_life_ms = half_life_ms
        self._held: Counter[str] = Counter()
        #: User -> (device milliseconds, when they were worth that much).
        self._used: dict[str, tuple[float, int]] = {}

    def begin(self, user: str) -> None:
        """The user got a device."""
        self._held[user] += 1

    def end(self, user: str, held_ms: int, now: int) -> None:
        """The user gave a device back, after so long."""
        self._held[user] -= 1
        if not self._held[user]:
            del self._held[user]
        self._used[user] = self.used(user, now) + max(0, held_ms), now

    def held(self, user: str) -> int:
        """Devices that the user has now."""
        return self._held[user]

    def used(self, user: str, now: int) -> float:
        """Device milliseconds that the user had, those of long ago counting less."""
        amount, when = self._used.get(user, (0.0, now))
        return float(amount * 0.5 ** ((now - when) / self._half_life_ms))

    def forget(self, now: int) -> None:
        """Drop whoever has used next to nothing, so that the memory does not grow for ever."""
        self._used = {user: entry for user, entry in self._used.items() if self.used(user, now) >= 1}


class Queue:
    """The waiting jobs."""

    def __init__(self) -> None:
        self._lines: dict[Want, list[Place]] = {}
        self._waiting: dict[str, Want] = {}
        #: How many jobs wait: by want, by user; and how many wants each user has.
        self._of_want: Counter[Want] = Counter()
        self._of_user: Counter[str] = Counter()
        self._wants_of_user: Counter[str] = Counter()
        #: Grows with every change, so that whoever has derived something from the queue knows when it is outdated.
        self.version = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._waiting

    def wants(self) -> Iterable[Want]:
        """What is waited for, each once."""
        return self._lines.keys()

    @property
    def lines(self) -> int:
        """How many different things are waited for."""
        return len(self._lines)

    def count(self, user: str) -> int:
        """How many jobs of a user wait."""
        return self._of_user[user]

    def count_wants(self, user: str) -> int:
        """How many different things the jobs of a user wait for."""
        return self._wants_of_user[user]

    def users_with(self, user: str) -> int:
        """How many users wait, this one counted in any case."""
        return len(self._wants_of_user) + (user not in self._wants_of_user)

    def has(self, want: Want) -> bool:
        """Whether a job waits for just that."""
        return want in self._lines

    def push(self, job_id: str, want: Want, priority: int, seq: int) -> None:
        """Put a job in its line; a job that was there before keeps its place by its `seq`."""
        self._waiting[job_id] = want
        self._of_want[want] += 1
        self._of_user[want.user] += 1
        self._wants_of_user[want.user] += want not in self._lines
        self.version += 1
        heapq.heappush(self._lines.setdefault(want, []), (-priority, seq, job_id))

    def remove(self, job_id: str) -> None:
        """The job waits no longer."""
        want = self._waiting.pop(job_id)
        self._of_want[want] -= 1
        _take_one(self._of_user, want.user)
        self.version += 1
        line = self._lines[want]
        # A place further back is forgotten when its turn comes, or when most are of jobs that have left.
        while line and self._waiting.get(line[0][2]) != want:
            heapq.heappop(line)
        if len(line) > 2 * self._of_want[want] + _SPARE_PLACES:
            line[:] = {place for place in line if self._waiting.get(place[2]) == want}
            heapq.heapify(line)
        if not line:
            del self._lines[want], self._of_want[want]
            _take_one(self._wants_of_user, want.user)

    def assign(self, idle: Sequence[str], takers: Takers, shares: Shares, now: int) -> list[tuple[str, str]]:
        """Take out the jobs that can start now, each with its device.

        `idle` names devices, longest idle first. A job takes the device that the fewest lines could use, so that a
        job which asks for little does not occupy the one device that another has to have.
        """
        assigned: list[tuple[str, str]] = []
        usable = {want: names for want in self._lines if (names := takers(want, idle))}
        rivals = Counter(name for names in usable.values() for name in names)
        free = set(rivals)
        given: Counter[str] = Counter()
        # What ranks the lines of one user, the first on top; between users the rest of `rank` decides.
        lines: dict[str, list[tuple[int, int, Want]]] = defaultdict(list)
        for want in usable:
            lines[want.user].append((*self._lines[want][0][:2], want))
        for line in lines.values():
            heapq.heapify(line)
        used = {user: shares.used(user, now) for user in lines}

        def rank(user: str) -> tuple[int, int, float, int]:
            priority, seq, _ = lines[user][0]
            return priority, shares.held(user) + given[user], used[user], seq

        while free and lines:
            user = min(lines, key=rank)
            line = lines[user]
            want = line[0][2]
            names = [name for name in usable[want] if name in free]
            if names:
                job_id = self._lines[want][0][2]
                device = min(names, key=rivals.__getitem__)
                self.remove(job_id)
                assigned.append((job_id, device))
                free.remove(device)
                given[user] += 1
                if want in self._lines:
                    heapq.heapreplace(line, (*self._lines[want][0][:2], want))
                else:
                    heapq.heappop(line)
                    rivals.subtract(usable[want])
            # Who waits for nothing that is free is passed over at once: thousands of lines may want the one that went.
            while line and free.isdisjoint(usable[line[0][2]]):
                heapq.heappop(line)
            if not line:
                del lines[user]
        return assigned

    def order(self, shares: Shares, now: int) -> list[tuple[str, Want]]:
        """All waiting jobs with what they want, in the order in which they are likely to start.

        Each job counts as if those of its user and priority that come before it were running already.
        """
        places: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
        for want, line in self._lines.items():
            for priority, seq, job_id in line:
                # A place of a job that left and came back under another wish is not its own any more.
                if self._waiting.get(job_id) == want:
                    places[want.user, priority].append((seq, job_id))
        ranked = []
        for (user, priority), line_of_user in places.items():
            held, used = shares.held(user), shares.used(user, now)
            for before, (seq, job_id) in enumerate(sorted(set(line_of_user))):
                ranked.append(((priority, held + before, used, seq), job_id))
        return [(job_id, self._waiting[job_id]) for _, job_id in sorted(ranked)]


def _take_one(counts: Counter[str], user: str) -> None:
    counts[user] -= 1
    if not counts[user]:
        del counts[user]
