"""What the tracker decides about sessions, one rule at a time, with a clock in hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kedge.rpc import messages as m
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import local_protocol
from kedge.rpc.tracker.facts import ANYWHERE, Effects, JobAccepted, JobAssigned, JobDone, JobRecord, Stored, ToAgent
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.tracker.state import TrackerState
from kedge.rpc.types import (
    NO_BLOB,
    Deadlines,
    DeviceState,
    Health,
    JobResult,
    JobSpec,
    JobState,
    Lease,
    Protocol,
    SessionTask,
)
from support.toys import device_info

S = Settings(silence_ms=3_000_000, lease_ms=2_000_000, session_lease_ms=10_000, longest_session_ms=1_000_000)
OK = JobResult(Outcome(OutcomeKind.OK))


def ends(effects: Effects) -> list[tuple[OutcomeKind, str]]:
    return [(f.result.outcome.kind, f.result.outcome.message) for f in effects.facts if isinstance(f, JobDone)]


def aborts(effects: Effects) -> list[str]:
    bodies = [send.body for send in effects.sends if isinstance(send, ToAgent)]
    return [body.reason for body in bodies if isinstance(body, m.AbortJob)]


class Bench:
    """Devices `a` and `b`, and a session "s" on the first of them."""

    def __init__(self, lease_ms: int = 0) -> None:
        self.state = TrackerState("t", S)
        self.state.connect(1, m.Hello(local_protocol(), device_info("a"), "1", health=Health()), 0)
        spec = JobSpec(NO_BLOB, "", SessionTask(lease_ms))
        self.accepted = self.state.submit("s", spec, ANYWHERE, "", 0, "ann")
        self.state.connect(2, m.Hello(local_protocol(), device_info("b"), "1", health=Health()), 0)
        assert self.state.assignment_leaves(Lease("s", 1), 0)
        self.state.receive(1, m.JobStarted(Lease("s", 1)), 0)

    def begun(self) -> Bench:
        self.state.session_begins("s", 1, 0)
        return self

    def states(self) -> dict[str, DeviceState]:
        return {device.info.name: device.state for device in self.state.devices()}


@pytest.fixture
def bench() -> Bench:
    return Bench().begun()


def test_a_session_has_its_device_alone(bench: Bench) -> None:
    assert bench.states() == {"a": DeviceState.BUSY, "b": DeviceState.IDLE}
    job = bench.state.job("s")
    assert job is not None and (job.state, job.stage, job.device) == (JobState.RUNNING, Stage.RUN, "a")
    assert bench.state.session_of("s", 1) is not None and bench.state.session_of("s", 2) is None
    # What the agent says late does not put it back.
    bench.state.receive(1, m.JobStarted(Lease("s", 1)), 1)
    assert bench.state.job("s").stage is Stage.RUN  # type: ignore[union-attr]
    assert ends(bench.state.receive(1, m.JobFinished(Lease("s", 1), OK), 2)) == [(OutcomeKind.OK, "")]
    assert bench.states()["a"] is DeviceState.IDLE


@pytest.mark.parametrize(("lease_ms", "lasts"), [(0, 10_000), (300, 300)])
def test_without_a_word_the_lease_ends(lease_ms: int, lasts: int) -> None:
    bench = Bench(lease_ms).begun()
    bench.state.session_heard("s", 100)
    assert not aborts(bench.state.tick(100 + lasts - 1))
    assert aborts(bench.state.tick(100 + lasts)) == [f"nothing was heard of its client for {lasts / 1000:g} s"]
    # It has its device until the agent says that the runner is gone, or for as long as that may take.
    assert bench.states()["a"] is DeviceState.BUSY
    cancelled = JobResult(Outcome(OutcomeKind.CANCELLED))
    assert ends(bench.state.receive(1, m.JobFinished(Lease("s", 1), cancelled), 200 + lasts)) == [
        (OutcomeKind.CANCELLED, "")
    ]
    assert bench.states()["a"] is DeviceState.IDLE


def test_a_client_that_vanishes_while_it_waits_gets_nothing() -> None:
    state = TrackerState("t", S)
    state.submit("s", JobSpec(NO_BLOB, "", SessionTask(500)), ANYWHERE, "", 0)
    assert ends(state.tick(499)) == []
    assert ends(state.tick(500)) == [(OutcomeKind.CANCELLED, "nothing was heard of its client for 0.5 s")]


def test_what_a_client_had_on_a_lost_device_is_lost(bench: Bench) -> None:
    effects = bench.state.session_broke("s", 1, "its stream broke", 50)
    assert ends(effects) == [(OutcomeKind.DEVICE_LOST, "its stream broke")] and aborts(effects) == ["its stream broke"]
    assert bench.states()["b"] is DeviceState.IDLE, "it does not go to another device"


def test_a_session_that_did_not_begin_goes_to_another_device() -> None:
    bench = Bench()
    effects = bench.state.session_broke("s", 1, "its stream broke", 50)
    assert not effects.facts, "nothing was lost, as no client was there"
    fault = JobResult(Outcome(OutcomeKind.DEVICE_FAULT, message="there is no runner"))
    effects = bench.state.receive(1, m.JobFinished(Lease("s", 1), fault), 60)
    (assigned,) = [fact for fact in effects.facts if isinstance(fact, JobAssigned)]
    assert (assigned.device, assigned.epoch) == ("b", 2)


@pytest.mark.parametrize("how", ["goodbye", "restart", "fault"])
def test_a_session_that_began_ends_with_its_device(bench: Bench, how: str) -> None:
    if how == "goodbye":
        effects = bench.state.receive(1, m.Goodbye("SIGTERM"), 50)
        kind = OutcomeKind.DEVICE_LOST
    elif how == "restart":
        bench.state.disconnect(1, 50)
        effects = bench.state.connect(3, m.Hello(local_protocol(), device_info("a"), "2", health=Health()), 60)
        kind = OutcomeKind.DEVICE_LOST
    else:
        fault = JobResult(Outcome(OutcomeKind.DEVICE_FAULT, message="the disk is full"))
        effects = bench.state.receive(1, m.JobFinished(Lease("s", 1), fault), 60)
        kind = OutcomeKind.DEVICE_FAULT
    assert [end for end, _ in ends(effects)] == [kind]
    assert not [fact for fact in effects.facts if isinstance(fact, JobAssigned)]


def test_a_session_lasts_so_long_and_no_longer(bench: Bench) -> None:
    for now in range(0, 1_000_000, 9_000):
        bench.state.session_heard("s", now)
        assert not aborts(bench.state.tick(now))
    bench.state.session_heard("s", 1_004_000)
    assert aborts(bench.state.tick(1_006_000)) == ["it lasted 1000 s, which is as long as it may"]
    assert bench.states()["a"] is DeviceState.BUSY


def test_a_restarted_tracker_calls_off_what_had_begun_and_goes_on_with_what_waits(bench: Bench) -> None:
    (accepted,) = [fact for fact in bench.accepted.facts if isinstance(fact, JobAccepted)]
    (assigned,) = [fact for fact in bench.accepted.facts if isinstance(fact, JobAssigned)]
    waiting = replace(accepted, job_id="w", seq=2)
    state = TrackerState("t", S)
    records = (JobRecord(accepted, assigned, 1), JobRecord(waiting))
    state.restore(Stored("t", records, last_seq=2), 5_000)
    greeting = m.Hello(local_protocol(), device_info("a"), "1", (Lease("s", 1),), Health())
    effects = state.connect(1, greeting, 6_000)
    assert aborts(effects) == ["the tracker was restarted, which no session outlives"]
    cancelled = JobResult(Outcome(OutcomeKind.CANCELLED))
    effects = state.receive(1, m.JobFinished(Lease("s", 1), cancelled), 6_500)
    assert [fact.job_id for fact in effects.facts if isinstance(fact, JobAssigned)] == ["w"]
    # Its lease began anew with the tracker.
    assert state.job("w") is not None


def test_an_agent_that_knows_no_sessions_gets_none() -> None:
    state = TrackerState("t", S)
    old = Protocol(local_protocol().version, ("bench", "blobs", "run"))
    state.connect(1, m.Hello(old, device_info("a"), "1", health=Health()), 0)
    state.submit("s", JobSpec(NO_BLOB, "", SessionTask(), deadlines=Deadlines()), ANYWHERE, "", 0)
    assert state.detail("s") == "no matching device serves sessions: update kedge on it"
    state.connect(2, m.Hello(local_protocol(), device_info("b"), "1", health=Health()), 10)
    job = state.job("s")
    assert job is not None and job.device == "b"
