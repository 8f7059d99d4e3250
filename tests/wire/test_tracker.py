"""A real tracker on a real socket, and an agent that speaks the real protocol."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kedge.protos.v1 import blobs_pb2, blobs_pb2_grpc, fleet_pb2, fleet_pb2_grpc, types_pb2
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import (
    BadDigestError,
    BlobStore,
    CorruptBlobError,
    MissingBlobError,
    UploadOffsetError,
    blob_of,
)
from kedge.rpc.client import Fleet, Job, connect
from kedge.rpc.client.plan import pack
from kedge.rpc.errors import ArtifactError, ConnectError, InputError, JobError, NoDeviceError
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.selector import SelectorError
from kedge.rpc.status import NotReadyError, UnknownJobError, from_rpc_error
from kedge.rpc.tracker.schema import StoreError
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import CHUNK_BYTES, open_channel
from kedge.rpc.types import Blob, Deadlines, DeviceState, JobResult, JobState, Lease
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.ports import free_ports
from support.toys import QUICK, device_info, make_artifact, spec_message

X = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture
def agent(tracker: RunningTracker) -> Iterator[FakeAgent]:
    with FakeAgent(tracker.address, device_info()) as agent:
        yield agent


class Seen(Exception):
    """What was waited for has happened."""


def until(job: Job, state: JobState) -> None:
    """Wait until a job is in this state."""

    def progress(now: Any) -> None:
        if now.state is state:
            raise Seen

    with pytest.raises(Seen):
        job.wait(timeout=60, progress=progress)


def test_a_drained_device_that_is_off_is_there_when_the_tracker_comes_back(tmp_path: Path) -> None:
    begun_ms = time.time_ns() // 1_000_000
    with (
        start(port=0, data_dir=tmp_path, insecure_loopback=True) as tracker,
        FakeAgent(tracker.address, device_info()),
        connect(tracker.address) as fleet,
    ):
        fleet.set_maintenance("bench-1", reason="a new fan")
    with start(port=0, data_dir=tmp_path, insecure_loopback=True) as tracker, connect(tracker.address) as fleet:
        (left,) = fleet.devices(include_gone=True)
        assert (left.info.name, left.state) == ("bench-1", DeviceState.GONE)
        assert begun_ms <= left.last_seen_unix_ms <= time.time_ns() // 1_000_000
        assert "a new fan" in left.detail
        assert fleet.set_maintenance("bench-1", False).state is DeviceState.GONE
        (left,) = fleet.devices(include_gone=True)
        assert "a new fan" not in left.detail
        with pytest.raises(NoDeviceError, match="'bench-2' is known"):
            fleet.set_maintenance("bench-2")


def test_a_drained_device_of_which_no_more_is_known_is_listed_until_it_is_resumed(tmp_path: Path) -> None:
    forgetful = start(port=0, data_dir=tmp_path, insecure_loopback=True, settings=replace(QUICK, remembered_devices=0))
    with forgetful as tracker, connect(tracker.address) as fleet:
        with FakeAgent(tracker.address, device_info()):
            fleet.set_maintenance("bench-1", reason="a new fan")
        wait_for(lambda: fleet.devices(include_gone=True)[0].info != device_info(), "the device to be forgotten")
    with start(port=0, data_dir=tmp_path, insecure_loopback=True) as tracker, connect(tracker.address) as fleet:
        (left,) = fleet.devices(include_gone=True)
        assert (left.info.name, left.state, left.last_seen_unix_ms) == ("bench-1", DeviceState.GONE, 0)
        assert "a new fan" in left.detail
        assert fleet.set_maintenance("bench-1", False).state is DeviceState.GONE
        assert fleet.devices(include_gone=True) == []


# ---- Jobs ----------------------------------------------------------------------------------------------------------


def test_a_job_from_submission_to_result(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    job = fleet.run(artifact, {"x": X}, device="bench-1", threads=2)
    assigned = agent.expect(m.AssignJob)
    assert (assigned.lease.job_id, assigned.lease.epoch, assigned.spec.num_threads) == (job.id, 1, 2)
    assert job.status().state is JobState.ASSIGNED
    assert [(d.state, d.running_job_id) for d in fleet.devices()] == [(DeviceState.BUSY, job.id)]
    agent.finish(assigned)
    assert agent.expect(m.ResultAccepted) == m.ResultAccepted(job.id, stale=False)
    result = job.wait()
    np.testing.assert_array_equal(result["x_out"], X)
    assert result.device == "bench-1" and result.timing is None
    status = job.status()
    assert status.state is JobState.DONE and status.spec.task.inputs[0].data == X.tobytes()
    assert [d.state for d in fleet.devices()] == [DeviceState.IDLE]


def test_a_result_with_too_much_in_it_ends_the_job_and_not_the_connection(
    fleet: Fleet, agent: FakeAgent, artifact: Artifact
) -> None:
    """An agent of an older kedge would bring it again on every connection, until nobody waited for it."""
    job = fleet.run(artifact, {"x": X})
    assigned = agent.expect(m.AssignJob)
    agent.say(m.JobStarted(assigned.lease))
    result = agent.result(assigned.spec)
    named = tuple(replace(each, name="y" * 1_001) for each in result.outputs)
    agent.say(m.JobFinished(assigned.lease, replace(result, outputs=named)))
    assert agent.expect(m.ResultAccepted) == m.ResultAccepted(job.id, stale=False)
    with pytest.raises(JobError, match=r"not accepted: Tensor\.name has 1001 characters") as refused:
        job.wait()
    assert refused.value.outcome == "bad_request"
    next_job = fleet.run(artifact, {"x": X})
    agent.finish(agent.expect(m.AssignJob))
    assert next_job.wait().outcome.ok


def test_every_change_is_reported_to_whoever_waits(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    first = fleet.run(artifact, {"x": X})
    job = fleet.run(artifact, {"x": X})
    blocked, seen = threading.Event(), []

    def progress(now: Any) -> None:
        seen.append((now.state.value, now.stage and now.stage.value, now.detail))
        blocked.set()

    waiter = threading.Thread(target=lambda: job.wait(progress=progress))
    waiter.start()
    assert blocked.wait(60)
    agent.finish(agent.expect(m.AssignJob))
    agent.expect(m.ResultAccepted)
    agent.finish(agent.expect(m.AssignJob))
    waiter.join(60)
    assert seen == [
        ("queued", None, "1 matching device is busy"),
        ("assigned", None, ""),
        ("running", "transfer", ""),
        ("running", "run", ""),
        ("done", None, ""),
    ]
    assert first.wait().outcome.ok


def test_the_same_key_gives_the_same_job(tracker: RunningTracker, fleet: Fleet, artifact: Artifact) -> None:
    fleet.upload(pack(artifact).json)
    for _, data in artifact.blobs():
        fleet.upload(data)
    with open_channel(tracker.address) as channel:
        stub: Any = fleet_pb2_grpc.FleetStub(channel)
        request = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact), idempotency_key="once")
        first, second = stub.SubmitJob(request), stub.SubmitJob(request)
        other = stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=spec_message(artifact), idempotency_key="twice"))
    assert (first.existed, second.existed, other.existed) == (False, True, False)
    assert first.job.id == second.job.id != other.job.id
    assert len(fleet.jobs()) == 2


def test_the_same_key_gives_the_same_result(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    fleet._ensure_uploaded(pack(artifact))
    request = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact), idempotency_key="once")
    run = fleet._stub.RunJob(request)
    job_id, assigned = next(run).job_id, agent.expect(m.AssignJob)
    again = fleet._stub.RunJob(request)
    assert next(again).job_id == job_id, "while it is under way"
    agent.finish(assigned)
    results = [list(run), list(again), list(fleet._stub.RunJob(request))[1:]]
    assert results[0] == results[1] == results[2] and len(results[0]) == 1, "and when it is done"
    assert results[0][0].result.outcome.kind == types_pb2.OUTCOME_KIND_OK
    assert [job.id for job in fleet.jobs()] == [job_id]


def test_a_key_is_known_however_old_it_is(tmp_path: Path, artifact: Artifact) -> None:
    """Memory holds the newest ones only, here three."""
    settings = replace(QUICK, remembered_jobs=3)
    request = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact))

    def submit(stub: Any, key: str) -> tuple[str, bool]:
        request.idempotency_key = key
        answer = stub.SubmitJob(request, timeout=60)
        return answer.job.id, answer.existed

    with (
        start(port=0, data_dir=tmp_path, settings=settings, insecure_loopback=True) as tracker,
        connect(tracker.address) as fleet,
    ):
        fleet._ensure_uploaded(pack(artifact))
        first, _ = submit(fleet._stub, "nightly")
        others = [submit(fleet._stub, key) for key in "abcd"]
        assert submit(fleet._stub, "nightly") == (first, True)
    with (
        start(port=0, data_dir=tmp_path, settings=settings, insecure_loopback=True) as tracker,
        connect(tracker.address) as fleet,
    ):
        assert submit(fleet._stub, "nightly") == (first, True)
        assert submit(fleet._stub, "a") == (others[0][0], True)
        assert len(fleet.jobs()) == 5


def test_blobs_have_to_be_there_before_the_job(tracker: RunningTracker, fleet: Fleet, artifact: Artifact) -> None:
    def submit(spec: Any) -> Exception:
        with open_channel(tracker.address) as channel:
            stub: Any = fleet_pb2_grpc.FleetStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=spec))
            if isinstance(error := from_rpc_error(caught.value), NotReadyError):
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            return error

    error = submit(spec_message(artifact))
    assert isinstance(error, NotReadyError) and pack(artifact).blob.digest in str(error)
    fleet.upload(pack(artifact).json)
    error = submit(spec_message(artifact))
    parts = {blob for blob, _ in artifact.blobs()}
    assert isinstance(error, NotReadyError) and f"{len(parts)} of {len(parts) + 1} blobs are missing" in str(error)
    assert all(part.digest in str(error) for part in parts)
    for _, data in artifact.blobs():
        fleet.upload(data)
    missing = spec_message(artifact)
    missing.run.inputs[0].blob.digest = "f" * 64
    missing.run.inputs[0].blob.size_bytes = X.nbytes
    error = submit(missing)
    assert isinstance(error, NotReadyError) and "inputs: 1 of 1" in str(error) and "f" * 64 in str(error)
    short = spec_message(artifact)
    short.run.inputs[0].inline = b"123"
    assert isinstance(submit(short), InputError)
    endless = spec_message(artifact)
    endless.bench.inputs.extend(endless.run.inputs)
    endless.bench.options.repeat = 3_000_000
    assert isinstance(error := submit(endless), InputError) and "repeat is 3000000" in str(error)
    patient = spec_message(artifact)
    patient.deadlines.run_ms = 1 << 62
    assert isinstance(error := submit(patient), InputError) and "run_ms" in str(error)
    unknown = spec_message(artifact)
    unknown.function = "nope"
    assert isinstance(submit(unknown), ArtifactError)
    unreadable = spec_message(artifact)
    unreadable.selector = "arch="
    assert isinstance(submit(unreadable), SelectorError)
    garbage = spec_message(artifact)
    garbage.manifest.CopyFrom(convert.blob_to_pb(fleet.upload(b"not a manifest")))
    assert isinstance(submit(garbage), ArtifactError)
    assert fleet.jobs() == []


def test_a_selector_nobody_matches_waits_and_then_times_out(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    waiting = fleet.run(artifact, {"x": X}, device="arch=riscv64")
    assert waiting.status().detail == "no connected device matches 'arch=riscv64'"
    job = fleet.run(artifact, {"x": X}, device="arch=riscv64", deadlines=Deadlines(queue_ms=300))
    with pytest.raises(JobError, match=r"timeout in stage queue: it waited 0\.3 s") as caught:
        job.wait()
    assert caught.value.outcome == "timeout"


def test_priority_then_order(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    jobs = [fleet.run(artifact, {"x": X}, priority=priority) for priority in (0, 0, 5, 1)]
    ran = []
    for _ in jobs:
        assigned = agent.expect(m.AssignJob)
        ran.append(assigned.lease.job_id)
        agent.finish(assigned)
        agent.expect(m.ResultAccepted)
    assert ran == [jobs[0].id, jobs[2].id, jobs[3].id, jobs[1].id]


def test_an_artifact_goes_only_where_it_can_run(tracker: RunningTracker, fleet: Fleet) -> None:
    with (
        FakeAgent(tracker.address, device_info("x86")),
        FakeAgent(tracker.address, device_info("arm", "aarch64")) as arm,
    ):
        job = fleet.run(make_artifact("aarch64"), {"x": X})
        arm.finish(arm.expect(m.AssignJob))
        assert job.wait().device == "arm"


def test_cancelling(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    running, waiting = fleet.run(artifact, {"x": X}), fleet.run(artifact, {"x": X})
    assigned = agent.expect(m.AssignJob)
    assert waiting.cancel().state is JobState.DONE
    agent.say(m.JobStarted(assigned.lease))
    assert running.cancel().state is not JobState.DONE
    assert agent.expect(m.AbortJob).lease.job_id == running.id
    agent.say(m.JobFinished(assigned.lease, JobResult(Outcome(OutcomeKind.CANCELLED, Stage.RUN))))
    for job in (running, waiting):
        assert job.wait(check=False).outcome.kind is OutcomeKind.CANCELLED
    assert running.cancel().result is not None, "cancelling what is done changes nothing"


def test_outcomes_arrive_as_they_are(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    job = fleet.run(artifact, {"x": X})
    lease = agent.expect(m.AssignJob).lease
    agent.say(m.JobFinished(lease, JobResult(Outcome(OutcomeKind.CRASH, Stage.RUN, signal=11, message="boom"))))
    with pytest.raises(JobError, match=r"on bench-1: crash \(SIGSEGV\) in stage run: boom") as caught:
        job.wait()
    assert caught.value.outcome == "crash"
    assert job.wait(check=False).outcome.signal == 11


def test_jobs_are_listed_newest_first_without_tensors(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    done = fleet.run(artifact, {"x": X})
    agent.finish(agent.expect(m.AssignJob))
    done.wait()
    live, waiting = fleet.run(artifact, {"x": X}), fleet.run(artifact, {"x": X})
    lease = agent.expect(m.ResultAccepted) and agent.expect(m.AssignJob).lease
    agent.say(m.JobStarted(lease))
    until(live, JobState.RUNNING)
    jobs = fleet.jobs()
    assert [(j.id, j.state.value) for j in jobs] == [(waiting.id, "queued"), (live.id, "running"), (done.id, "done")]
    assert all(j.spec.task.inputs == () for j in jobs) and jobs[2].result is not None
    assert jobs[2].result.outputs == ()
    assert [j.id for j in fleet.jobs(states=(JobState.RUNNING,))] == [live.id]
    assert [j.id for j in fleet.jobs(limit=1)] == [waiting.id]
    assert len(fleet._stub.ListJobs(fleet_pb2.ListJobsRequest(limit=-1)).jobs) == 1, "there is no way to ask for all"


def test_a_list_of_benches_fits_into_a_message(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    """Each of them has samples of 8 MB."""
    for _ in range(3):
        job = fleet.bench(artifact, {"x": X}, repeat=7)
        assigned = agent.expect(m.AssignJob)
        with agent.holding(assigned.lease):
            result = agent.result(assigned.spec)
            assert result.measurement is not None
            measured = replace(result.measurement, samples_ns=(1.5,) * 1_000_000)
            agent.say(m.JobFinished(assigned.lease, replace(result, measurement=measured)))
            agent.expect(m.ResultAccepted)
    listed = fleet.jobs()
    assert [len(j.result.measurement.samples_ns) for j in listed if j.result and j.result.measurement] == [0, 0, 0]
    timing = fleet.job(job.id).wait().timing
    assert timing is not None and len(timing.samples_ns) == 1_000_000


def test_an_unknown_job_is_an_error_of_its_own(fleet: Fleet) -> None:
    with pytest.raises(UnknownJobError, match="'nope'"):
        fleet.job("nope")


# ---- Agents --------------------------------------------------------------------------------------------------------


def test_the_tracker_welcomes_and_lists_a_device(tracker: RunningTracker, fleet: Fleet) -> None:
    agent = FakeAgent(tracker.address, device_info(rack="a"))
    welcome = agent.connect()
    assert isinstance(welcome, m.Welcome) and welcome.heartbeat_interval_ms == QUICK.heartbeat_interval_ms
    assert fleet.wait_for_device("rack=a", timeout=60).info == agent.info
    agent.drop()
    gone = fleet.devices(include_gone=True)
    assert [d.info.name for d in gone] == ["bench-1"]


def test_an_agent_that_comes_back_goes_on_with_its_job(fleet: Fleet, agent: FakeAgent, artifact: Artifact) -> None:
    job = fleet.run(artifact, {"x": X})
    assigned = agent.expect(m.AssignJob)
    agent.say(m.JobStarted(assigned.lease))
    until(job, JobState.RUNNING)
    agent.drop()
    agent.connect(assigned.lease)
    agent.finish(assigned)
    assert agent.expect(m.ResultAccepted).stale is False
    assert job.wait().device == "bench-1"


def test_an_agent_that_stays_away_loses_its_job_and_may_try_once_more(
    fleet: Fleet, agent: FakeAgent, artifact: Artifact
) -> None:
    job = fleet.run(artifact, {"x": X})
    assigned = agent.expect(m.AssignJob)
    agent.say(m.JobStarted(assigned.lease))
    until(job, JobState.RUNNING)
    agent.drop()
    until(job, JobState.QUEUED)
    assert "nothing was heard of it" in job.status().detail
    agent.connect(assigned.lease)
    assert agent.expect(m.AbortJob).lease.epoch == assigned.lease.epoch
    agent.finish(assigned)
    assert agent.expect(m.ResultAccepted).stale is True
    again = agent.expect(m.AssignJob)
    assert again.lease.epoch == assigned.lease.epoch + 1
    agent.say(m.JobStarted(again.lease))
    until(job, JobState.RUNNING)
    agent.drop()
    with pytest.raises(JobError, match="device lost") as caught:
        job.wait(timeout=60)
    assert caught.value.outcome == "device_lost"
    assert len(job.status().faults) == 2


def test_another_agent_takes_over_a_job_that_never_began(
    tracker: RunningTracker, fleet: Fleet, artifact: Artifact
) -> None:
    first = FakeAgent(tracker.address, device_info("first"))
    first.connect()
    job = fleet.run(artifact, {"x": X})
    first.expect(m.AssignJob)
    with FakeAgent(tracker.address, device_info("second"), work=echo):
        first.drop()
        assert job.wait(timeout=60).device == "second"


def test_a_name_in_use_is_refused(tracker: RunningTracker, agent: FakeAgent) -> None:
    other = FakeAgent(tracker.address, agent.info)
    refused = other.connect()
    assert isinstance(refused, m.Refused) and refused.retry and "bench-1" in refused.reason
    other.ended()
    agent.say(m.Heartbeat())
    other.drop()


def test_an_agent_of_a_distant_version_is_refused_until_one_of_the_two_is_updated(tracker: RunningTracker) -> None:
    agent = FakeAgent(tracker.address, device_info())
    refused = agent.connect(hello=m.Hello(convert.t.Protocol(9), agent.info, "i"))
    assert isinstance(refused, m.Refused) and refused.retry and "protocol 9" in refused.reason
    agent.ended()
    agent.drop()


def test_an_agent_has_to_say_hello_first(tracker: RunningTracker) -> None:
    agent = FakeAgent(tracker.address, device_info())
    agent.connect(hello=m.Heartbeat())  # type: ignore[arg-type]
    agent.ended()
    assert "say hello first" in agent.status.details()
    agent.drop()


def test_a_stale_lease_in_a_heartbeat_is_called_back(agent: FakeAgent) -> None:
    agent.say(m.Heartbeat(running=(Lease("ghost", 4),)))
    assert agent.expect(m.AbortJob).lease == Lease("ghost", 4)


# ---- Blobs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def blobs(tracker: RunningTracker) -> Iterator[BlobClient]:
    with open_channel(tracker.address) as channel:
        yield BlobClient(channel, tracker.address)


def test_blobs_there_and_back(blobs: BlobClient, tmp_path: Path) -> None:
    for size in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 64 << 20):
        data = os.urandom(size)
        blob, seen = blob_of(data), []
        assert blobs.upload_missing([(blob, data), (blob, memoryview(data))], seen.append) == size
        assert seen == sorted(seen) and (not size or seen[-1] == size)
        assert blobs.upload_missing([(blob, data)]) == 0
        assert blobs.read(blob) == data
    store, file = BlobStore(tmp_path / "store"), tmp_path / "file"
    assert blobs.download(blob, store).read_bytes() == data
    file.write_bytes(os.urandom(3 << 20))
    from_file = blob_of(file.read_bytes())
    blobs.upload(from_file, file)
    assert blobs.download(from_file, store).read_bytes() == file.read_bytes()


def test_a_corrupted_upload_is_refused_and_can_be_repeated(blobs: BlobClient) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    blob = blob_of(data)
    with pytest.raises(CorruptBlobError):
        blobs.upload(blob, data[:-1] + b"X" if data[-1:] != b"X" else data[:-1] + b"Y")
    assert blobs.find_missing([blob]) == [blob]
    blobs.upload(blob, data)
    assert blobs.read(blob) == data


def test_a_truncated_upload_is_resumed(tracker: RunningTracker, blobs: BlobClient) -> None:
    data = os.urandom(4 * CHUNK_BYTES + 77)
    blob = blob_of(data)
    with open_channel(tracker.address) as channel:
        stub: Any = blobs_pb2_grpc.BlobsStub(channel)
        first = blobs_pb2.UploadRequest(blob=convert.blob_to_pb(blob), data=data[:CHUNK_BYTES])
        with pytest.raises(grpc.RpcError) as caught:
            stub.Upload(iter([first, blobs_pb2.UploadRequest(data=data[CHUNK_BYTES : 2 * CHUNK_BYTES])]))
        assert isinstance(from_rpc_error(caught.value), CorruptBlobError)
        query = stub.QueryUpload(blobs_pb2.QueryUploadRequest(blob=convert.blob_to_pb(blob)))
        assert (query.committed_bytes, query.complete) == (2 * CHUNK_BYTES, False)
    seen: list[int] = []
    blobs.upload(blob, data, seen.append)
    assert seen[0] == 3 * CHUNK_BYTES, "the first two chunks were not sent again"
    assert blobs.read(blob) == data


def test_a_download_goes_on_where_it_stopped(blobs: BlobClient, tmp_path: Path) -> None:
    data = os.urandom(3 * CHUNK_BYTES)
    blob, store, seen = blob_of(data), BlobStore(tmp_path), []
    blobs.upload(blob, data)

    class Stop(Exception):
        pass

    def stop_after_two(done: int) -> None:
        if done == 2 * CHUNK_BYTES:
            raise Stop

    with pytest.raises(Stop):
        blobs.download(blob, store, stop_after_two)
    assert store.committed_bytes(blob) == 2 * CHUNK_BYTES
    blobs.download(blob, store, seen.append)
    assert seen == [3 * CHUNK_BYTES] and store.read(blob.digest) == data


def test_what_was_kept_of_a_transfer_may_have_rotted(
    tracker: RunningTracker, blobs: BlobClient, tmp_path: Path
) -> None:
    """On either end: the transfer starts once more, from the beginning."""
    data = os.urandom(3 * CHUNK_BYTES)
    blob, store = blob_of(data), BlobStore(tmp_path / "store")
    kept = tracker.data_dir / "blobs" / "partial" / blob.digest
    kept.write_bytes(bytes(CHUNK_BYTES))
    blobs.upload(blob, data)
    assert blobs.read(blob) == data
    (tmp_path / "store" / "partial" / blob.digest).write_bytes(bytes(CHUNK_BYTES))
    assert blobs.download(blob, store).read_bytes() == data
    assert list((tmp_path / "store" / "partial").iterdir()) == []


def test_an_upload_that_is_broken_off_is_closed_after_its_thread(
    tracker: RunningTracker, blobs: BlobClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, entered, go_on, usual = os.urandom(CHUNK_BYTES), threading.Event(), threading.Event(), os.fsync
    blob = blob_of(data)

    def slow(fd: int) -> None:
        if not entered.is_set() and os.fstat(fd).st_size == blob.size:
            entered.set()
            assert go_on.wait(60)
        usual(fd)

    monkeypatch.setattr(os, "fsync", slow)
    with open_channel(tracker.address) as channel:
        stub: Any = blobs_pb2_grpc.BlobsStub(channel)
        call = stub.Upload.future(iter([blobs_pb2.UploadRequest(blob=convert.blob_to_pb(blob), data=data)]))
        assert entered.wait(60)
        call.cancel()
    blobs.upload(blob, data)
    assert blobs.read(blob) == data
    go_on.set()
    partial = tracker.data_dir / "blobs" / "partial"
    wait_for(lambda: not list(partial.iterdir()), "both uploads to be closed")
    assert blobs.read(blob) == data


def test_a_blob_that_rots_on_the_tracker_can_be_uploaded_again(
    tracker: RunningTracker, blobs: BlobClient, tmp_path: Path
) -> None:
    data = os.urandom(2 * CHUNK_BYTES)
    blob, store = blob_of(data), BlobStore(tmp_path / "store")
    blobs.upload(blob, data)
    (kept,) = (tracker.data_dir / "blobs" / "objects").glob(f"*/{blob.digest}")
    kept.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert blobs.find_missing([blob]) == []
    with pytest.raises(CorruptBlobError, match="damaged on the tracker's disk"):
        blobs.download(blob, store)
    assert blobs.find_missing([blob]) == [blob]
    blobs.upload(blob, data)
    assert blobs.download(blob, store).read_bytes() == data


def test_blobs_that_were_removed_are_asked_for_again(
    tracker: RunningTracker, fleet: Fleet, agent: FakeAgent, artifact: Artifact
) -> None:
    """To free the disk, perhaps: a client that has uploaded them before does so again."""
    for _ in range(2):
        job = fleet.run(artifact, {"x": X})
        agent.finish(agent.expect(m.AssignJob))
        agent.expect(m.ResultAccepted)
        assert job.wait().outcome.ok
        missing = agent.blobs().find_missing(blob for blob, _ in pack(artifact).blobs())
        assert missing == []
        for path in (tracker.data_dir / "blobs" / "objects").glob("*/*"):
            path.unlink()


def test_progress_may_break_off_an_upload(blobs: BlobClient) -> None:
    data = os.urandom(3 * CHUNK_BYTES)

    def stop(done: int) -> None:
        raise ValueError(f"enough at {done}")

    with pytest.raises(ValueError, match="enough at"):
        blobs.upload(blob_of(data), data, stop)


def test_bad_blobs_have_typed_errors(tracker: RunningTracker, blobs: BlobClient) -> None:
    with pytest.raises(MissingBlobError):
        blobs.read(Blob("a" * 64, 3))
    with pytest.raises(BadDigestError):
        blobs.find_missing([Blob("../../../etc/passwd", 3)])
    with pytest.raises(BadDigestError):
        blobs.upload(Blob("../x", 3), b"abc")
    with open_channel(tracker.address) as channel:
        stub: Any = blobs_pb2_grpc.BlobsStub(channel)
        beyond = blobs_pb2.UploadRequest(blob=convert.blob_to_pb(blob_of(b"abc")), offset_bytes=2)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Upload(iter([beyond]))
        assert isinstance(from_rpc_error(caught.value), UploadOffsetError)
        blobs.upload(blob_of(b"abc"), b"abc")
        for offset in (-1, 4):
            request = blobs_pb2.DownloadRequest(blob=convert.blob_to_pb(blob_of(b"abc")), offset_bytes=offset)
            with pytest.raises(grpc.RpcError, match=f"offset_bytes is {offset}") as caught:
                list(stub.Download(request))
            assert isinstance(from_rpc_error(caught.value), InputError)


# ---- Starting and stopping -----------------------------------------------------------------------------------------


def test_a_port_in_use_is_an_error_with_a_remedy(tracker: RunningTracker, tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match=f"cannot listen on 127.0.0.1:{tracker.port}") as caught:
        start(port=tracker.port, data_dir=tmp_path / "other", insecure_loopback=True)
    assert "--port" in str(caught.value.hint)
    assert not (tmp_path / "other").exists()


def test_an_address_of_another_machine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConnectError, match=r"cannot listen on 192\.0\.2\.1:0") as caught:
        start("192.0.2.1", 0, tmp_path)
    assert "--host" in str(caught.value.hint)


def test_two_trackers_do_not_share_a_folder(tracker: RunningTracker) -> None:
    with pytest.raises(StoreError, match=f"another tracker uses the data folder .*: process {os.getpid()}\\b"):
        start(port=0, data_dir=tracker.data_dir, insecure_loopback=True)


def test_by_default_only_this_machine_can_reach_it(tracker: RunningTracker) -> None:
    assert tracker.address.host == "127.0.0.1"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.2", tracker.port)) != 0


def test_stopping_with_agents_and_watchers_is_prompt_and_keeps_everything(tmp_path: Path, artifact: Artifact) -> None:
    tracker = start(port=free_ports(), data_dir=tmp_path, settings=QUICK, insecure_loopback=True)
    agent = FakeAgent(tracker.address, device_info("idle", "aarch64"))
    agent.connect()
    with connect(tracker.address) as fleet:
        job = fleet.run(artifact, {"x": X}, device="bench-1")
        watching = threading.Event()
        results: list[Any] = []
        waiter = threading.Thread(target=lambda: results.append(job.wait(progress=lambda _: watching.set())))
        waiter.start()
        assert watching.wait(60)
        tracker.stop()
        tracker.stop()
        agent.ended()
        with start(port=tracker.port, data_dir=tmp_path, settings=QUICK, insecure_loopback=True) as again:
            assert job.status().state is JobState.QUEUED
            with FakeAgent(again.address, device_info(), work=echo):
                waiter.join(60)
    assert [result.device for result in results] == ["bench-1"], "the client waited through the restart"
    agent.drop()
