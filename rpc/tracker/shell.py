"""Between the state machine and the world: one event loop that feeds events in, stores facts, lets messages out.

Effects leave through the outbox (outbox.py). Nothing here polls: one timer is armed for the state's next alarm.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from kedge.rpc.errors import NoDeviceError
from kedge.rpc.messages import AgentBody, AssignJob, Hello, TrackerBody
from kedge.rpc.status import UnknownJobError
from kedge.rpc.tracker.brief import brief_job
from kedge.rpc.tracker.ended import Ended
from kedge.rpc.tracker.facts import CloseAgent, DevicesChanged, Effects, JobChanged, JobWithdrawn, Needs, ToAgent
from kedge.rpc.tracker.jobs import task_kind
from kedge.rpc.tracker.observer import SILENT, Observer
from kedge.rpc.tracker.outbox import Outbox, Parcel
from kedge.rpc.tracker.scheduler import Want
from kedge.rpc.tracker.schema import StoreAwayError, StoreError
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.tracker.state import TrackerState
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import DeviceStatus, Job, JobFilter, JobResult, JobSpec, JobState, Reservation

log = logging.getLogger("kedge.tracker")

#: A client is not kept waiting for a disk that does not take its job.
_STORE_PATIENCE_S = 5.0
#: What many devices do within so long is told at once to those who watch waiting jobs.
_RETELL_S = 0.1
#: Of that, so much may be spent on telling them.
_RETELL_AT_ONCE_S = 0.01


class Clock:
    """Unix milliseconds that never go back: the wall clock of the start, advanced by the steady one.

    A wall clock that is set, or a machine that was suspended, must end no lease; `kedge doctor` tells the difference.
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> int:
        """Now."""
        return int((time.monotonic() + self._offset) * 1000)


class Changes:
    """What became of a job since somebody last looked: the newest only, however long they take."""

    def __init__(self) -> None:
        self._newest: Job | None = None
        self._changed = asyncio.Event()

    def put(self, job: Job | None) -> None:
        """The job is like this now."""
        self._newest = job
        self._changed.set()

    async def get(self) -> Job | None:
        """The job as it is after the next change, or is since the last one that nobody has read."""
        await self._changed.wait()
        self._changed.clear()
        return self._newest


#: Of a list of jobs so many are read, and told, at once: 10,000 would take the store 0.35 s and the loop 0.3 s.
_PAGE = 200

#: Takes a message for one agent; None ends its connection.
ToOneAgent = Callable[[TrackerBody | None], None]


