"""The agent's state machine under every order of events hypothesis can think of, against a model of a tracker."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kedge.device_agent.core import (
    GREETING_S,
    LAST_DELAY_S,
    Action,
    AgentCore,
    CancelJob,
    Close,
    Exit,
    Forget,
    Keep,
    Open,
    Send,
    StartJob,
    key,
)
from kedge.rpc import messages as m
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.types import Blob, DeviceInfo, JobResult, JobSpec, Lease, Protocol, RunTask

HEARTBEAT_S = 2.0
Key = tuple[str, int]


def lease(job: str, epoch: int = 1) -> Lease:
    return Lease(job, epoch, 10_000)


def result(text: str) -> JobResult:
    return JobResult(Outcome(OutcomeKind.OK, message=text))


def new_core() -> AgentCore:
    return AgentCore(m.Hello(Protocol(1), DeviceInfo("board", "aarch64"), "instance"), jitter=lambda: 0.5)


def welcome() -> m.Welcome:
    return m.Welcome(Protocol(1), "tracker", int(HEARTBEAT_S * 1000))


def assign(job: str, epoch: int = 1) -> m.AssignJob:
    return m.AssignJob(lease(job, epoch), JobSpec(Blob("0" * 64, 1), job, RunTask()))


def abort(job: str, epoch: int = 1) -> m.AbortJob:
    return m.AbortJob(lease(job, epoch), "not wanted")


def accept(job: str) -> m.ResultAccepted:
    return m.ResultAccepted(job)


def bodies(actions: list[Action]) -> list[str]:
    return [type(a.message if isinstance(a, Send) else a).__name__ for a in actions]


def ready_core() -> AgentCore:
    core = new_core()
    assert core.start(0.0) == [Open()]
    assert bodies(core.connected(0.0)) == ["Hello"]
    assert core.received(welcome(), 0.0) == []
    assert core.phase == "ready"
    return core


def sent(actions: list[Action]) -> list[m.AgentBody]:
    return [action.message for action in actions if isinstance(action, Send)]


def test_a_job_from_assignment_to_acceptance() -> None:
    core = ready_core()
    actions = core.received(assign("a"), 1.0)
    assert bodies(actions) == ["JobStarted", "StartJob"]
    assert core.progress(lease("a"), Stage.LOAD, 1.1) == []
    assert bodies(core.finished(m.JobFinished(lease("a"), result("done")))) == ["JobFinished", "Keep"]
    assert [key(item) for item in core.held()] == [("a", 1)]
    assert core.received(accept("a"), 2.0) == [Forget(lease("a"))]
    assert core.received(accept("a"), 2.0) == []
    assert core.held() == ()


def test_a_result_survives_a_lost_connection() -> None:
    core = ready_core()
    core.received(assign("a"), 1.0)
    core.disconnected(1.5)
    assert core.finished(m.JobFinished(lease("a"), result("done"))) == [Keep(m.JobFinished(lease("a"), result("done")))]
    alarm = core.alarm()
    assert alarm is not None
    assert core.tick(alarm) == [Open()]
    (hello,) = sent(core.connected(alarm))
    assert isinstance(hello, m.Hello)
    assert hello.running == (lease("a"),)
    (again,) = sent(core.received(welcome(), alarm))
    assert again == m.JobFinished(lease("a"), result("done"))


def test_a_result_survives_its_agent() -> None:
    kept = m.JobFinished(lease("a", 3), result("done"))
    core = AgentCore(m.Hello(Protocol(1), DeviceInfo("b", "x86_64"), "new"), jitter=lambda: 0.5, results=[kept])
    core.start(0.0)
    (hello,) = sent(core.connected(0.0))
    assert isinstance(hello, m.Hello) and hello.running == (lease("a", 3),)
    assert sent(core.received(welcome(), 0.0)) == [kept]
    assert core.received(accept("a"), 1.0) == [Forget(lease("a", 3))]


def test_running_work_is_announced_with_its_stage_after_a_reconnect() -> None:
    core = ready_core()
    core.received(assign("a"), 1.0)
    core.progress(lease("a"), Stage.RUN, 1.2)
    core.disconnected(1.5)
    core.tick(core.alarm() or 0.0)
    core.connected(3.0)
    again = [m.JobStarted(lease("a")), m.JobProgress(lease("a"), Stage.RUN)]
    assert sent(core.received(welcome(), 3.0)) == again


def test_delays_grow_to_their_limit_and_start_small_again_after_a_stable_connection() -> None:
    core = new_core()
    core.start(0.0)
    now, delays = 0.0, []
    for _ in range(8):
        core.disconnected(now)
        alarm = core.alarm()
        assert alarm is not None
        delays.append(alarm - now)
        now = alarm
        core.tick(now)
    assert delays == sorted(delays)
    assert delays[0] == pytest.approx(0.15)
    assert delays[-1] == pytest.approx(LAST_DELAY_S * 0.75)
    core.connected(now)
    core.received(welcome(), now)
    core.disconnected(now + 60)
    assert (core.alarm() or 0) - (now + 60) == pytest.approx(0.15)


def test_a_tracker_that_never_greets_is_dialled_again() -> None:
    core = new_core()
    core.start(0.0)
    core.connected(0.0)
    assert core.tick(GREETING_S - 0.1) == []
    assert core.tick(GREETING_S) == [Close()]
    assert core.phase == "waiting"


def test_a_refusal_that_may_pass_waits_and_one_that_may_not_ends_the_agent() -> None:
    for retry, expected in ((True, ["Close"]), (False, ["Close", "Exit"])):
        core = new_core()
        core.start(0.0)
        core.connected(0.0)
        refusal = m.Refused("name in use", retry)
        actions = core.received(refusal, 0.0)
        assert bodies(actions) == expected
        if not retry:
            assert actions[-1] == Exit("the tracker refused this agent: name in use", True)


def test_a_newer_lease_of_the_running_job_replaces_it() -> None:
    core = ready_core()
    core.received(assign("a", 1), 1.0)
    assert bodies(core.received(assign("a", 2), 2.0)) == ["CancelJob"]
    actions = core.finished(m.JobFinished(lease("a", 1), result("too late")))
    assert bodies(actions) == ["JobStarted", "StartJob"]
    assert core.running is not None
    assert key(core.running) == ("a", 2)


def test_abort_counts_for_its_own_lease_and_once() -> None:
    core = ready_core()
    core.received(assign("a", 5), 1.0)
    assert core.received(abort("a", 4), 1.1) == []
    assert core.received(abort("b", 9), 1.1) == []
    assert core.received(abort("a", 5), 1.2) == [CancelJob(lease("a", 5), "not wanted")]
    assert core.received(abort("a", 5), 1.3) == []


def test_aborting_what_is_finished_but_not_accepted_takes_its_result_back() -> None:
    core = ready_core()
    core.received(assign("a", 5), 1.0)
    core.finished(m.JobFinished(lease("a", 5), result("done")))
    assert core.received(abort("a", 4), 1.1) == []
    (instead,) = sent(core.received(abort("a", 5), 1.2))
    assert isinstance(instead, m.JobFinished) and instead.lease == lease("a", 5)
    assert instead.result.outcome.kind is OutcomeKind.CANCELLED
    core.disconnected(1.5)
    core.tick(core.alarm() or 0.0)
    core.connected(3.0)
    assert sent(core.received(welcome(), 3.0)) == [instead]
    core.received(accept("a"), 3.1)
    assert core.held() == ()


def test_outputs_that_are_uploaded_are_a_second_transfer() -> None:
    core = ready_core()
    core.received(assign("a"), 1.0)
    said: list[m.AgentBody] = []
    for now, stage in enumerate([Stage.TRANSFER, Stage.LOAD, Stage.RUN, Stage.TRANSFER], start=1):
        assert core.progress(lease("a"), stage, float(now)) == []
        said += [body for body in sent(core.tick(now + 0.5)) if isinstance(body, m.JobProgress)]
    assert said == [m.JobProgress(lease("a"), stage) for stage in (Stage.LOAD, Stage.RUN, Stage.TRANSFER)]


def test_a_stage_is_told_once_it_lasts() -> None:
    core = ready_core()
    core.received(assign("a"), 1.0)
    core.progress(lease("a"), Stage.LOAD, 1.0)
    core.progress(lease("a"), Stage.RUN, 1.01)
    alarm = core.alarm()
    assert alarm is not None and 1.01 < alarm < 1.1
    assert core.tick(1.015) == []
    assert sent(core.tick(alarm)) == [m.JobProgress(lease("a"), Stage.RUN)]
    assert core.tick(alarm + 0.1) == [], "once"
    core.finished(m.JobFinished(lease("a"), result("done")))
    assert (core.alarm() or 0) > alarm + 0.5, "the next heartbeat"


def test_nothing_is_told_of_a_job_that_is_assigned_anew() -> None:
    core = ready_core()
    core.received(assign("a", 1), 1.0)
    core.progress(lease("a", 1), Stage.RUN, 1.0)
    core.received(assign("a", 2), 1.01)
    assert core.tick(1.5) == []


def test_stopping_says_goodbye_and_ends_the_job() -> None:
    core = ready_core()
    core.received(assign("a"), 1.0)
    assert bodies(core.stop("SIGTERM")) == ["CancelJob", "Goodbye", "Close", "Exit"]
    assert core.stop("again") == []
    assert bodies(core.finished(m.JobFinished(lease("a"), result("x")))) == ["Keep"]
    assert core.alarm() is None


class AgainstAModelTracker(RuleBasedStateMachine):
    """The shell and the tracker are models; the core is the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.core = new_core()
        self.now = 0.0
        self.open = False
        self.greeted = False
        self.job: Key | None = None
        self.cancelled: set[Key] = set()
        self.aborted: set[Key] = set()
        self.epochs: dict[str, int] = {}  # the newest lease of every job assigned, but for those lost with an agent
        self.given: dict[str, int] = {}  # the newest epoch that a job ever had: a tracker gives none twice
        self.accepted: set[str] = set()
        self.delivered: dict[Key, JobResult] = {}  # results as they reached the tracker
        self.produced: dict[Key, JobResult] = {}  # results that jobs made
        self.resent: set[Key] = set()  # results seen on the current connection
        self.disk: dict[Key, m.JobFinished] = {}
        self.do(self.core.start(self.now))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Open):
                assert not self.open
                self.open = True
                self.greeted = False
                self.resent = set()
                self.do(self.core.connected(self.now))
            elif isinstance(action, Close):
                self.open = False
            elif isinstance(action, StartJob):
                assert self.job is None
                self.job = key(action.lease)
                assert self.epochs[action.lease.job_id] == action.lease.epoch
                assert action.spec.function == action.lease.job_id
            elif isinstance(action, CancelJob):
                assert key(action.lease) == self.job
                assert key(action.lease) not in self.cancelled
                self.cancelled.add(key(action.lease))
            elif isinstance(action, Keep):
                self.disk[key(action.finished.lease)] = action.finished
            elif isinstance(action, Forget):
                del self.disk[key(action.lease)]
            elif isinstance(action, Send):
                assert self.open
                self.deliver(action.message)

    def deliver(self, message: m.AgentBody) -> None:
        if isinstance(message, m.Hello):
            assert message.running == self.core.held()
            return
        assert self.greeted, "nothing but the greeting before Welcome"
        if isinstance(message, m.Heartbeat):
            assert message.running == self.core.held()
        elif isinstance(message, m.JobFinished):
            one = key(message.lease)
            if one in self.aborted and message.result.outcome.kind is OutcomeKind.CANCELLED:
                self.delivered[one] = message.result
            assert self.delivered.setdefault(one, message.result) == message.result, "a result changes when aborted"
            self.resent.add(one)

    def ready(self) -> bool:
        return self.open and self.greeted

    @precondition(lambda self: self.open and not self.greeted)
    @rule()
    def tracker_welcomes(self) -> None:
        self.greeted = True
        self.do(self.core.received(welcome(), self.now))

    @precondition(lambda self: self.open)
    @rule()
    def connection_breaks(self) -> None:
        self.open = False
        self.do(self.core.disconnected(self.now))

    @rule(seconds=st.sampled_from([0.01, 0.03, 0.2, 1.0, 2.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.core.tick(self.now))

    @precondition(ready)
    @rule(job=st.sampled_from("abcd"), newer=st.booleans())
    def tracker_assigns(self, job: str, newer: bool) -> None:
        if job in self.accepted:
            return
        if newer or job not in self.epochs:
            self.epochs[job] = self.given[job] = self.given.get(job, 0) + 1
        epoch = self.epochs[job]
        self.do(self.core.received(assign(job, epoch), self.now))

    @precondition(ready)
    @rule(job=st.sampled_from("abcd"), behind=st.integers(0, 1))
    def tracker_aborts(self, job: str, behind: int) -> None:
        before = set(self.cancelled)
        epoch = self.epochs.get(job, 1)
        held = {key(item) for item in self.core.held()}
        if not behind:
            self.aborted.add((job, epoch))
        self.do(self.core.received(abort(job, epoch - behind), self.now))
        if behind:
            assert {one for one in self.cancelled - before if one[1] == epoch} == set()
            assert {key(item) for item in self.core.held()} == held

    @precondition(lambda self: self.ready() and self.resent)
    @rule(data=st.data())
    def tracker_accepts(self, data: st.DataObject) -> None:
        job, epoch = data.draw(st.sampled_from(sorted(self.resent)))
        if self.epochs[job] == epoch:
            self.accepted.add(job)
            self.do(self.core.received(accept(job), self.now))

    @precondition(lambda self: self.job is not None)
    @rule(stage=st.sampled_from([Stage.TRANSFER, Stage.LOAD, Stage.RUN]))
    def job_proceeds(self, stage: Stage) -> None:
        assert self.job is not None
        self.do(self.core.progress(lease(*self.job), stage, self.now))

    @precondition(lambda self: self.job is not None)
    @rule()
    def job_ends(self) -> None:
        assert self.job is not None
        one, self.job = self.job, None
        self.produced[one] = result(f"{one}")
        self.do(self.core.finished(m.JobFinished(lease(*one), self.produced[one])))

    @invariant()
    def every_lease_is_held_until_it_is_settled(self) -> None:
        held = [key(item) for item in self.core.held()]
        assert len({job for job, _ in held}) == len(held)
        unsettled = {(job, epoch) for job, epoch in self.epochs.items() if job not in self.accepted}
        assert set(held) == unsettled

    @rule()
    def killed_and_started_again(self) -> None:
        """What ran is gone, and with it its lease; what had ended is not."""
        self.job, self.open = None, False
        for job, epoch in list(self.epochs.items()):
            if job not in self.accepted and (job, epoch) not in self.disk:
                del self.epochs[job]
                self.produced = {one: made for one, made in self.produced.items() if one[0] != job}
        self.core = AgentCore(
            m.Hello(Protocol(1), DeviceInfo("board", "aarch64"), "again"),
            jitter=lambda: 0.5,
            results=self.disk.values(),
        )
        self.do(self.core.start(self.now))

    @invariant()
    def the_disk_holds_what_is_not_accepted(self) -> None:
        ended = {one for one in self.produced if self.epochs.get(one[0]) == one[1] and one[0] not in self.accepted}
        assert ended <= set(self.disk) <= {key(item) for item in self.core.held()}

    @invariant()
    def every_result_is_with_the_tracker_while_connected(self) -> None:
        if not self.ready():
            return
        for one in self.produced:
            job, epoch = one
            if self.epochs.get(job) == epoch and job not in self.accepted:
                assert one in self.resent

    @invariant()
    def something_will_happen(self) -> None:
        assert self.core.alarm() is not None

    def teardown(self) -> None:
        """From any state, a tracker that works again gets every result."""
        for _ in range(50):
            if not self.open:
                self.now = self.core.alarm() or self.now
                self.do(self.core.tick(self.now))
            elif not self.greeted:
                self.tracker_welcomes()
            elif self.job is not None:
                self.job_ends()
            else:
                break
        for job, epoch in self.epochs.items():
            assert job in self.accepted or (job, epoch) in self.delivered
            self.do(self.core.received(accept(job), self.now))
        assert self.core.held() == ()


AgainstAModelTracker.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
TestAgainstAModelTracker = AgainstAModelTracker.TestCase
