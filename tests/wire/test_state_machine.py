"""The tracker's state machine under every order of events that hypothesis finds, with agents that keep the rules."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from kedge.rpc import messages as m
from kedge.rpc.artifact import Need
from kedge.rpc.errors import NoDeviceError, UsageError
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import local_protocol
from kedge.rpc.selector import labels_of, parse
from kedge.rpc.tracker.devices import can_run
from kedge.rpc.tracker.facts import (
    ANYWHERE,
    CloseAgent,
    Effects,
    Fact,
    JobAccepted,
    JobAssigned,
    JobCancelling,
    JobChanged,
    JobDone,
    JobRecord,
    JobRequeued,
    JobWithdrawn,
    NoiseKept,
    ReservationEnded,
    Reserved,
    Serviced,
    ServiceEnded,
    Stored,
    ToAgent,
)
from kedge.rpc.tracker.outbox import Outbox, Parcel
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.tracker.state import TrackerState
from kedge.rpc.types import (
    NO_BLOB,
    Blob,
    Deadlines,
    DeviceState,
    Health,
    JobResult,
    JobSpec,
    JobState,
    Lease,
    NoiseSample,
    Reservation,
    RunTask,
    SessionTask,
)
from support.toys import device_info

SETTINGS = Settings(
    heartbeat_interval_ms=1_000,
    silence_ms=3_000,
    lease_ms=5_000,
    cancel_grace_ms=2_000,
    deadline_slack_ms=500,
    deadlines=Deadlines(queue_ms=60_000, transfer_ms=8_000, load_ms=8_000, run_ms=8_000),
    max_requeues=2,
    max_device_faults=2,
    quarantine_after=2,
    quarantine_ms=4_000,
    longest_quarantine_ms=16_000,
    session_lease_ms=5_000,
    longest_session_ms=5_000,
    max_reservation_ms=100_000,
    max_reservations_per_user=2,
)
USERS = ["ann", "bob"]
DEVICES = {
    "a": device_info("a", "x86_64", soc="one"),
    "b": device_info("b", "x86_64", soc="two"),
    "c": device_info("c", "aarch64", soc="one"),
}
NEEDS = {
    "x86": (Need("x86_64", frozenset({"avx2"})),),
    "arm": (Need("aarch64"),),
    "any": (Need("x86_64"), Need("aarch64")),
    "session": ANYWHERE,
}
ARTIFACTS = sorted(set(NEEDS) - {"session"})
OK = JobResult(Outcome(OutcomeKind.OK))
FAULT = JobResult(Outcome(OutcomeKind.DEVICE_FAULT, Stage.RUN, message="the disk is full"))
ENDS = {
    "ok": OK,
    "crash": JobResult(Outcome(OutcomeKind.CRASH, Stage.RUN, 11)),
    "fault": FAULT,
    "late": JobResult(Outcome(OutcomeKind.TIMEOUT, Stage.TRANSFER)),
}


@dataclass
class Agent:
    """What an agent keeps: a connection, and the leases it holds with what it did about them."""

    name: str
    instance: int = 0
    connection: int | None = None
    held: dict[tuple[str, int], str] = field(default_factory=dict)
    aborted: set[tuple[str, int]] = field(default_factory=set)


class Store:
    """The facts as a database would keep them."""

    def __init__(self) -> None:
        self.records: dict[str, JobRecord] = {}
        self.done: dict[str, tuple[JobDone, int]] = {}
        self.keys: dict[str, str] = {}
        self.last_seq = 0
        self.serviced: dict[str, Serviced] = {}
        self.reservations: dict[str, Reservation] = {}
        self.noise: dict[str, NoiseSample] = {}

    def apply(self, facts: Sequence[Fact]) -> None:
        for fact in facts:
            if isinstance(fact, JobAccepted):
                assert fact.job_id not in self.records and fact.job_id not in self.done
                assert fact.key not in self.keys
                assert fact.seq > self.last_seq, "every job comes after all that were ever accepted"
                self.last_seq = fact.seq
                self.keys[fact.key] = fact.job_id
                self.records[fact.job_id] = JobRecord(fact)
                continue
            if isinstance(fact, JobWithdrawn):
                self.records.pop(fact.job_id, None)
                self.done.pop(fact.job_id, None)
                self.keys = {key: job_id for key, job_id in self.keys.items() if job_id != fact.job_id}
                continue
            if isinstance(fact, Serviced):
                self.serviced[fact.device] = fact
                continue
            if isinstance(fact, ServiceEnded):
                del self.serviced[fact.device]
                continue
            if isinstance(fact, Reserved):
                assert fact.reservation.id not in self.reservations
                self.reservations[fact.reservation.id] = fact.reservation
                continue
            if isinstance(fact, ReservationEnded):
                del self.reservations[fact.reservation_id]
                continue
            if isinstance(fact, NoiseKept):
                assert fact.sample.id not in self.noise
                for number in fact.forgotten:
                    del self.noise[number]
                self.noise[fact.sample.id] = fact.sample
                continue
            assert fact.job_id in self.records, f"{fact} about a job that is not alive"
            record = self.records[fact.job_id]
            if isinstance(fact, JobAssigned):
                assert record.assigned is None, "assigned twice"
                assert fact.epoch == record.epoch + 1, "epochs grow by one"
                self.records[fact.job_id] = replace(record, assigned=fact, epoch=fact.epoch)
            elif isinstance(fact, JobRequeued):
                assert record.assigned is not None
                assert len(fact.faults) < SETTINGS.max_device_faults
                self.records[fact.job_id] = replace(record, assigned=None, requeued=fact)
            elif isinstance(fact, JobCancelling):
                self.records[fact.job_id] = replace(record, cancelling=fact.reason)
            else:
                del self.records[fact.job_id]
                self.done[fact.job_id] = (fact, record.epoch)

    def found(self) -> Stored:
        """What a tracker reads when it starts."""
        ended = tuple((job_id, epoch) for job_id, (_, epoch) in self.done.items())
        return Stored(
            tracker_id="t",
            records=tuple(self.records.values()),
            ended=ended,
            keys=tuple(self.keys.items()),
            last_seq=self.last_seq,
            serviced=tuple(self.serviced.values()),
            reservations=tuple(self.reservations.values()),
            noise=tuple(self.noise.values()),
        )


class TrackerMachine(RuleBasedStateMachine):
    jobs = Bundle("jobs")
    sessions = Bundle("sessions")

    @initialize()
    def begin(self) -> None:
        self.now = 1_000_000
        self.store = Store()
        self.numbers = itertools.count(1)
        self.agents = {name: Agent(name) for name in DEVICES}
        self.accepted: dict[str, JobSpec] = {}
        self.users: dict[str, str] = {}
        self.problems: dict[str, tuple[str, ...]] = dict.fromkeys(DEVICES, ())
        self.needs_of: dict[str, str] = {}
        self.finished_at_agent: dict[str, int] = {}
        #: When each session's client was last heard of, and what devices served under which epoch.
        self.heard: dict[str, int] = {}
        self.served: set[tuple[str, int]] = set()
        self.older: set[str] = set()
        self.state = TrackerState("t", SETTINGS)
        #: What waits for a disk that is full or slow; None while facts are stored at once.
        self.waiting: list[Parcel] | None = None
        self.outbox = Outbox()
        self.hasten = False

    # ---- What happens ----

    @rule(slow=st.booleans())
    def the_disk_keeps_waiting(self, slow: bool) -> None:
        """It is full, or just slow: then assignments leave meanwhile."""
        self.waiting, self.hasten = self.waiting or [], slow

    @rule()
    def the_disk_has_it_all(self) -> None:
        waiting, self.waiting = self.waiting or [], None
        for parcel in waiting:
            parcel.durable = True
        for parcel in self.outbox.released():
            self.carry_out(parcel)

    @precondition(lambda self: self.waiting)
    @rule(which=st.integers(0, 9))
    def the_client_of_an_unstored_job_is_refused(self, which: int) -> None:
        assert self.waiting is not None
        unstored = [f for parcel in self.waiting for f in parcel.facts if isinstance(f, JobAccepted)]
        unstored = [fact for fact in unstored if fact.job_id in self.accepted]
        if unstored:
            fact = unstored[which % len(unstored)]
            del self.accepted[fact.job_id]
            self.perform(self.state.withdraw(fact.job_id, fact.key, self.now))
            assert self.state.job(fact.job_id) is None and self.state.job_of_key(fact.key) is None

    @rule(
        target=jobs,
        selector=st.sampled_from(["", "a", "soc=one", "arch=x86_64,soc!=two", "arch=riscv64"]),
        needs=st.sampled_from(ARTIFACTS),
        priority=st.integers(0, 2),
        repeat=st.booleans(),
        user=st.sampled_from(USERS),
    )
    def submit(self, selector: str, needs: str, priority: int, repeat: bool, user: str) -> str:
        job_id = f"j{next(self.numbers)}"
        spec = JobSpec(Blob("0" * 64, 1), "main", RunTask(), selector, Deadlines(run_ms=4_000), priority)
        assert self.state.job_of_key(f"key-{job_id}") is None
        self.accepted[job_id], self.needs_of[job_id], self.users[job_id] = spec, needs, user
        self.perform(self.state.submit(job_id, spec, NEEDS[needs], f"key-{job_id}", self.now, user))
        if repeat:
            assert self.state.job_of_key(f"key-{job_id}") == job_id
        return job_id

    @rule(
        target=sessions,
        selector=st.sampled_from(["", "a", "soc=one"]),
        lease_ms=st.sampled_from([0, 1_500, 100_000]),
        user=st.sampled_from(USERS),
    )
    def open_session(self, selector: str, lease_ms: int, user: str) -> str:
        job_id = f"s{next(self.numbers)}"
        spec = JobSpec(NO_BLOB, "", SessionTask(lease_ms), selector)
        self.accepted[job_id], self.needs_of[job_id], self.users[job_id] = spec, "session", user
        self.heard[job_id] = self.now
        self.perform(self.state.submit(job_id, spec, ANYWHERE, f"key-{job_id}", self.now, user))
        return job_id

    @rule(session=sessions)
    def the_client_is_heard(self, session: str) -> None:
        self.state.session_heard(session, self.now)
        self.heard[session] = self.now

    @rule(session=sessions, back=st.integers(0, 1))
    def the_device_serves(self, session: str, back: int) -> None:
        """The agent's stream is there: under the epoch that it was given, or under an old one."""
        epoch = self.epoch_of(session) - back
        before = self.state.job(session)
        held = self.state.session_of(session, epoch)
        assert held is None or held[1].user == self.users[session]
        assert held is None or before is not None
        self.perform(self.state.session_begins(session, epoch, self.now))
        after = self.state.job(session)
        assert after == before or (held is not None and after is not None and after.stage is Stage.RUN)
        if held is not None:
            self.served.add((session, epoch))

    @rule(session=sessions, back=st.integers(0, 1))
    def the_devices_stream_breaks(self, session: str, back: int) -> None:
        epoch = self.epoch_of(session) - back
        self.perform(self.state.session_broke(session, epoch, "its stream broke", self.now))
        record = self.store.records.get(session)
        if (session, epoch) in self.served and self.waiting is None:
            self.served.discard((session, epoch))
            assert record is None or record.epoch != epoch or record.cancelling is not None or self.is_reborn(session)

    def epoch_of(self, session: str) -> int:
        record = self.store.records.get(session)
        return record.epoch if record is not None else 1

    def is_reborn(self, session: str) -> bool:
        """A session of an earlier tracker is being called off, which every later one does anew."""
        return session in self.older

    @rule(name=st.sampled_from(sorted(DEVICES)), restarted=st.booleans(), older=st.booleans())
    def connect(self, name: str, restarted: bool, older: bool) -> None:
        """An older agent does not say how it is before its first heartbeat."""
        agent = self.agents[name]
        if restarted and agent.connection is None:
            agent.instance += 1
            agent.held.clear()
            agent.aborted.clear()
        connection = next(self.numbers)
        self.pending_connection = connection
        agent.connection = connection
        leases = tuple(Lease(job_id, epoch) for job_id, epoch in agent.held)
        hello = m.Hello(local_protocol(), DEVICES[name], f"{name}{agent.instance}", leases)
        if not older:
            hello = replace(hello, health=Health(problems=self.problems[name]))
        self.perform(self.state.connect(connection, hello, self.now))
        if agent.connection == connection:
            for key, what in list(agent.held.items()):
                if what in ENDS:
                    self.say(agent, m.JobFinished(Lease(*key), ENDS[what]))
                elif what != "assigned":
                    self.say(agent, m.JobStarted(Lease(*key)))

    @precondition(lambda self: self.waiting is None)
    @rule(name=st.sampled_from(sorted(DEVICES)))
    def impostor(self, name: str) -> None:
        """Another process under the name of a connected device."""
        agent = self.agents[name]
        if agent.connection is None:
            return
        hello = m.Hello(local_protocol(), DEVICES[name], "impostor")
        effects = self.state.connect(next(self.numbers), hello, self.now)
        assert [type(getattr(send, "body", send)) for send in effects.sends] == [m.Refused, CloseAgent]
        assert not effects.facts

    @rule(name=st.sampled_from(sorted(DEVICES)), noticed=st.booleans())
    def lose_connection(self, name: str, noticed: bool) -> None:
        agent = self.agents[name]
        if agent.connection is not None:
            connection, agent.connection = agent.connection, None
            if noticed:
                self.perform(self.state.disconnect(connection, self.now))

    @rule(name=st.sampled_from(sorted(DEVICES)))
    def goodbye(self, name: str) -> None:
        agent = self.agents[name]
        if agent.connection is not None:
            connection = agent.connection
            self.say(agent, m.Goodbye("test"))
            agent.connection = None
            agent.held.clear()
            agent.instance += 1
            self.perform(self.state.disconnect(connection, self.now))

    @rule(name=st.sampled_from(sorted(DEVICES)))
    def heartbeat(self, name: str) -> None:
        agent = self.agents[name]
        if agent.connection is not None:
            health = Health(problems=self.problems[name])
            self.say(agent, m.Heartbeat(health, tuple(Lease(*key) for key in agent.held)))

    @rule(name=st.sampled_from(sorted(DEVICES)), ill=st.booleans())
    def health_changes(self, name: str, ill: bool) -> None:
        self.problems[name] = ("it is too hot",) if ill else ()
        self.heartbeat(name)

    @rule(name=st.sampled_from(sorted(DEVICES)), enabled=st.booleans())
    def maintenance(self, name: str, enabled: bool) -> None:
        if enabled:
            self.perform(self.state.start_maintenance(name, "new disk", "root", self.now))
        else:
            self.perform(self.state.end_maintenance(name, self.now))

    @rule(
        name=st.sampled_from(sorted(DEVICES)),
        user=st.sampled_from(USERS),
        relative=st.sampled_from([0.0, 0.02, 3.0]),
        threads=st.integers(1, 2),
        again=st.booleans(),
    )
    def noise(self, name: str, user: str, relative: float, threads: int, again: bool) -> None:
        """A comparison ends, and its client tells the tracker: twice where the first answer is lost."""
        if not self.state.device_known(name):
            return
        number = f"n{next(self.numbers)}"
        for _ in range(1 + again):
            self.perform(self.state.keep_noise(number, name, user, relative, threads, "cpu", self.now))

    @rule(
        selector=st.sampled_from(["", "a", "soc=one", "nobody"]),
        user=st.sampled_from(USERS),
        wait_ms=st.integers(0, 10_000),
        duration_ms=st.sampled_from([1, 5_000, 90_000, 200_000]),
    )
    def reserve(self, selector: str, user: str, wait_ms: int, duration_ms: int) -> None:
        number, begin = f"r{next(self.numbers)}", self.now + wait_ms
        before = self.state.reservations()
        try:
            found, effects = self.state.reserve(number, selector, user, begin, duration_ms, "demo", self.now)
        except (NoDeviceError, UsageError):
            assert self.state.reservations() == before
            return
        assert not [r for r in before if r.device == found.device and r.from_unix_ms < begin + duration_ms
                    and begin < r.until_unix_ms], "two users have one device"  # fmt: skip
        assert parse(selector).matches(labels_of(DEVICES[found.device]))
        self.perform(effects)

    @rule(which=st.integers(0, 9))
    def end_reservation(self, which: int) -> None:
        held = self.state.reservations()
        if held:
            self.perform(self.state.end_reservation(held[which % len(held)].id, self.now))

    @rule(name=st.sampled_from(sorted(DEVICES)), steps=st.integers(1, 4), end=st.sampled_from(sorted(ENDS)))
    def work(self, name: str, steps: int, end: str) -> None:
        """The agent goes on with what it holds: start, load, run, one of the ends; an aborted job ends at once."""
        agent = self.agents[name]
        order = ["assigned", "started", "load", "run", end]
        for key, what in list(agent.held.items())[:1]:
            for _ in range(steps):
                if what in ENDS:
                    break
                what = end if key in agent.aborted else order[order.index(what) + 1]
                agent.held[key] = what
                lease = Lease(*key)
                if what == "started":
                    self.say(agent, m.JobStarted(lease))
                elif what in ENDS:
                    self.say(agent, m.JobFinished(lease, ENDS[what]))
                else:
                    self.say(agent, m.JobProgress(lease, Stage(what)))

    @rule(
        job=st.one_of(jobs, sessions), name=st.sampled_from(sorted(DEVICES)), own=st.booleans(), back=st.integers(0, 2)
    )
    def stray_finish(self, job: str, name: str, own: bool, back: int) -> None:
        """A result under an epoch that may be old, from a device that may not own the job."""
        record = self.store.records.get(job)
        if own and record is not None and record.assigned is not None:
            name = record.assigned.device
        agent = self.agents[name]
        if record is None and job not in self.store.done:
            return
        epoch = (record.epoch if record else self.store.done[job][1]) - back
        if agent.connection is not None and epoch > 0 and (job, epoch) not in agent.held:
            self.say(agent, m.JobFinished(Lease(job, epoch), OK))

    @rule(job=st.one_of(jobs, sessions))
    def cancel(self, job: str) -> None:
        self.perform(self.state.cancel(job, "test", self.now))
        record = self.store.records.get(job)
        if self.waiting is None and record is not None and record.cancelling is None:
            # A restart calls off a session that was under way, and stores no more of it than its end.
            assert isinstance(record.accepted.spec.task, SessionTask) and not self.state.cancel(job, "", self.now).facts

    @rule(step=st.sampled_from([100, 1_000, 3_000, 6_000, 61_000]))
    def time_passes(self, step: int) -> None:
        target = self.now + step
        while (alarm := self.state.next_alarm()) is not None and alarm <= target:
            self.now = max(self.now, alarm)
            self.perform(self.state.tick(self.now))
        self.now = target

    @rule()
    def restart(self) -> None:
        self.reborn()

    @precondition(lambda self: self.accepted and self.waiting is None)
    @rule(selector=st.sampled_from(["", "a"]))
    def killed_before_it_could_send(self, selector: str) -> None:
        """A job is accepted and assigned, and the tracker dies between the commit and the message."""
        job_id = f"j{next(self.numbers)}"
        spec = JobSpec(Blob("0" * 64, 1), "main", RunTask(), selector)
        self.accepted[job_id], self.needs_of[job_id], self.users[job_id] = spec, "any", ""
        self.store.apply(self.state.submit(job_id, spec, NEEDS["any"], f"key-{job_id}", self.now).facts)
        self.reborn()
        assert self.state.job(job_id) is not None

    # ---- What follows ----

    def say(self, agent: Agent, body: m.AgentBody) -> None:
        if agent.connection is None:
            return
        effects = self.state.receive(agent.connection, body, self.now)
        if isinstance(body, m.JobFinished) and self.waiting is None:
            self.check_finish(agent, body.lease, effects)
        self.perform(effects)

    def check_finish(self, agent: Agent, lease: Lease, effects: Effects) -> None:
        """A result counts when the device holds the job under the current epoch, and never otherwise."""
        record = self.store.records.get(lease.job_id)
        owner = record.assigned if record else None
        current = owner is not None and (owner.device, owner.epoch) == (agent.name, lease.epoch)
        taken = [f for f in effects.facts if isinstance(f, JobDone | JobRequeued) and f.job_id == lease.job_id]
        assert bool(taken) == current
        answers = [s.body for s in effects.sends if isinstance(s, ToAgent) and isinstance(s.body, m.ResultAccepted)]
        assert [answer.job_id for answer in answers] == [lease.job_id]
        assert not (current and answers[0].stale)

    def perform(self, effects: Effects) -> None:
        for fact in effects.facts:
            if isinstance(fact, JobAssigned):
                self.check_assignment(fact)
        parcel = Parcel(effects.facts, list(effects.sends), durable=self.waiting is None)
        early = self.outbox.put(parcel, hasten=self.hasten)
        if self.waiting is not None:
            self.waiting.append(parcel)
        for send in early:
            self.deliver(send)
        for ready in self.outbox.released():
            self.carry_out(ready)

    def carry_out(self, parcel: Parcel) -> None:
        self.store.apply(parcel.facts)
        for send in parcel.sends:
            if isinstance(send, ToAgent):
                self.deliver(send)
            elif isinstance(send, CloseAgent):
                for agent in self.agents.values():
                    if agent.connection == send.connection:
                        agent.connection = None
            elif isinstance(send, JobChanged) and send.job.state is JobState.DONE:
                assert send.job.id in self.store.done

    def check_assignment(self, fact: JobAssigned) -> None:
        """A device in maintenance, ill or reserved for somebody else gets no job."""
        status = next(d for d in self.state.devices(include_gone=True) if d.info.name == fact.device)
        assert status.state in (DeviceState.BUSY, DeviceState.GONE)
        held = [r for r in self.state.reservations() if r.device == fact.device]
        assert all(r.user == self.users[fact.job_id] for r in held if r.from_unix_ms <= self.now < r.until_unix_ms)

    def deliver(self, send: ToAgent) -> None:
        agent = next((a for a in self.agents.values() if a.connection == send.connection), None)
        body = send.body
        if isinstance(body, m.AssignJob):
            if not self.state.assignment_leaves(body.lease, self.now):
                return
            assert body.lease.job_id in self.accepted, "what was refused does not leave"
        if agent is None:
            return
        if isinstance(body, m.AssignJob):
            key = (body.lease.job_id, body.lease.epoch)
            want = self.accepted[key[0]]
            assert parse(want.selector).matches(labels_of(DEVICES[agent.name]))
            assert self.fits(key[0], agent.name)
            assert min(body.spec.deadlines.queue_ms, body.spec.deadlines.load_ms, body.spec.deadlines.run_ms) > 0
            assert agent.held.get(key) not in ENDS, "the agent would send that old result for this new assignment"
            agent.held = {k: v for k, v in agent.held.items() if k[0] != key[0]}
            agent.held[key] = "assigned"
            agent.aborted.discard(key)
        elif isinstance(body, m.AbortJob):
            agent.aborted.add((body.lease.job_id, body.lease.epoch))
        elif isinstance(body, m.ResultAccepted):
            for key in [key for key in agent.held if key[0] == body.job_id]:
                if agent.held[key] in ENDS:
                    del agent.held[key]
        elif isinstance(body, m.Refused):
            agent.connection = None

    def fits(self, job_id: str, name: str) -> bool:
        """Whether the device is one for the job; every one is for a session."""
        needs = NEEDS[self.needs_of[job_id]]
        return needs == ANYWHERE or can_run(needs, DEVICES[name])

    def reborn(self) -> None:
        for parcel in self.waiting or ():
            for fact in parcel.facts:
                if isinstance(fact, JobAccepted):  # nobody was promised anything
                    self.accepted.pop(fact.job_id, None)
        self.waiting, self.outbox = None, Outbox()
        self.state = TrackerState("t", SETTINGS)
        self.state.restore(self.store.found(), self.now)
        self.older |= {job_id for job_id, record in self.store.records.items() if record.assigned}
        self.heard |= dict.fromkeys(self.heard, self.now)
        for agent in self.agents.values():
            agent.connection = None

    # ---- What always holds ----

    @invariant()
    def every_accepted_job_is_alive_or_done(self) -> None:
        if not hasattr(self, "accepted") or self.waiting is not None:
            return
        assert set(self.accepted) == set(self.store.records) | set(self.store.done)
        assert {job.id for job in self.state.live_jobs()} == set(self.store.records)
        for job in self.state.live_jobs():
            record = self.store.records[job.id]
            assert (record.assigned is None) == (job.state is JobState.QUEUED)
            assert job.device == (record.assigned.device if record.assigned else "")
            assert bool(job.detail) == (job.state is JobState.QUEUED)

    @invariant()
    def a_device_has_one_job_and_none_idles_beside_one_that_waits_for_it(self) -> None:
        if not hasattr(self, "accepted") or self.waiting is not None:
            return
        assert {r.id for r in self.state.reservations()} == set(self.store.reservations)
        for status in self.state.devices(include_gone=True):
            kept = sum(sample.device == status.info.name for sample in self.store.noise.values())
            assert sum(floor.comparisons for floor in status.noise) == kept
        devices = [r.assigned.device for r in self.store.records.values() if r.assigned and not r.cancelling]
        connected = [status.info.name for status in self.state.devices()]
        assert all(devices.count(name) <= 1 for name in connected)
        idle = [status for status in self.state.devices() if status.state is DeviceState.IDLE]
        for job in self.state.live_jobs():
            if job.state is JobState.QUEUED:
                wanted = parse(job.spec.selector)
                failed = {fault.device for fault in job.faults}
                free = [
                    d.info.name
                    for d in idle
                    if wanted.matches(labels_of(d.info))
                    and self.fits(job.id, d.info.name)
                    and (d.reservation is None or d.reservation.user == self.users[job.id])
                ]
                assert set(free) <= failed, "it may wait for another device than those that failed with it"
                assert job.position >= 1 or job.detail == "being cancelled"

    @invariant()
    def no_session_outlives_its_lease(self) -> None:
        """Nor is it given to a second device once a client has had it on one."""
        if not hasattr(self, "accepted") or self.waiting is not None:
            return
        for job_id, record in self.store.records.items():
            task = record.accepted.spec.task
            if isinstance(task, SessionTask):
                lease_ms = task.lease_ms or SETTINGS.session_lease_ms
                called_off = record.cancelling is not None or job_id in self.older
                unsent = record.assigned is not None and self.now_or_never(job_id)
                due = (self.state.next_alarm() or self.now) <= self.now  # what waited for the disk came late
                assert called_off or unsent or due or self.now < self.heard[job_id] + lease_ms + 1
            served = [epoch for session, epoch in self.served if session == job_id]
            assert all(epoch == record.epoch for epoch in served)

    def now_or_never(self, job_id: str) -> bool:
        """Its assignment has not left yet, so that no device has it."""
        return not any(job_id == held for agent in self.agents.values() for held, _ in agent.held)

    @invariant()
    def the_ill_and_the_serviced_say_so(self) -> None:
        if not hasattr(self, "accepted") or self.waiting is not None:
            return
        for status in self.state.devices():
            serviced = status.info.name in self.store.serviced
            assert (status.state is DeviceState.MAINTENANCE) == serviced
            assert bool(status.detail) == (status.state in (DeviceState.MAINTENANCE, DeviceState.QUARANTINED))

    @invariant()
    def something_is_going_to_happen_to_every_job(self) -> None:
        if hasattr(self, "accepted") and self.store.records and self.waiting is None:
            assert self.state.next_alarm() is not None

    def teardown(self) -> None:
        """When all agents are gone, every job comes to an end."""
        if not hasattr(self, "accepted"):
            return
        self.the_disk_has_it_all()
        for name in DEVICES:
            self.lose_connection(name, True)
        for _ in range(10_000):
            alarm = self.state.next_alarm()
            if alarm is None:
                break
            self.now = max(self.now, alarm)
            self.perform(self.state.tick(self.now))
        assert not self.store.records
        assert set(self.store.done) == set(self.accepted)
        assert not self.store.reservations


TestTracker = TrackerMachine.TestCase
TestTracker.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