class Shell:
    """The running mind of a tracker. All methods belong to the event loop's thread."""

    def __init__(
        self,
        store: Store,
        settings: Settings | None = None,
        clock: Callable[[], int] | None = None,
        observer: Observer = SILENT,
    ) -> None:
        self.tracker_id = store.found.tracker_id
        self.state = TrackerState(self.tracker_id, settings)
        self._store = store
        self._observer = observer
        self._now = clock or Clock()
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        #: What is durable, and whether the loop knows that there is something: it is woken once for a whole commit.
        self._durable_now: deque[Parcel] = deque()
        self._woken = False
        self._agents: dict[int, ToOneAgent] = {}
        self._next_connection = 0
        self._watchers: dict[str, list[Changes]] = defaultdict(list)
        self._waiters: dict[str, list[asyncio.Future[JobResult | None]]] = defaultdict(list)
        self._ended = Ended()
        self._listing = asyncio.Lock()
        self._device_waiters: set[asyncio.Future[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        #: When it wakes, in the clock's milliseconds.
        self._wakes_ms = 0
        self._retelling: asyncio.TimerHandle | None = None
        #: Something has changed since they were last begun to be told.
        self._untold = False
        self._closing = False
        self.state.restore(store.found, self._now())
        store.when_forgotten(self._tell_forgotten)
        observer.found(store.found)
        self._arm()

    @property
    def store_problem(self) -> str | None:
        """Why nothing can be stored at the moment."""
        return self._store.problem

    @property
    def now_ms(self) -> int:
        """The tracker's clock, in Unix milliseconds."""
        return self._now()

    def close(self) -> None:
        """Stop the timer, and end what every agent and every watcher waits on."""
        self._closing = True
        for timer in (self._timer, self._retelling):
            if timer is not None:
                timer.cancel()
        for queues in self._watchers.values():
            for changes in queues:
                changes.put(None)
        for job_id in self._waiters:
            self._tell_waiters(job_id, None)
        self._wake_device_waiters()
        for send in self._agents.values():
            send(None)

    # ---- Agents ----

    def agent_connected(self, hello: Hello, send: ToOneAgent) -> int:
        """A new agent; returns the number of its connection."""
        self._next_connection += 1
        number = self._next_connection
        self._agents[number] = send
        self._apply(self.state.connect(number, hello, self._now()))
        return number

    def agent_said(self, connection: int, body: AgentBody) -> None:
        """A message of a connected agent."""
        self._apply(self.state.receive(connection, body, self._now()))

    def agent_left(self, connection: int) -> None:
        """An agent's connection ended."""
        self._agents.pop(connection, None)
        self._apply(self.state.disconnect(connection, self._now()))

    # ---- Clients ----

    async def submit(
        self,
        spec: JobSpec,
        needs: Needs,
        key: str,
        user: str = "",
        *,
        when_stored: Callable[[str], None] = lambda job_id: None,
    ) -> tuple[str, bool]:
        """Accept a job of a user, durably; returns its id and whether the idempotency key was known already.

        `when_stored` hears of a new job once it is durable, also where nobody waits for that any more: a commit cannot
        be called off, and one that never comes, as another tracker leads by now, is told to nobody.

        Raises:
            StoreError: jobs cannot be stored at the moment; with the same key it may be tried again.
            QueueFullError: as many of the user's jobs wait as may.
        """
        while (known := await self._job_of_key(key)) is not None:
            await self._durable(self._barrier())
            if await self._job_of_key(key) == known:  # and has not been withdrawn
                return known, True
        self._check_store()
        self.state.check_room(spec, needs, user)
        job_id = secrets.token_hex(6)

        def withdraw() -> Effects:
            return self.state.withdraw(job_id, key, self._now())

        def tell(done: asyncio.Future[None]) -> None:
            if not done.cancelled() and done.exception() is None:
                when_stored(job_id)

        stored = self._apply(self.state.submit(job_id, spec, needs, key, self._now(), user), withdraw)
        stored.add_done_callback(tell)
        try:
            await self._durable(stored)
        except StoreError:
            stored.remove_done_callback(tell)
            # What is refused must not go on.
            if not stored.done():
                self._apply(withdraw())
            raise
        return job_id, False

    async def _job_of_key(self, key: str) -> str | None:
        known = self.state.job_of_key(key) if key else None
        if known is None and key and not self.state.knows_all_keys:
            stored = await asyncio.wrap_future(self._store.job_of_key(key))
            # Somebody else may have used the key meanwhile.
            known = self.state.job_of_key(key) or stored
        return known

    async def _durable(self, stored: asyncio.Future[None]) -> None:
        """Wait until effects are out; raises StoreError when the database does not take them."""
        while not stored.done():
            await asyncio.wait([stored], timeout=_STORE_PATIENCE_S)
            if not stored.done():
                self._check_store()
        stored.result()

    def _check_store(self) -> None:
        if self._store.problem is not None:
            if self._store.passes:
                raise StoreAwayError(f"the tracker cannot store jobs now: {self._store.problem}")
            raise StoreError(
                f"the tracker cannot store jobs now: {self._store.problem}", hint="free space on the tracker's disk"
            )

    async def cancel(self, job_id: str, reason: str) -> tuple[Job, bool]:
        """Stop a job; returns it as it is then, and whether this made the difference.

        Raises UnknownJobError, and StoreError as `submit`.
        """
        effects = self.state.cancel(job_id, reason, self._now())
        await self._durable(self._apply(effects))
        return await self.job(job_id), bool(effects.facts)

    async def set_maintenance(self, name: str, enabled: bool, reason: str, user: str) -> DeviceStatus:
        """Take a device out of service, or put it back; raises NoDeviceError, StoreError."""
        if not self.state.device_named(name):
            raise _unknown_device(name)
        if enabled:
            effects = self.state.start_maintenance(name, reason, user, self._now())
        else:
            effects = self.state.end_maintenance(name, self._now())
        await self._durable(self._apply(effects, lambda: self.state.end_maintenance(name, self._now())))
        return self.state.device(name)

    def forget_device(self, name: str) -> None:
        """A device was revoked: once it is off, nothing is left of it."""
        self._apply(self.state.forget_device(name, self._now()))

    async def keep_noise(
        self, number: str, name: str, user: str, relative: float, num_threads: int, on: str
    ) -> DeviceStatus:
        """Remember how noisy a device is; raises NoDeviceError, StoreError."""
        if not self.state.device_known(name):
            raise _unknown_device(name)
        effects = self.state.keep_noise(number, name, user, relative, num_threads, on, self._now())
        await self._durable(self._apply(effects, Effects))
        return self.state.device(name)

    async def reserve(
        self, selector: str, user: str, begin: int, duration_ms: int, reason: str, *, shares: bool = True
    ) -> Reservation:
        """Keep a device for a user; raises as `TrackerState.reserve`, and StoreError."""
        self._check_store()
        number = secrets.token_hex(6)
        wanted = (number, selector, user, begin, duration_ms, reason)
        reservation, effects = self.state.reserve(*wanted, self._now(), shares=shares)
        await self._durable(self._apply(effects, lambda: self.state.end_reservation(number, self._now())))
        return reservation

    async def end_reservation(self, reservation_id: str) -> None:
        """Everybody may have the device again; raises StoreError."""
        await self._durable(self._apply(self.state.end_reservation(reservation_id, self._now())))

    def session_heard(self, job_id: str) -> None:
        """A session's client said something."""
        self.state.session_heard(job_id, self._now())

    def session_begins(self, job_id: str, epoch: int) -> None:
        """A session's device is there for its client."""
        self._apply(self.state.session_begins(job_id, epoch, self._now()))

    def session_broke(self, job_id: str, epoch: int, why: str) -> None:
        """A session's device left without a word."""
        if not self._closing:
            self._apply(self.state.session_broke(job_id, epoch, why, self._now()))

    def session_left(self, job_id: str, why: str) -> None:
        """A session's client left without a word."""
        if not self._closing:
            self._apply(self.state.cancel(job_id, why, self._now()))

    async def job(self, job_id: str) -> Job:
        """A job as it is now; raises UnknownJobError."""
        job = self.state.job(job_id) or self._ended.get(job_id)
        if job is None:
            job = await asyncio.wrap_future(self._store.job(job_id))
        if job is None:
            raise unknown_job(job_id)
        return job

    async def jobs(
        self,
        limit: int,
        states: tuple[JobState, ...],
        user: str | None = None,
        *,
        oldest_first: bool = False,
        wanted: JobFilter = JobFilter(),  # noqa: B008 - frozen
    ) -> AsyncIterator[list[Job]]:
        """The newest jobs in brief, newest first, or the oldest; those of one user, unless that is None.

        They come in pages. Between two of them all else goes on, and of all who list at once one reads.
        """
        beyond: int | None = None
        earliest: int | None = None
        reasons: dict[Want, str] = {}
        while limit > 0:
            async with self._listing:
                size = min(limit, _PAGE)
                order: dict[str, Any] = {"oldest_first": oldest_first, "beyond": beyond, "earliest": earliest}
                page = await asyncio.wrap_future(self._store.jobs(size, states, user, **order, wanted=wanted))
            now = (self.state.job(job.id, reasons) or job for job in page.jobs)
            found = [brief_job(job) for job in now if not states or job.state in states][:limit]
            yield found
            if page.last is None:
                return
            limit, beyond, earliest = limit - len(found), page.last, page.earliest

    def watch(self, job_id: str) -> Changes:
        """The job's changes from now on, None when the tracker stops; give it back with `unwatch`."""
        changes = Changes()
        self._watchers[job_id].append(changes)
        return changes

    def unwatch(self, job_id: str, changes: Changes) -> None:
        """Nobody reads them any more."""
        self._watchers[job_id].remove(changes)
        if not self._watchers[job_id]:
            del self._watchers[job_id]

    async def result(self, job_id: str) -> JobResult | None:
        """What came of a job, once it is done; None when the tracker stops before. Raises UnknownJobError."""
        if not self.state.lives(job_id):
            return (await self.job(job_id)).result
        told: asyncio.Future[JobResult | None] = self._loop.create_future()
        self._waiters[job_id].append(told)
        try:
            return await told
        finally:
            self._waiters[job_id].remove(told)
            if not self._waiters[job_id]:
                del self._waiters[job_id]

    def _tell_waiters(self, job_id: str, result: JobResult | None) -> None:
        for told in self._waiters.get(job_id, ()):
            if not told.done():
                told.set_result(result)

    async def devices(self, selector: str, include_gone: bool, wait_s: float) -> list[DeviceStatus]:
        """Devices that match; waits up to `wait_s` for the first. Raises SelectorError."""
        deadline = self._loop.time() + wait_s
        while True:
            found = self.state.devices(selector, include_gone=include_gone)
            left = deadline - self._loop.time()
            if found or left <= 0 or self._closing:
                return found
            changed: asyncio.Future[None] = self._loop.create_future()
            self._device_waiters.add(changed)
            try:
                await asyncio.wait([changed], timeout=left)
            finally:
                self._device_waiters.discard(changed)

    # ---- Effects ----

    def _apply(self, effects: Effects, undo: Callable[[], Effects] | None = None) -> asyncio.Future[None]:
        """Store facts, then send; the future is done when both are.

        Where they can never be stored, `undo` takes the decision back, and the future raises StoreError. Nobody waits
        for what has none: then the store has failed, as what was decided cannot be kept.
        """
        released: asyncio.Future[None] = self._loop.create_future()
        parcel = Parcel(effects.facts, list(effects.sends), not effects.facts, released)
        early = self._outbox.put(parcel, hasten=self._store.problem is None)
        if effects.facts:
            refused = None if undo is None else functools.partial(self._tell_refused, parcel, undo)
            self._store.append(effects.facts, functools.partial(self._tell_stored, parcel), refused)
        if effects.notes:
            self._store.append(effects.notes, lambda: None, lambda problem: log.error("%s", problem))
        for send in early:
            self._tell(send.connection, send.body)
        self._release()
        self._arm()
        return released

    def _barrier(self) -> asyncio.Future[None]:
        """Done when everything decided so far is durable."""
        return self._apply(Effects())

    def _tell_stored(self, parcel: Parcel) -> None:
        """From the store's thread."""
        self._durable_now.append(parcel)
        if not self._woken:
            self._woken = True
            self._loop.call_soon_threadsafe(self._take_stored)

    def _tell_refused(self, parcel: Parcel, undo: Callable[[], Effects], problem: StoreError) -> None:
        """From the store's thread."""
        self._loop.call_soon_threadsafe(self._refused, parcel, undo, problem)

    def _tell_forgotten(self, job_ids: Sequence[str], keys: Sequence[str]) -> None:
        """From the store's thread."""
        self._loop.call_soon_threadsafe(self._forget, job_ids, keys)

    def _forget(self, job_ids: Sequence[str], keys: Sequence[str]) -> None:
        self._ended.forget(job_ids)
        self.state.forget_keys(keys)

    def _take_stored(self) -> None:
        self._woken = False  # first: what comes from now on wakes the loop again
        while self._durable_now:
            self._durable_now.popleft().durable = True
        self._release()
        self._arm()

    def _refused(self, parcel: Parcel, undo: Callable[[], Effects], problem: StoreError) -> None:
        log.error("%s", problem)
        # Before what follows from it leaves: an assignment of what is no job any more does not.
        self._apply(undo())
        parcel.problem = problem
        self._durable_now.append(parcel)
        self._take_stored()

    def _release(self) -> None:
        for parcel in self._outbox.released():
            for fact in parcel.facts if parcel.problem is None else ():
                self._observer.stored(fact, self._now())
                if isinstance(fact, JobWithdrawn):  # it may have ended while the disk refused it
                    self._ended.forget([fact.job_id])
            for send in parcel.sends:
                if isinstance(send, ToAgent):
                    self._tell(send.connection, send.body)
                elif isinstance(send, CloseAgent):
                    self._tell(send.connection, None)
                elif isinstance(send, JobChanged):
                    self._publish(send.job)
                    self._loop.call_soon(_log_end, send.job)  # who waits for it goes first
            if any(isinstance(send, DevicesChanged) for send in parcel.sends):
                self._devices_changed()
            if parcel.released is not None and not parcel.released.done():
                if parcel.problem is None:
                    parcel.released.set_result(None)
                else:
                    parcel.released.set_exception(parcel.problem)

    def _tell(self, connection: int, body: TrackerBody | None) -> None:
        if isinstance(body, AssignJob) and not self.state.assignment_leaves(body.lease, self._now()):
            return
        send = self._agents.get(connection)
        if send is not None:
            send(body)

    def _publish(self, job: Job) -> None:
        for changes in self._watchers.get(job.id, ()):
            changes.put(job)
        if job.result is not None:
            self._ended.put(job)
            self._tell_waiters(job.id, job.result)

    def _devices_changed(self) -> None:
        """Why a job waits, and for how long, depends on the devices: those who watch it are told before long."""
        self._untold = True
        if self._retelling is None and not self._closing:
            self._retelling = self._loop.call_later(_RETELL_S, self._retell)
        self._wake_device_waiters()

    def _retell(self) -> None:
        self._untold = False
        self._tell_some(iter(tuple(self._watchers)), {})

    def _tell_some(self, job_ids: Iterator[str], reasons: dict[Want, str]) -> None:
        """Tell those who watch these jobs for a short time, and the others after a pause."""
        until = self._loop.time() + _RETELL_AT_ONCE_S
        for job_id in job_ids:
            job = self.state.still_waiting(job_id, reasons)
            if job is not None:
                self._publish(job)
            if self._loop.time() >= until:
                self._retelling = self._loop.call_later(_RETELL_S, self._tell_some, job_ids, reasons)
                return
        self._retelling = self._loop.call_later(_RETELL_S, self._retell) if self._untold else None

    def _wake_device_waiters(self) -> None:
        for waiter in self._device_waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _arm(self) -> None:
        """Wake up for the state's next alarm; before it does no harm, and most alarms are put off."""
        alarm = self.state.next_alarm()
        if alarm is None or self._closing or (self._timer is not None and self._wakes_ms <= alarm):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_ms = alarm
        self._timer = self._loop.call_later(max(0.0, (alarm - self._now()) / 1000), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._apply(self.state.tick(self._now()))


def _log_end(job: Job) -> None:
    if job.result is None:
        return
    outcome = job.result.outcome
    about = {"job": job.id, "user": job.user, "device": job.device, "kind": task_kind(job.spec.task)}
    about |= {"outcome": outcome.kind.value, "stage": outcome.stage.value if outcome.stage else ""}
    log.info("job %s of %s on %s: %s", job.id, job.user or "nobody", job.device or "no device", outcome, extra=about)


def _unknown_device(name: str) -> NoDeviceError:
    return NoDeviceError(f"no device {name!r} is known", hint="'kedge devices --gone' lists them all")


def unknown_job(job_id: str) -> UnknownJobError:
    """The error for a job that is not there, or not the caller's: nobody can tell which."""
    return UnknownJobError(f"the tracker knows no job {job_id!r}", hint="kedge jobs lists them")
