"""The tracker's rules, one by one, with a clock in hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kedge.rpc import messages as m
from kedge.rpc.artifact import Need, VariantDevice
from kedge.rpc.errors import NoDeviceError, UsageError
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import local_protocol
from kedge.rpc.selector import SelectorError
from kedge.rpc.tracker.facts import (
    CloseAgent,
    DeviceForgotten,
    DeviceSeen,
    Effects,
    JobAccepted,
    JobAssigned,
    JobChanged,
    JobDone,
    JobRecord,
    JobRequeued,
    JobWithdrawn,
    ReservationEnded,
    Reserved,
    ServiceEnded,
    Stored,
    ToAgent,
)
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.tracker.state import TrackerState
from kedge.rpc.types import (
    Accelerator,
    Blob,
    Deadlines,
    DeviceState,
    Health,
    JobResult,
    JobSpec,
    JobState,
    Lease,
    RunTask,
)
from support.toys import device_info

S = Settings(
    heartbeat_interval_ms=100,
    silence_ms=1_000,
    lease_ms=5_000,
    cancel_grace_ms=2_000,
    deadline_slack_ms=500,
    deadlines=Deadlines(queue_ms=60_000, transfer_ms=7_000, load_ms=8_000, run_ms=9_000),
    max_device_faults=1,
)
NEEDS = (Need("x86_64", frozenset({"avx2"})),)
OK = JobResult(Outcome(OutcomeKind.OK))


def spec(selector: str = "", priority: int = 0, artifact: int = 0, **deadlines: int) -> JobSpec:
    return JobSpec(Blob(f"{artifact:064x}", 1), "main", RunTask(), selector, Deadlines(**deadlines), priority)


def hello(name: str = "a", instance: str = "1", *running: Lease, arch: str = "x86_64", version: int = 1) -> m.Hello:
    protocol = replace(local_protocol(), version=version)
    return m.Hello(protocol, device_info(name, arch), instance, running, Health())


def with_gpu(name: str, gpu: Accelerator) -> m.Hello:
    greeting = hello(name)
    return replace(greeting, device=replace(greeting.device, accelerators=(gpu,)))


def bodies(effects: Effects, kind: type[m.TrackerBody]) -> list[m.TrackerBody]:
    return [s.body for s in effects.sends if isinstance(s, ToAgent) and isinstance(s.body, kind)]


def ends(effects: Effects) -> dict[str, tuple[OutcomeKind, Stage | None]]:
    return {f.job_id: (f.result.outcome.kind, f.result.outcome.stage) for f in effects.facts if isinstance(f, JobDone)}


class Bench:
    """A state with one connected device `a` and, on demand, a job that it has."""

    def __init__(self) -> None:
        self.state = TrackerState("t", S)
        self.state.connect(1, hello(), 0)

    def assigned(self, job_id: str = "j", now: int = 0, **deadlines: int) -> Lease:
        effects = self.state.submit(job_id, spec(**deadlines), NEEDS, "", now)
        (assign,) = bodies(effects, m.AssignJob)
        assert self.state.assignment_leaves(assign.lease, now)
        return assign.lease

    def started(self, now: int = 0, **deadlines: int) -> Lease:
        lease = self.assigned(now=now, **deadlines)
        self.state.receive(1, m.JobStarted(lease), now)
        return lease

    def device(self) -> DeviceState:
        return next(d.state for d in self.state.devices(include_gone=True) if d.info.name == "a")


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_job_goes_through_its_stages(bench: Bench) -> None:
    lease = bench.assigned()
    assert (lease.epoch, lease.duration_ms) == (1, S.lease_ms)
    assert bench.state.job("j").state is JobState.ASSIGNED
    assert bench.device() is DeviceState.BUSY
    effects = bench.state.receive(1, m.JobStarted(lease), 1)
    assert [(s.job.state, s.job.stage) for s in effects.sends if isinstance(s, JobChanged)] == [
        (JobState.RUNNING, Stage.TRANSFER)
    ]
    bench.state.receive(1, m.JobProgress(lease, Stage.RUN), 2)
    assert bench.state.job("j").stage is Stage.RUN
    effects = bench.state.receive(1, m.JobFinished(lease, OK), 3)
    (done,) = effects.facts
    assert (done.result.device, done.finished_ms) == ("a", 3)
    assert bodies(effects, m.ResultAccepted) == [m.ResultAccepted("j", stale=False)]
    assert bench.state.job("j") is None and bench.device() is DeviceState.IDLE


def test_the_reply_and_the_assignment_share_one_batch_of_facts(bench: Bench) -> None:
    effects = bench.state.submit("j", spec(), NEEDS, "", 0)
    assert [type(f).__name__ for f in effects.facts] == ["JobAccepted", "JobAssigned"]


def test_open_deadlines_are_filled_in(bench: Bench) -> None:
    bench.assigned(run_ms=1)
    assert bench.state.job("j").spec.deadlines == Deadlines(60_000, 7_000, 8_000, 1)


def test_a_result_is_taken_once_and_a_repeat_is_acknowledged(bench: Bench) -> None:
    lease = bench.started()
    bench.state.receive(1, m.JobFinished(lease, OK), 1)
    again = bench.state.receive(1, m.JobFinished(lease, OK), 2)
    assert again.facts == [] and bodies(again, m.ResultAccepted) == [m.ResultAccepted("j", stale=False)]
    other = bench.state.receive(1, m.JobFinished(Lease("j", 7), OK), 2)
    assert other.facts == [] and bodies(other, m.ResultAccepted) == [m.ResultAccepted("j", stale=True)]


def test_a_result_of_another_device_is_stale(bench: Bench) -> None:
    lease = bench.started()
    bench.state.connect(2, hello("b"), 0)
    effects = bench.state.receive(2, m.JobFinished(lease, OK), 1)
    assert effects.facts == [] and bodies(effects, m.ResultAccepted) == [m.ResultAccepted("j", stale=True)]
    assert bench.state.job("j").state is JobState.RUNNING


def test_a_lost_connection_is_forgiven_while_the_lease_lasts(bench: Bench) -> None:
    lease = bench.started()
    bench.state.disconnect(1, 100)
    assert bench.device() is DeviceState.GONE
    effects = bench.state.connect(2, hello("a", "1", lease), 4_000)
    assert bodies(effects, m.AbortJob) == [] and bench.state.job("j").state is JobState.RUNNING
    assert ends(bench.state.tick(4_900)) == {}
    bench.state.receive(2, m.Heartbeat(), 4_950)
    assert ends(bench.state.tick(5_500)) == {}, "the hello has renewed the lease"
    assert ends(bench.state.receive(2, m.JobFinished(lease, OK), 5_600)) == {"j": (OutcomeKind.OK, None)}


def test_a_job_that_ran_is_lost_when_its_lease_runs_out(bench: Bench) -> None:
    bench.started()
    bench.state.disconnect(1, 100)
    assert ends(bench.state.tick(4_999)) == {}
    assert ends(bench.state.tick(5_000)) == {"j": (OutcomeKind.DEVICE_LOST, Stage.TRANSFER)}


def test_a_job_that_never_began_is_queued_again_and_the_old_epoch_is_worth_nothing(bench: Bench) -> None:
    old = bench.assigned()
    bench.state.disconnect(1, 100)
    assert [type(f) for f in bench.state.tick(5_000).facts] == [JobRequeued]
    effects = bench.state.connect(2, hello("a", "1", old), 5_100)
    assert [abort.lease.epoch for abort in bodies(effects, m.AbortJob)] == [1]
    assert bodies(effects, m.AssignJob) == [], "the device still holds the old lease"
    stale = bench.state.receive(2, m.JobFinished(old, OK), 5_200)
    assert bodies(stale, m.ResultAccepted) == [m.ResultAccepted("j", stale=True)]
    (again,) = bodies(stale, m.AssignJob)
    assert again.lease.epoch == 2


def test_a_job_is_queued_again_only_so_often(bench: Bench) -> None:
    bench.assigned()
    for connection in range(1, 1 + S.max_requeues):
        bench.state.disconnect(connection, 5)
        effects = bench.state.connect(connection + 1, hello("a", str(connection + 1)), 10)
        assert [type(f) for f in effects.facts] == [JobRequeued, JobAssigned]
        assert bench.state.assignment_leaves(Lease("j", connection + 1), 10)
    bench.state.disconnect(1 + S.max_requeues, 20)
    effects = bench.state.connect(9, hello("a", "9"), 30)
    assert ends(effects) == {"j": (OutcomeKind.DEVICE_LOST, Stage.TRANSFER)}


def test_a_restarted_agent_has_lost_what_ran(bench: Bench) -> None:
    bench.started()
    bench.state.disconnect(1, 5)
    effects = bench.state.connect(2, hello("a", "2"), 10)
    assert ends(effects) == {"j": (OutcomeKind.DEVICE_LOST, Stage.TRANSFER)}


def test_goodbye_gives_everything_up_at_once(bench: Bench) -> None:
    bench.started()
    for connection in range(1, 1 + S.max_requeues):
        effects = bench.state.receive(connection, m.Goodbye("SIGTERM"), 10)
        assert [type(f) for f in effects.facts] == [JobRequeued], "nobody was at fault: it is queued again"
        assert bench.device() is DeviceState.GONE
        (assign,) = bodies(bench.state.connect(connection + 1, hello("a", str(connection + 1)), 10), m.AssignJob)
        assert bench.state.assignment_leaves(assign.lease, 10)
        bench.state.receive(connection + 1, m.JobStarted(assign.lease), 10)
    effects = bench.state.receive(1 + S.max_requeues, m.Goodbye("SIGTERM"), 20)
    assert ends(effects) == {"j": (OutcomeKind.DEVICE_LOST, Stage.TRANSFER)}
    assert "SIGTERM" in effects.facts[0].result.outcome.message


def test_heartbeats_renew_the_leases_they_name(bench: Bench) -> None:
    lease = bench.started(run_ms=100_000, transfer_ms=100_000)
    for now in range(900, 20_000, 900):
        bench.state.receive(1, m.Heartbeat(running=(lease,)), now)
        assert ends(bench.state.tick(now)) == {}
    assert bench.state.job("j") is not None


def test_a_heartbeat_that_crossed_an_assignment_does_not_free_the_device(bench: Bench) -> None:
    bench.assigned()
    bench.state.receive(1, m.Heartbeat(), 10)
    assert bench.device() is DeviceState.BUSY
    assert bench.state.submit("k", spec(), NEEDS, "", 11).facts[1:] == []


def test_an_assignment_that_got_lost_is_made_again_under_a_new_epoch(bench: Bench) -> None:
    old = bench.assigned()
    for now in range(900, 5_000, 900):
        bench.state.receive(1, m.Heartbeat(), now)
        assert bench.state.tick(now).facts == []
    effects = bench.state.tick(5_000)
    assert [type(f) for f in effects.facts] == [JobRequeued, JobAssigned]
    stale = bench.state.receive(1, m.JobFinished(old, OK), 5_100)
    assert stale.facts == [] and bodies(stale, m.ResultAccepted) == [m.ResultAccepted("j", stale=True)]
    assert ends(bench.state.receive(1, m.JobFinished(Lease("j", 2), OK), 5_200)) == {"j": (OutcomeKind.OK, None)}


def test_a_settled_lease_in_a_late_heartbeat_does_not_occupy_the_device(bench: Bench) -> None:
    lease = bench.started()
    bench.state.receive(1, m.JobFinished(lease, OK), 1)
    effects = bench.state.receive(1, m.Heartbeat(running=(lease,)), 2)
    assert effects.sends == [] and bench.device() is DeviceState.IDLE


def test_a_lease_nobody_knows_is_aborted_and_keeps_the_device_busy(bench: Bench) -> None:
    effects = bench.state.receive(1, m.Heartbeat(running=(Lease("ghost", 3),)), 1)
    assert [abort.lease for abort in bodies(effects, m.AbortJob)] == [Lease("ghost", 3)]
    assert bench.device() is DeviceState.BUSY
    bench.state.receive(1, m.Heartbeat(), 2)
    assert bench.device() is DeviceState.IDLE


def test_a_silent_connection_is_closed(bench: Bench) -> None:
    assert bench.state.tick(999).sends == []
    assert CloseAgent(1) in bench.state.tick(1_000).sends
    assert bench.device() is DeviceState.GONE
    assert bench.state.receive(1, m.Heartbeat(), 1_001).sends == []


def test_waiting_is_no_run_time(bench: Bench) -> None:
    """A job that may run for 10 ms waits for 8 s, is fetched for 6 s and loaded for 7 s: each on its own account."""
    first = bench.started()
    bench.state.receive(1, m.JobProgress(first, Stage.RUN), 0)
    bench.state.submit("k", spec(run_ms=10), NEEDS, "", 0)
    for now in range(0, 8_000, 500):
        bench.state.receive(1, m.Heartbeat(running=(first,)), now)
        assert ends(bench.state.tick(now)) == {}
    (assign,) = bodies(bench.state.receive(1, m.JobFinished(first, OK), 8_000), m.AssignJob)
    lease = assign.lease
    assert lease.job_id == "k" and bench.state.assignment_leaves(lease, 8_000)
    bench.state.receive(1, m.JobStarted(lease), 8_000)
    for now in range(8_000, 21_000, 500):
        bench.state.receive(1, m.Heartbeat(running=(lease,)), now)
        if now == 14_000:
            bench.state.receive(1, m.JobProgress(lease, Stage.LOAD), now)
        assert ends(bench.state.tick(now)) == {}
    bench.state.receive(1, m.JobProgress(lease, Stage.RUN), 21_000)
    assert ends(bench.state.receive(1, m.JobFinished(lease, OK), 21_009)) == {"k": (OutcomeKind.OK, None)}


def test_the_queue_deadline_names_what_was_waited_for() -> None:
    state = TrackerState("t", S)
    state.submit("j", spec("arch=riscv64", queue_ms=2_000), NEEDS, "", 0)
    assert state.job("j").detail == "no device is connected"
    state.connect(1, hello(), 100)
    assert state.job("j").detail == "no connected device matches 'arch=riscv64'"
    state.receive(1, m.Heartbeat(), 1_050)
    effects = state.tick(2_000)
    assert ends(effects) == {"j": (OutcomeKind.TIMEOUT, Stage.QUEUE)}
    assert "arch=riscv64" in effects.facts[0].result.outcome.message


def test_detail_says_what_keeps_a_job_waiting(bench: Bench) -> None:
    bench.assigned("first")
    bench.state.submit("j", spec("a"), NEEDS, "", 0)
    assert bench.state.job("j").detail == "1 matching device is busy"
    bench.state.connect(2, hello("arm", arch="aarch64"), 0)
    bench.state.submit("k", spec("arm"), NEEDS, "", 0)
    assert bench.state.job("k").detail == ("no matching device can run the artifact (it is for x86_64; arm is aarch64)")
    bench.state.disconnect(2, 1)
    assert (
        bench.state.job("k").detail == "no connected device matches 'arm' (arm is offline since 1970-01-01 00:00:00Z)"
    )


def test_a_job_for_a_gpu_waits_for_a_device_that_has_one(bench: Bench) -> None:
    needs = (Need("x86_64", device=VariantDevice("cuda", "sm_80", 1024)),)
    bench.state.submit("j", spec(), needs, "", 0)
    assert bench.state.job("j").detail == (
        "no matching device can run the artifact (it is for x86_64 with cuda; a is x86_64)"
    )
    old = Accelerator("cuda", 0, "T4", arch="sm_75", max_threads=1024)
    bench.state.connect(2, with_gpu("old", old), 0)
    assert "old is x86_64 with cuda" in bench.state.job("j").detail
    effects = bench.state.connect(3, with_gpu("new", replace(old, arch="sm_90")), 0)
    assert [assign.lease.job_id for assign in bodies(effects, m.AssignJob)] == ["j"]
    assert bench.state.job("j").device == "new"


@pytest.mark.parametrize(("stage", "due"), [(Stage.TRANSFER, 7_000), (Stage.LOAD, 8_000), (Stage.RUN, 9_000)])
def test_a_stage_that_the_agent_does_not_end_is_ended_by_the_tracker(bench: Bench, stage: Stage, due: int) -> None:
    lease = bench.started()
    if stage is not Stage.TRANSFER:
        bench.state.receive(1, m.JobProgress(lease, stage), 0)
    end = due + S.deadline_slack_ms
    for now in range(900, end, 900):
        bench.state.receive(1, m.Heartbeat(running=(lease,)), now)
        assert ends(bench.state.tick(now)) == {}
    bench.state.receive(1, m.Heartbeat(running=(lease,)), end - 1)
    assert ends(bench.state.tick(end - 1)) == {}
    effects = bench.state.tick(end)
    assert ends(effects) == {"j": (OutcomeKind.TIMEOUT, stage)}
    assert [abort.lease.job_id for abort in bodies(effects, m.AbortJob)] == ["j"]
    assert bench.device() is DeviceState.BUSY, "the device still does what it should not"


def test_a_device_that_is_silent_when_a_deadline_passes_is_lost_and_the_job_not_too_slow(bench: Bench) -> None:
    lease = bench.started()
    bench.state.receive(1, m.JobProgress(lease, Stage.RUN), 0)
    for now in range(900, 9_000, 900):
        bench.state.receive(1, m.Heartbeat(running=(lease,)), now)
        assert ends(bench.state.tick(now)) == {}
    bench.state.receive(1, m.Heartbeat(running=(lease,)), 9_000)
    for now in range(9_000, 9_000 + S.lease_ms, 100):
        assert ends(bench.state.tick(now)) == {}
    assert ends(bench.state.tick(9_000 + S.lease_ms)) == {"j": (OutcomeKind.DEVICE_LOST, Stage.RUN)}


def test_cancelling_a_waiting_job_is_immediate() -> None:
    state = TrackerState("t", S)
    state.submit("j", spec(), NEEDS, "", 0)
    assert ends(state.cancel("j", "enough", 1)) == {"j": (OutcomeKind.CANCELLED, Stage.QUEUE)}
    assert state.cancel("j", "enough", 1).facts == []
    effects = state.connect(1, hello(), 2)
    assert bodies(effects, m.AssignJob) == []


def test_cancelling_a_running_job_asks_the_device_and_then_stops_waiting(bench: Bench) -> None:
    lease = bench.started()
    effects = bench.state.cancel("j", "enough", 10)
    assert [abort.reason for abort in bodies(effects, m.AbortJob)] == ["enough"]
    assert ends(effects) == {}
    bench.state.receive(1, m.Heartbeat(running=(lease,)), 900)
    bench.state.receive(1, m.Heartbeat(running=(lease,)), 1_800)
    assert ends(bench.state.tick(2_010)) == {"j": (OutcomeKind.CANCELLED, Stage.TRANSFER)}
    late = bench.state.receive(1, m.JobFinished(lease, OK), 2_020)
    assert bodies(late, m.ResultAccepted) == [m.ResultAccepted("j", stale=True)]
    assert bench.device() is DeviceState.IDLE


def test_a_result_that_beats_the_cancellation_counts(bench: Bench) -> None:
    lease = bench.started()
    bench.state.cancel("j", "enough", 10)
    assert ends(bench.state.receive(1, m.JobFinished(lease, OK), 11)) == {"j": (OutcomeKind.OK, None)}


def test_two_agents_of_one_name_do_not_share_it(bench: Bench) -> None:
    effects = bench.state.connect(2, hello("a", "other"), 0)
    (refused,) = bodies(effects, m.Refused)
    assert refused.retry and "another device is connected as 'a'" in refused.reason
    bench.state.disconnect(2, 1)
    assert bench.device() is DeviceState.IDLE


def test_the_same_agent_may_come_back_before_its_old_connection_is_found_dead(bench: Bench) -> None:
    lease = bench.started()
    effects = bench.state.connect(2, hello("a", "1", lease), 10)
    assert CloseAgent(1) in effects.sends and len(bodies(effects, m.Welcome)) == 1
    bench.state.disconnect(1, 11)
    assert bench.device() is DeviceState.BUSY


@pytest.mark.parametrize(("version", "welcome"), [(0, False), (1, True), (2, True), (3, False)])
def test_neighbouring_protocol_versions_are_accepted(version: int, welcome: bool) -> None:
    effects = TrackerState("t", S).connect(1, hello(version=version), 0)
    assert len(bodies(effects, m.Welcome if welcome else m.Refused)) == 1


@pytest.mark.parametrize("name", ["", "two words", "a,b", "x" * 101, "a=b", "a:b", "-x", "@home"])
def test_a_name_that_no_selector_could_say_is_refused(name: str) -> None:
    effects = TrackerState("t", S).connect(1, hello(name), 0)
    (refused,) = bodies(effects, m.Refused)
    assert not refused.retry


def test_after_a_restart_jobs_keep_their_place_and_their_leases(bench: Bench) -> None:
    first = bench.state.submit("first", spec(), NEEDS, "k1", 0).facts
    second = bench.state.submit("second", spec(), NEEDS, "k2", 1).facts
    records = (JobRecord(first[0], first[1], 1), JobRecord(second[0]))
    reborn = TrackerState("t", S)
    keys = (("k0", "old"), ("k1", "first"), ("k2", "second"))
    reborn.restore(Stored("t", records, (("old", 4),), keys, last_seq=7), 100)
    assert reborn.job_of_key("k0") == "old" and reborn.job_of_key("k2") == "second"
    assert [job.id for job in reborn.live_jobs()] == ["first", "second"]
    effects = reborn.connect(1, hello("a", "1", Lease("first", 1)), 200)
    assert bodies(effects, m.AssignJob) == [] == bodies(effects, m.AbortJob)
    effects = reborn.receive(1, m.JobFinished(Lease("first", 1), OK), 300)
    assert ends(effects) == {"first": (OutcomeKind.OK, None)}
    assert [assign.lease.job_id for assign in bodies(effects, m.AssignJob)] == ["second"]
    old = reborn.receive(1, m.JobFinished(Lease("old", 4), OK), 301)
    assert bodies(old, m.ResultAccepted) == [m.ResultAccepted("old", stale=False)]
    assert reborn.submit("third", spec(), NEEDS, "", 400).facts[0].seq == 8, "jobs that ended had numbers too"


@pytest.mark.parametrize(("instance", "lost"), [("1", False), ("2", True)])
def test_after_a_restart_an_assignment_that_no_agent_knows(bench: Bench, instance: str, lost: bool) -> None:
    """The same agent never received it: it is made again. Another one may have died of it: it is lost."""
    facts = bench.state.submit("j", spec(), NEEDS, "", 0).facts
    reborn = TrackerState("t", S)
    reborn.restore(Stored("t", (JobRecord(facts[0], facts[1], 1),), last_seq=1), 100)
    effects = reborn.connect(1, hello("a", instance), 200)
    assert ends(effects) == ({"j": (OutcomeKind.DEVICE_LOST, Stage.TRANSFER)} if lost else {})
    assert [assign.lease.epoch for assign in bodies(effects, m.AssignJob)] == ([] if lost else [2])


def test_after_a_restart_an_agent_that_stays_away_has_lost_its_job(bench: Bench) -> None:
    facts = bench.state.submit("j", spec(), NEEDS, "", 0).facts
    reborn = TrackerState("t", S)
    reborn.restore(Stored("t", (JobRecord(facts[0], facts[1], 1),), last_seq=1), 100)
    assert ends(reborn.tick(5_099)) == {}
    assert ends(reborn.tick(5_100)) == {"j": (OutcomeKind.DEVICE_LOST, Stage.TRANSFER)}


def test_devices_are_listed_by_selector(bench: Bench) -> None:
    bench.state.connect(2, hello("b", arch="aarch64"), 0)
    bench.state.disconnect(1, 5)
    assert [d.info.name for d in bench.state.devices()] == ["b"]
    assert [d.info.name for d in bench.state.devices(include_gone=True)] == ["a", "b"]
    assert bench.state.devices("arch=x86_64") == []
    with pytest.raises(SelectorError):
        bench.state.devices("arch=")


def test_a_lease_begins_when_its_assignment_leaves(bench: Bench) -> None:
    """Until the disk has taken the assignment, no time counts against the job."""
    effects = bench.state.submit("j", spec(), NEEDS, "", 0)
    (assign,) = bodies(effects, m.AssignJob)
    for now in range(900, 60_000, 900):
        bench.state.receive(1, m.Heartbeat(), now)
        assert bench.state.tick(now).facts == []
    assert bench.state.assignment_leaves(assign.lease, 60_000)
    bench.state.disconnect(1, 60_001)
    assert bench.state.tick(60_000 + S.lease_ms - 1).facts == []
    assert [type(f) for f in bench.state.tick(60_000 + S.lease_ms).facts] == [JobRequeued]


def test_an_assignment_that_never_left_is_not_counted_and_leaves_no_more(bench: Bench) -> None:
    (assign,) = bodies(bench.state.submit("j", spec(), NEEDS, "", 0), m.AssignJob)
    for connection in range(1, 10):
        bench.state.disconnect(connection, 5)
        effects = bench.state.connect(connection + 1, hello("a", str(connection + 1)), 10)
        assert [(f.requeues if isinstance(f, JobRequeued) else f.epoch) for f in effects.facts] == [0, connection + 1]
    assert not bench.state.assignment_leaves(assign.lease, 20)
    assert bench.state.assignment_leaves(Lease("j", 10), 20)


def test_cancelling_an_assignment_that_never_left_is_immediate(bench: Bench) -> None:
    (assign,) = bodies(bench.state.submit("j", spec(), NEEDS, "", 0), m.AssignJob)
    bench.state.submit("next", spec(), NEEDS, "", 0)
    effects = bench.state.cancel("j", "enough", 1)
    assert ends(effects) == {"j": (OutcomeKind.CANCELLED, Stage.QUEUE)}
    assert [body.lease.job_id for body in bodies(effects, m.AssignJob)] == ["next"]
    assert not bench.state.assignment_leaves(assign.lease, 2)


@pytest.mark.parametrize("ended", [False, True])
def test_a_job_that_was_refused_never_was(bench: Bench, ended: bool) -> None:
    (assign,) = bodies(bench.state.submit("j", spec(), NEEDS, "k", 0), m.AssignJob)
    if ended:
        bench.state.cancel("j", "enough", 1)
    assert bench.state.withdraw("j", "k", 2).facts == [JobWithdrawn("j")]
    assert not bench.state.assignment_leaves(assign.lease, 3)
    assert bench.state.job_of_key("k") is None and bench.state.live_jobs() == []
    assert bench.device() is DeviceState.IDLE
    waiting = TrackerState("t", S)
    waiting.submit("w", spec(), NEEDS, "k", 0)
    waiting.withdraw("w", "k", 1)
    assert bodies(waiting.connect(1, hello(), 2), m.AssignJob) == []


def test_a_job_that_was_refused_after_it_had_left_is_called_off(bench: Bench) -> None:
    (assign,) = bodies(bench.state.submit("j", spec(), NEEDS, "k", 0), m.AssignJob)
    assert bench.state.assignment_leaves(assign.lease, 0)
    effects = bench.state.withdraw("j", "k", 1)
    assert effects.facts == [JobWithdrawn("j")]
    assert [body.lease.job_id for body in bodies(effects, m.AbortJob)] == ["j"]
    assert bodies(bench.state.submit("next", spec(), NEEDS, "", 2), m.AssignJob) == [], "the device is not free yet"
    effects = bench.state.receive(1, m.JobFinished(assign.lease, JobResult(Outcome(OutcomeKind.CANCELLED))), 3)
    assert [body.stale for body in bodies(effects, m.ResultAccepted)] == [True]
    assert [body.lease.job_id for body in bodies(effects, m.AssignJob)] == ["next"] and ends(effects) == {}


def test_a_job_that_was_refused_while_its_device_is_away_is_called_off_when_that_is_back(bench: Bench) -> None:
    (assign,) = bodies(bench.state.submit("j", spec(), NEEDS, "k", 0), m.AssignJob)
    assert bench.state.assignment_leaves(assign.lease, 0)
    bench.state.disconnect(1, 1)
    assert bodies(bench.state.withdraw("j", "k", 2), m.AbortJob) == []
    effects = bench.state.connect(2, hello("a", "1", assign.lease), 3)
    assert [body.lease.job_id for body in bodies(effects, m.AbortJob)] == ["j"]
    assert bodies(bench.state.submit("next", spec(), NEEDS, "", 4), m.AssignJob) == []
    effects = bench.state.receive(2, m.JobFinished(assign.lease, JobResult(Outcome(OutcomeKind.CANCELLED))), 5)
    assert [body.lease.job_id for body in bodies(effects, m.AssignJob)] == ["next"]


def test_a_job_that_was_refused_after_its_end_leaves_nothing(bench: Bench) -> None:
    (assign,) = bodies(bench.state.submit("j", spec(), NEEDS, "k", 0), m.AssignJob)
    assert bench.state.assignment_leaves(assign.lease, 0)
    bench.state.receive(1, m.JobFinished(assign.lease, JobResult(Outcome(OutcomeKind.OK))), 1)
    effects = bench.state.withdraw("j", "k", 2)
    assert effects.facts == [JobWithdrawn("j")] and bodies(effects, m.AbortJob) == []
    assert bench.state.job_of_key("k") is None and bench.state.live_jobs() == []
    assert bench.device() is DeviceState.IDLE


def test_after_a_restart_waiting_jobs_wait_for_the_agents_to_come_back() -> None:
    """Nobody could take them while the tracker was away, and what a requeue gave them is still theirs."""
    state = TrackerState("t", S)
    (accepted,) = state.submit("j", spec(queue_ms=20_000), NEEDS, "", 0).facts
    reborn = TrackerState("t", S)
    reborn.restore(Stored("t", (JobRecord(accepted),), last_seq=1), 30_000)
    assert ends(reborn.tick(30_000 + S.lease_ms - 1)) == {}
    assert ends(reborn.tick(30_000 + S.lease_ms)) == {"j": (OutcomeKind.TIMEOUT, Stage.QUEUE)}
    again = TrackerState("t", S)
    record = JobRecord(accepted, None, 2, requeued=JobRequeued("j", 25_000, S.max_requeues))
    again.restore(Stored("t", (record,), last_seq=1), 30_000)
    assert ends(again.tick(44_999)) == {}
    again.connect(1, hello(), 44_999)
    assert again.assignment_leaves(Lease("j", 3), 44_999)
    again.disconnect(1, 45_000)
    assert ends(again.connect(2, hello("a", "2"), 45_001)) == {"j": (OutcomeKind.DEVICE_LOST, Stage.TRANSFER)}


def test_keys_that_memory_has_no_room_for_may_still_be_stored() -> None:
    state = TrackerState("t", replace(S, remembered_jobs=1))
    state.submit("j", spec(), NEEDS, "k1", 0)
    assert state.knows_all_keys
    state.submit("i", spec(), NEEDS, "k2", 0)
    assert (state.job_of_key("k1"), state.knows_all_keys) == (None, False)


# ---- Faults of devices ---------------------------------------------------------------------------------------------

PATIENT = replace(
    S, silence_ms=10**9, max_device_faults=2, quarantine_after=2, quarantine_ms=30_000, longest_quarantine_ms=100_000
)
FAULT = JobResult(Outcome(OutcomeKind.DEVICE_FAULT, Stage.RUN, message="the disk is full"))
CRASH = JobResult(Outcome(OutcomeKind.CRASH, Stage.RUN, signal=11))


class Fleet:
    """A state with devices that are connected, each under the number of its place."""

    def __init__(self, *names: str, settings: Settings = PATIENT) -> None:
        self.state = TrackerState("t", settings)
        self.names = dict(enumerate(names, 1))
        for number, name in self.names.items():
            self.state.connect(number, hello(name), 0)

    def submit(
        self, job_id: str, now: int, selector: str = "", user: str = "", artifact: int = 0
    ) -> tuple[str, Lease] | None:
        """The device that gets it at once, and under which lease."""
        wanted = spec(selector, artifact=artifact)
        return self.started(self.state.submit(job_id, wanted, NEEDS, "", now, user), now)

    def started(self, effects: Effects, now: int) -> tuple[str, Lease] | None:
        """The assignment in these effects, taken up by its device."""
        found = [s for s in effects.sends if isinstance(s, ToAgent) and isinstance(s.body, m.AssignJob)]
        if not found:
            return None
        (send,) = found
        assert self.state.assignment_leaves(send.body.lease, now)
        self.state.receive(send.connection, m.JobStarted(send.body.lease), now)
        return self.names[send.connection], send.body.lease

    def finish(self, device: str, lease: Lease, result: JobResult, now: int) -> Effects:
        number = next(number for number, name in self.names.items() if name == device)
        return self.state.receive(number, m.JobFinished(lease, result), now)

    def status(self, name: str) -> tuple[DeviceState, str]:
        found = next(d for d in self.state.devices(include_gone=True) if d.info.name == name)
        return found.state, found.detail


def test_a_job_whose_device_failed_goes_to_another_one() -> None:
    fleet = Fleet("a", "b")
    device, lease = fleet.submit("j", 0)
    effects = fleet.finish(device, lease, FAULT, 10)
    assert [type(f) for f in effects.facts] == [JobRequeued, JobAssigned]
    other, again = fleet.started(effects, 10)
    assert other != device and again.epoch == 2
    done = fleet.finish(other, again, OK, 20)
    assert ends(done) == {"j": (OutcomeKind.OK, None)}
    (changed,) = [s.job for s in done.sends if isinstance(s, JobChanged)]
    assert [(fault.device, fault.reason) for fault in changed.faults] == [(device, "the disk is full")]


def test_a_job_whose_only_device_failed_is_tried_there_again() -> None:
    fleet = Fleet("a")
    device, lease = fleet.submit("j", 0)
    assert fleet.started(fleet.finish(device, lease, FAULT, 10), 10) == ("a", Lease("j", 2, S.lease_ms))


def test_what_is_the_artifacts_fault_is_never_tried_again() -> None:
    fleet = Fleet("a", "b")
    device, lease = fleet.submit("j", 0)
    assert ends(fleet.finish(device, lease, CRASH, 10)) == {"j": (OutcomeKind.CRASH, Stage.RUN)}


def test_a_job_that_takes_two_devices_down_ends_and_they_are_forgiven() -> None:
    fleet = Fleet("a", "b", "c")
    first, lease = fleet.submit("j", 0)
    fleet.state.disconnect(1, 10)
    second, again = fleet.started(fleet.state.tick(5_000), 5_000)
    assert first == "a" and second != first
    effects = fleet.finish(second, again, FAULT, 5_100)
    assert ends(effects) == {"j": (OutcomeKind.DEVICE_FAULT, Stage.RUN)}
    message = effects.facts[0].result.outcome.message
    assert "device a: " in message and f"device {second}: the disk is full" in message and "2 devices" in message
    # Another fault would have been its second one in a row.
    other, lease = fleet.submit("k", 6_000, selector=second)
    fleet.finish(other, lease, FAULT, 6_010)
    assert fleet.status(second)[0] is not DeviceState.QUARANTINED


def test_a_device_that_fails_a_job_twice_is_not_forgiven_where_no_other_one_could_have_it() -> None:
    fleet = Fleet("a", "b", settings=replace(PATIENT, quarantine_after=3))
    for number in range(2):
        again = fleet.started(fleet.finish(*fleet.submit(f"j{number}", 0, selector="a"), FAULT, 10), 10)
        effects = fleet.finish(*again, FAULT, 20)
        assert ends(effects) == {f"j{number}": (OutcomeKind.DEVICE_FAULT, Stage.RUN)}
        message = effects.facts[0].result.outcome.message
        assert "devices" not in message and message.endswith("tried 2 times there, as no other device could have it")
    assert fleet.started(fleet.finish(*fleet.submit("k", 0, selector="a"), FAULT, 30), 30) is None
    assert fleet.status("a")[0] is DeviceState.QUARANTINED


LATE = JobResult(Outcome(OutcomeKind.TIMEOUT, Stage.TRANSFER, message="it took longer than 7 s"))
UNLOADED = JobResult(Outcome(OutcomeKind.LOAD_ERROR, Stage.LOAD, message="no such symbol"))


@pytest.mark.parametrize("result", [CRASH, UNLOADED], ids=lambda result: result.outcome.kind.value)
def test_a_device_where_jobs_of_all_users_end_badly_is_quarantined(result: JobResult) -> None:
    fleet = Fleet("a", settings=replace(PATIENT, quarantine_after=3))
    for number in range(3):
        assert fleet.status("a")[0] is DeviceState.IDLE
        fleet.finish(*fleet.submit(f"j{number}", number, user=f"u{number}", artifact=number), result, number)
    state, why = fleet.status("a")
    kind = result.outcome.kind.value.replace("_", " ")
    assert state is DeviceState.QUARANTINED and f"jobs of 3 users in a row ended badly there ({kind})" in why
    # One user, who may have his reasons, cannot keep it there.
    trial = fleet.started(fleet.state.tick(30_010), 30_010) or fleet.submit("k", 30_010, user="u0", artifact=9)
    fleet.finish(*trial, result, 30_020)
    assert fleet.status("a")[0] is DeviceState.IDLE


@pytest.mark.parametrize("users, artifacts", [(1, 9), (9, 1), (2, 9)])
def test_no_user_and_no_artifact_has_a_device_quarantined_by_failing(users: int, artifacts: int) -> None:
    fleet = Fleet("a", settings=replace(PATIENT, quarantine_after=3))
    for number in range(9):
        taken = fleet.submit(f"j{number}", number, user=f"u{number % users}", artifact=number % artifacts)
        fleet.finish(*taken, CRASH, number)
    assert fleet.status("a")[0] is DeviceState.IDLE


def test_what_goes_well_ends_every_suspicion() -> None:
    fleet = Fleet("a", settings=replace(PATIENT, quarantine_after=3))
    for number, result in enumerate((CRASH, CRASH, OK, CRASH, CRASH)):
        fleet.finish(*fleet.submit(f"j{number}", number, user=f"u{number}", artifact=number), result, number)
    assert fleet.status("a")[0] is DeviceState.IDLE


def test_a_crash_is_no_sign_of_a_devices_health() -> None:
    fleet = Fleet("a", settings=replace(PATIENT, max_device_faults=1))
    for number, result in enumerate((FAULT, CRASH, FAULT)):
        fleet.finish(*fleet.submit(f"j{number}", number), result, number)
    assert fleet.status("a")[0] is DeviceState.QUARANTINED


def test_a_job_whose_transfer_takes_too_long_goes_to_another_device_and_blames_none() -> None:
    fleet = Fleet("a", "b")
    device, lease = fleet.submit("j", 0, user="ann")
    other, again = fleet.started(fleet.finish(device, lease, LATE, 10), 10)
    assert other != device
    effects = fleet.finish(other, again, LATE, 20)
    assert ends(effects) == {"j": (OutcomeKind.TIMEOUT, Stage.TRANSFER)}
    assert "after 2 devices" in effects.facts[0].result.outcome.message
    # Another bad end would have been the second one in a row, and of another user.
    fleet.finish(*fleet.submit("k", 30, selector=device, user="bob", artifact=1), CRASH, 40)
    assert fleet.status(device)[0] is DeviceState.IDLE


def test_a_device_that_is_reserved_for_somebody_else_is_no_reason_to_wait_for_it() -> None:
    fleet = Fleet("a", "b")
    fleet.state.reserve("r", "b", "bob", 0, 3_600_000, "", 0)
    device, lease = fleet.submit("j", 0, user="ann")
    assert device == "a"
    again = fleet.started(fleet.finish(device, lease, FAULT, 10), 10)
    assert again is not None and again[0] == "a"


def test_a_device_fault_of_a_cancelled_job_is_no_sign_of_health() -> None:
    fleet = Fleet("a", settings=replace(PATIENT, max_device_faults=1))
    for job_id in ("one", "cancelled", "two"):
        device, lease = fleet.submit(job_id, 0)
        if job_id == "cancelled":
            fleet.state.cancel(job_id, "a client cancelled it", 5)
        fleet.finish(device, lease, FAULT, 10)
    assert fleet.status("a")[0] is DeviceState.QUARANTINED


def test_a_device_that_swallows_jobs_is_quarantined_and_tried_again_one_by_one() -> None:
    fleet = Fleet("a", settings=replace(PATIENT, max_device_faults=1))
    for number in range(2):
        fleet.finish(*fleet.submit(f"j{number}", number), FAULT, number)
    state, why = fleet.status("a")
    assert state is DeviceState.QUARANTINED and "2 jobs in a row failed there (the disk is full)" in why
    assert fleet.submit("k", 10) is None
    assert "quarantine" not in fleet.state.job("k").detail and "jobs in a row failed" in fleet.state.job("k").detail
    assert fleet.state.next_alarm() <= 30_001
    assert fleet.started(fleet.state.tick(29_000), 29_000) is None
    trial = fleet.started(fleet.state.tick(30_001), 30_001)
    assert trial is not None
    fleet.finish(*trial, FAULT, 30_010)  # for twice as long now
    assert fleet.submit("l", 30_020) is None
    assert fleet.started(fleet.state.tick(89_000), 89_000) is None
    trial = fleet.started(fleet.state.tick(90_010), 90_010)
    assert ends(fleet.finish(*trial, OK, 90_020)) == {"l": (OutcomeKind.OK, None)}
    for number in range(2):
        assert fleet.submit(f"m{number}", 91_000) is not None or number


def test_a_device_that_says_it_is_ill_gets_nothing_until_it_is_well() -> None:
    fleet = Fleet("a")
    hot = m.Heartbeat(Health(temperature_celsius=91.0, problems=("91 degrees, at most 85 are allowed",)))
    fleet.state.receive(1, hot, 10)
    assert fleet.status("a") == (DeviceState.QUARANTINED, "unhealthy: 91 degrees, at most 85 are allowed")
    assert fleet.submit("j", 20) is None
    assert fleet.started(fleet.state.receive(1, m.Heartbeat(Health(temperature_celsius=60.0)), 30), 30)[0] == "a"


def test_a_device_that_is_ill_gets_no_job_by_connecting_again() -> None:
    ill = Health(problems=("91 degrees, at most 85 are allowed",))
    fleet = Fleet("a")
    fleet.state.receive(1, m.Heartbeat(ill), 10)
    fleet.state.disconnect(1, 20)
    assert fleet.submit("j", 30) is None
    older = replace(hello(), health=None)
    assert fleet.started(fleet.state.connect(1, older, 40), 40) is None
    assert "91 degrees" in fleet.status("a")[1]
    assert fleet.started(fleet.state.connect(1, replace(hello(), health=ill), 50), 50) is None
    assert fleet.started(fleet.state.connect(1, hello(), 60), 60) is not None


def test_a_device_of_which_nothing_is_known_gets_no_job_before_its_first_heartbeat() -> None:
    fleet = Fleet()
    fleet.names[1] = "a"
    fleet.state.connect(1, replace(hello(), health=None), 0)
    assert fleet.submit("j", 10) is None
    assert fleet.status("a") == (DeviceState.QUARANTINED, "its agent has not said yet how it is")
    assert fleet.started(fleet.state.receive(1, m.Heartbeat(), 20), 20) is not None


def test_maintenance_lets_the_job_end_and_gives_no_other_until_it_is_over() -> None:
    fleet = Fleet("a")
    device, lease = fleet.submit("j", 0)
    fleet.state.start_maintenance("a", "a new fan", "root", 10)
    state, why = fleet.status("a")
    assert state is DeviceState.MAINTENANCE and "by root: a new fan" in why
    assert ends(fleet.finish(device, lease, OK, 20)) == {"j": (OutcomeKind.OK, None)}
    assert fleet.submit("k", 30) is None and "a new fan" in fleet.state.job("k").detail
    assert fleet.started(fleet.state.end_maintenance("a", 40), 40)[0] == "a"


def test_a_clock_that_was_set_back_makes_no_restored_job_wait_for_longer() -> None:
    (accepted,) = TrackerState("t", S).submit("j", spec(queue_ms=10_000), NEEDS, "", 1_000_000).facts
    reborn = TrackerState("t", S)
    reborn.restore(Stored("t", (JobRecord(accepted),), last_seq=1), 5_000)
    assert ends(reborn.tick(15_000)) == {"j": (OutcomeKind.TIMEOUT, Stage.QUEUE)}


def test_maintenance_and_reservations_survive_a_restart() -> None:
    fleet = Fleet("a", "b")
    facts = list(fleet.state.start_maintenance("a", "a new fan", "root", 10).facts)
    reservation, effects = fleet.state.reserve("r", "b", "ann", 0, 60_000, "a demo", 20)
    reborn = TrackerState("t", PATIENT)
    reborn.restore(Stored("t", serviced=tuple(facts), reservations=(reservation,)), 30)
    fleet.state = reborn
    for number, name in fleet.names.items():
        reborn.connect(number, hello(name), 40)
    assert fleet.submit("j", 50, user="bob") is None
    assert fleet.submit("k", 60, user="ann")[0] == "b"
    assert [type(f) for f in effects.facts] == [Reserved]


# ---- Shares of users -----------------------------------------------------------------------------------------------


def test_users_share_a_device_by_the_time_they_had_it() -> None:
    fleet = Fleet("a")
    for number in range(6):
        fleet.state.submit(f"long{number}", spec(), NEEDS, "", 0, "ann")
    for number in range(6):
        fleet.state.submit(f"short{number}", spec(), NEEDS, "", 0, "bob")
    order, now = [], 0
    running = fleet.started(fleet.state.tick(0), 0) or ("a", Lease("long0", 1, S.lease_ms))
    fleet.state.assignment_leaves(running[1], 0)
    for _ in range(8):
        now += 4_000 if running[1].job_id.startswith("long") else 1_000
        fleet.state.receive(1, m.Heartbeat(running=(running[1],)), now)
        order.append(running[1].job_id)
        running = fleet.started(fleet.finish(*running, OK, now), now)
    assert order == ["long0", "short0", "short1", "short2", "short3", "long1", "short4", "short5"]


def test_a_user_who_waits_in_vain_does_not_hold_up_the_others() -> None:
    fleet = Fleet("a")
    assert fleet.submit("j", 0, selector="nobody", user="ann") is None
    assert fleet.submit("k", 0, user="bob")[0] == "a"


def test_a_queued_job_knows_its_place_and_about_when_it_starts() -> None:
    fleet = Fleet("a", "b")
    for number in range(2):
        fleet.submit(f"j{number}", 0)
    fleet.submit("k0", 0)
    assert (fleet.state.job("k0").position, fleet.state.job("k0").eta_ms) == (1, None), "nothing has ended yet"
    running = fleet.started(fleet.finish("a", Lease("j0", 1), OK, 4_000), 4_000)
    assert running[1].job_id == "k0"
    for number in range(1, 4):
        fleet.submit(f"k{number}", 4_000)
    waits = [(fleet.state.job(f"k{n}").position, fleet.state.job(f"k{n}").eta_ms) for n in range(1, 4)]
    # b is due now and a in 4 s; each job is expected to take 4 s.
    assert waits == [(1, 0), (2, 4_000), (3, 6_000)]
    fleet.submit("elsewhere", 4_000, selector="nobody")
    assert fleet.state.job("elsewhere").position == 1, "those who want other devices are not before it"
    assert fleet.state.job("elsewhere").eta_ms is None


# ---- Reservations --------------------------------------------------------------------------------------------------


def test_a_reserved_device_is_its_users_alone_until_the_time_is_over() -> None:
    fleet = Fleet("a")
    reservation, _ = fleet.state.reserve("r", "", "ann", 0, 10_000, "a demo", 100)
    assert (reservation.device, reservation.until_unix_ms) == ("a", 10_100)
    assert fleet.submit("j", 200, user="bob") is None
    assert "reserved for ann" in fleet.state.job("j").detail
    device, lease = fleet.submit("k", 300, user="ann")
    fleet.finish(device, lease, OK, 400)
    assert fleet.state.next_alarm() <= 10_100
    effects = fleet.state.tick(10_100)
    assert [type(f) for f in effects.facts] == [ReservationEnded, JobAssigned]


def test_a_reservation_that_is_given_up_lets_the_others_in() -> None:
    fleet = Fleet("a")
    fleet.state.reserve("r", "", "ann", 0, 10_000, "", 100)
    assert fleet.submit("j", 200, user="bob") is None
    assert fleet.started(fleet.state.end_reservation("r", 300), 300)[0] == "a"


def test_a_later_reservation_leaves_the_device_free_until_then() -> None:
    fleet = Fleet("a")
    fleet.state.reserve("r", "", "ann", 5_000, 10_000, "", 100)
    assert fleet.submit("j", 200, user="bob") is not None
    with pytest.raises(NoDeviceError, match="can be reserved for that time"):
        fleet.state.reserve("s", "a", "bob", 0, 5_001, "", 300)
    fleet.state.reserve("s", "a", "bob", 0, 4_000, "", 300)


@pytest.mark.parametrize(("begin", "duration"), [(0, 0), (0, S.max_reservation_ms + 1), (1, 50)])
def test_reservations_that_make_no_sense(begin: int, duration: int) -> None:
    fleet = Fleet("a")
    with pytest.raises(UsageError, match="has to end in the future"):
        fleet.state.reserve("r", "", "ann", begin, duration, "", 100)
    assert fleet.state.reservations() == []


def test_a_user_may_have_only_so_many_reservations() -> None:
    fleet = Fleet("a", "b", settings=replace(PATIENT, max_reservations_per_user=1))
    fleet.state.reserve("r", "", "ann", 0, 1_000, "", 0)
    with pytest.raises(UsageError, match="ann has 1 reservations already"):
        fleet.state.reserve("s", "", "ann", 0, 1_000, "", 0)


def test_a_reservation_that_has_not_begun_is_shown() -> None:
    fleet = Fleet("a", "b", "c")
    later, _ = fleet.state.reserve("later", "a", "ann", 50_000, 1_000, "", 0)
    next_one, _ = fleet.state.reserve("next", "a", "bob", 5_000, 10_000, "", 0)
    (a, b, _) = fleet.state.devices()
    assert (a.reservation, a.upcoming, b.upcoming) == (None, (next_one, later), ())
    fleet.state.tick(5_000)
    assert (fleet.state.devices()[0].reservation, fleet.state.devices()[0].upcoming) == (next_one, (later,))


def test_a_user_leaves_half_of_the_devices_to_the_others() -> None:
    fleet = Fleet("a", "b", "c", settings=replace(PATIENT, max_reservation_ms=1_000))
    for number, name in enumerate("ab"):
        fleet.state.reserve(f"r{number}", name, "ann", 10, 1_000, "", 0)
    with pytest.raises(UsageError, match="ann has 2 of 3 devices reserved for that time already"):
        fleet.state.reserve("s", "c", "ann", 1_009, 1_000, "", 0)
    fleet.state.reserve("another time", "c", "ann", 1_010, 1_000, "", 0)
    fleet.state.reserve("another user", "c", "bob", 10, 1_000, "", 0)
    fleet.state.reserve("an administrator", "b", "ann", 1_010, 1_000, "", 0, shares=False)


def test_a_user_has_no_device_for_longer_by_reserving_it_again_and_again() -> None:
    fleet = Fleet("a", settings=replace(PATIENT, max_reservation_ms=1_000))
    fleet.state.reserve("r", "a", "ann", 10, 700, "", 0)
    with pytest.raises(NoDeviceError, match="nobody has one for longer than 1 s in all"):
        fleet.state.reserve("s", "a", "ann", 5_000, 301, "", 0)
    fleet.state.reserve("t", "a", "ann", 5_000, 300, "", 0)
    fleet.state.reserve("u", "a", "bob", 6_000, 1_000, "", 0)


def test_a_device_that_is_gone_may_be_reserved_for_later_alone() -> None:
    fleet = Fleet("a")
    fleet.state.disconnect(1, 10)
    with pytest.raises(NoDeviceError):
        fleet.state.reserve("r", "a", "ann", 0, 1_000, "", 20)
    assert fleet.state.reserve("s", "a", "ann", 5_000, 1_000, "", 20)[0].device == "a"


def test_devices_that_are_off_are_known_until_they_are_revoked() -> None:
    fleet = Fleet("a", "b")
    notes = fleet.state.disconnect(1, 10_000).notes
    assert notes == [DeviceSeen(hello("a").device, 10_000)]
    assert fleet.state.receive(2, m.Heartbeat(), 20_000).notes == [], "only who comes or goes is written down"
    seen = (DeviceSeen(hello("b").device, 0), *notes)
    state = TrackerState("t", PATIENT)
    state.restore(Stored("t", devices=seen), 30_000)
    assert state.devices() == []
    (a,) = state.devices("name=a,arch=x86_64", include_gone=True)
    assert (a.state, a.last_seen_unix_ms, a.info) == (DeviceState.GONE, 10_000, hello("a").device)
    state.submit("j", spec("a"), NEEDS, "", 30_000)
    when = "(a is offline; it last came or left at 1970-01-01 00:00:10Z)"
    assert state.job("j").detail == f"no device is connected {when}"
    state.connect(1, hello("b"), 30_000)
    assert state.job("j").detail == f"no connected device matches 'a' {when}"
    assert state.job("j").state is JobState.QUEUED
    state.start_maintenance("a", "a new fan", "root", 30_000)
    forgotten = state.forget_device("a", 30_000)
    assert (forgotten.facts, forgotten.notes) == ([ServiceEnded("a")], [DeviceForgotten("a")])
    assert state.forget_device("b", 30_000).notes == [] and state.device_named("b"), "it is still there"
    assert state.disconnect(1, 40_000).notes == [DeviceForgotten("b")]
    assert state.devices(include_gone=True) == []
    state.connect(2, hello("b"), 50_000)
    assert state.disconnect(2, 60_000).notes == [DeviceSeen(hello("b").device, 60_000)], "it was let in again"


def test_of_devices_that_are_off_so_many_are_remembered() -> None:
    fleet = Fleet("a", "b", settings=replace(PATIENT, remembered_devices=1))
    fleet.state.disconnect(2, 10)
    assert fleet.state.disconnect(1, 20).notes == [DeviceSeen(hello("a").device, 20), DeviceForgotten("b")]


def test_a_revoked_device_gets_nothing_more_while_its_connection_ends() -> None:
    fleet = Fleet("a")
    fleet.state.start_maintenance("a", "drained", "root", 0)
    fleet.state.submit("j", spec("name=a"), NEEDS, "", 0)
    revoked = fleet.state.forget_device("a", 10)
    assert revoked.facts == [ServiceEnded("a")] and bodies(revoked, m.AssignJob) == []
    assert bodies(fleet.state.receive(1, m.Heartbeat(), 20), m.AssignJob) == []
    assert fleet.state.job("j").detail.endswith("(a is revoked, and about to be disconnected)")
    with pytest.raises(NoDeviceError):
        fleet.state.reserve("r", "a", "ann", 5_000, 1_000, "", 20)
    fleet.state.disconnect(1, 30)
    assert [assign.lease.job_id for assign in bodies(fleet.state.connect(2, hello("a"), 40), m.AssignJob)] == ["j"], (
        "it was let in again"
    )


def test_devices_in_maintenance_or_reserved_are_there_after_a_restart_though_they_are_off() -> None:
    fleet = Fleet("a", "b", "c")
    serviced = tuple(fleet.state.start_maintenance("a", "a new fan", "root", 10).facts)
    reservation, _ = fleet.state.reserve("r", "b", "ann", 50_000, 60_000, "a demo", 20)
    state = TrackerState("t", PATIENT)
    state.restore(Stored("t", serviced=serviced, reservations=(reservation,)), 30)
    assert state.devices() == [] and state.devices("arch=x86_64", include_gone=True) == []
    a, b = state.devices(include_gone=True)
    assert (a.info.name, a.state, b.info.name, b.state) == ("a", DeviceState.GONE, "b", DeviceState.GONE)
    assert "by root: a new fan" in a.detail and b.detail == "not connected since the tracker was started"
    assert b.upcoming == (reservation,)
    assert [state.device_named(name) for name in "abc"] == [True, True, False]
    state.end_maintenance("a", 40)
    assert [status.info.name for status in state.devices(include_gone=True)] == ["b"]
    state.connect(1, hello("b"), 50)
    assert [status.state for status in state.devices(include_gone=True)] == [DeviceState.IDLE]


def test_a_lease_that_was_handed_out_and_not_stored_is_never_given_again(bench: Bench) -> None:
    """The tracker was killed in between. What its device says under that lease must not count for the next one."""
    accepted = next(
        fact for fact in bench.state.submit("j", spec(), NEEDS, "", 0).facts if isinstance(fact, JobAccepted)
    )
    state = TrackerState("t", S)
    state.restore(Stored("t", (JobRecord(accepted),), (), (), 1), 10)
    effects = state.connect(1, hello("a", "1", Lease("j", 1)), 20)
    assert bodies(effects, m.AbortJob) == [m.AbortJob(Lease("j", 1), "the lease is not current")]
    effects = state.receive(1, m.JobFinished(Lease("j", 1), OK), 30)
    assert bodies(effects, m.ResultAccepted) == [m.ResultAccepted("j", stale=True)]
    (assign,) = bodies(effects, m.AssignJob)
    assert assign.lease.epoch == 2
    cancelled = JobResult(Outcome(OutcomeKind.CANCELLED, message="the lease is not current"))
    assert ends(state.receive(1, m.JobFinished(Lease("j", 1), cancelled), 40)) == {}
    assert ends(state.receive(1, m.JobFinished(assign.lease, OK), 50)) == {"j": (OutcomeKind.OK, None)}
