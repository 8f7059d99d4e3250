"""One user's jobs, results and blobs are nobody else's, and knowing a name or a digest is not enough."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from security.conftest import admin_tls

from kedge.device_agent.agent import BlobLink
from kedge.protos.v1 import blobs_pb2, blobs_pb2_grpc, fleet_pb2
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import BlobQuotaError, MissingBlobError, blob_of
from kedge.rpc.client import Fleet, Job
from kedge.rpc.client.access import Access
from kedge.rpc.client.plan import pack
from kedge.rpc.errors import AuthenticationError, KedgeError, PermissionDeniedError, UsageError
from kedge.rpc.security.identity import Identity
from kedge.rpc.status import NotReadyError, UnknownJobError, UnknownReservationError, from_rpc_error
from kedge.rpc.tracker.security.folder import Limits
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.transport import Tls, open_channel
from kedge.rpc.types import Blob, JobState, Tensor
from support.agents import wait_for
from support.fake_agent import FakeAgent, echo
from support.toys import QUICK, device_info, spec_message

X = np.arange(8, dtype=np.float32).reshape(2, 4)
#: Too large to travel inline: outputs come back as a blob.
BIG = np.arange(400_000, dtype=np.float32)

FleetOf = Callable[..., Fleet]
Enrolled = Callable[[str], Identity]


def missing(fleet: Fleet, *blobs: Blob) -> list[Blob]:
    return fleet._blobs.find_missing(blobs)


def test_a_job_is_its_users_alone(fleet_of: FleetOf, agent: FakeAgent, artifact: Artifact) -> None:
    ann, bob, root = fleet_of("ann"), fleet_of("bob"), fleet_of("root", "admin")
    job = ann.run(artifact, {"x": X})
    np.testing.assert_array_equal(job.wait(timeout=60)["x_out"], X)
    assert job.id in {each.id for each in ann.jobs()} and job.id not in {each.id for each in bob.jobs()}
    never = "0" * len(job.id)
    for ask in (bob.job, lambda it: Job(bob, it).cancel(), lambda it: Job(bob, it).wait(60)):
        with pytest.raises(UnknownJobError) as foreign:
            ask(job.id)
        with pytest.raises(UnknownJobError) as absent:
            ask(never)
        assert str(foreign.value).replace(job.id, never) == str(absent.value), "nobody can tell which"
    assert root.job(job.id).status().user == "ann" and job.id in {each.id for each in root.jobs()}


def test_readers_only_read_and_only_their_own(fleet_of: FleetOf, agent: FakeAgent, artifact: Artifact) -> None:
    ann, reader, other = fleet_of("ann"), fleet_of("ann", "read"), fleet_of("bob", "read")
    job = ann.run(artifact, {"x": BIG}, function="big")
    job.wait(timeout=60)
    np.testing.assert_array_equal(Job(reader, job.id).wait(60)["x_out"], BIG)
    with pytest.raises(UnknownJobError):
        other.job(job.id)
    with pytest.raises(PermissionDeniedError) as refused:
        reader.run(artifact, {"x": X})
    assert refused.value.message == (
        "user 'ann' with the role read may not upload artifacts or inputs: that takes the role submit or admin"
    )
    assert "kedge tracker token create --role submit --user ann;" in (refused.value.hint or "")
    with pytest.raises(PermissionDeniedError):
        Job(reader, job.id).cancel()


def test_a_blob_is_there_for_whoever_sent_it(fleet_of: FleetOf) -> None:
    ann, bob = fleet_of("ann"), fleet_of("bob")
    data = secrets.token_bytes(3 << 20)
    blob = ann.upload(data)
    assert missing(ann, blob) == [] and missing(bob, blob) == [blob]
    assert bytes(ann._blobs.read(blob)) == data
    with pytest.raises(MissingBlobError) as foreign:
        bob._blobs.read(blob)
    absent = Blob("0" * 64, blob.size)
    with pytest.raises(MissingBlobError) as nothing:
        bob._blobs.read(absent)
    assert foreign.value.message.replace(blob.digest, absent.digest) == nothing.value.message
    bob.upload(data)  # he has the bytes: now it is his too
    assert missing(bob, blob) == [] and bytes(bob._blobs.read(blob)) == data


def test_nobody_goes_on_with_anothers_upload(fleet_of: FleetOf, tracker: RunningTracker) -> None:
    """Whoever knows the digest and the end of a blob must not get the beginning by completing its upload."""
    ann, bob = fleet_of("ann"), fleet_of("bob")
    data = secrets.token_bytes(2 << 20)
    blob, half = blob_of(data), len(data) // 2
    pb = convert.blob_to_pb(blob)
    first = blobs_pb2.UploadRequest(blob=pb, data=data[:half])
    stubs = [blobs_pb2_grpc.BlobsStub(fleet._channel) for fleet in (ann, bob)]
    with pytest.raises(Exception, match="arrived"):
        stubs[0].Upload(iter([first]))
    asked = [stub.QueryUpload(blobs_pb2.QueryUploadRequest(blob=pb)) for stub in stubs]
    assert [answer.committed_bytes for answer in asked] == [half, 0]
    with pytest.raises(Exception, match="0 bytes are committed"):
        stubs[1].Upload(iter([blobs_pb2.UploadRequest(blob=pb, offset_bytes=half, data=data[half:])]))
    assert missing(bob, blob) == [blob]
    # Nor does another's new beginning cost her what she has sent.
    with pytest.raises(Exception, match="arrived"):
        stubs[1].Upload(iter([blobs_pb2.UploadRequest(blob=pb, data=data[:10])]))
    assert stubs[0].QueryUpload(blobs_pb2.QueryUploadRequest(blob=pb)).committed_bytes == half
    stubs[0].Upload(iter([blobs_pb2.UploadRequest(blob=pb, offset_bytes=half, data=data[half:])]))
    assert missing(ann, blob) == [] and missing(bob, blob) == [blob]


def test_no_job_reads_what_its_user_could_not(fleet_of: FleetOf, agent: FakeAgent, artifact: Artifact) -> None:
    """Naming another's blobs as artifact, weights or inputs gives what naming absent ones gives."""
    ann, bob = fleet_of("ann"), fleet_of("bob")
    packed = pack(artifact)
    secret = ann.upload(secrets.token_bytes(2 << 20))
    ann._ensure_uploaded(packed)
    message = fleet_pb2.SubmitJobRequest(spec=nobodys(artifact))
    with pytest.raises(NotReadyError, match="manifest: 1 of 1 blobs are missing"):
        submit(bob, message)
    for blob, data in packed.blobs():
        if blob != packed.blob:
            continue
        bob._blobs.upload_missing([(blob, data)])  # the manifest, but none of what it names
    with pytest.raises(NotReadyError, match="artifact 'toy'"):
        submit(bob, message)
    bob._ensure_uploaded(packed)
    spec = convert.job_spec_from_pb(message.spec)
    tensor = Tensor("x", "float32", (secret.size // 16, 4), secret)
    thief = replace(spec, task=replace(spec.task, inputs=(tensor,)))
    message.spec.CopyFrom(convert.job_spec_to_pb(thief))
    with pytest.raises(NotReadyError, match="inputs: 1 of 1 blobs are missing"):
        submit(bob, message)
    assert submit(ann, message)


def nobodys(artifact: Artifact) -> Any:
    """A job that no device takes."""
    spec = spec_message(artifact)
    spec.selector = "no-such-device"
    return spec


def submit(fleet: Fleet, message: fleet_pb2.SubmitJobRequest) -> str:
    try:
        job_id: str = fleet._stub.SubmitJob(message).job.id
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error
    return job_id


def test_idempotency_keys_say_nothing_of_others_jobs(fleet_of: FleetOf, artifact: Artifact) -> None:
    ann, bob = fleet_of("ann"), fleet_of("bob")
    message = fleet_pb2.SubmitJobRequest(spec=nobodys(artifact), idempotency_key="k" * 32)
    for fleet in (ann, bob):
        fleet._ensure_uploaded(pack(artifact))
    first = submit(ann, message)
    assert submit(ann, message) == first and submit(bob, message) != first


def test_devices_run_others_jobs_without_saying_which(
    fleet_of: FleetOf, enrolled: Enrolled, artifact: Artifact
) -> None:
    ann, bob = fleet_of("ann"), fleet_of("bob")
    known = enrolled("quiet-1")
    with FakeAgent(known.address, device_info("quiet-1"), tls=known.tls) as agent:
        job = ann.run(artifact, {"x": X}, device="quiet-1")
        assigned = agent.expect(m.AssignJob)
        (seen,), (hidden,) = ann.devices("quiet-1"), bob.devices("quiet-1")
        assert seen.running_job_id == job.id and hidden.running_job_id == "" and hidden.state == seen.state
        agent.finish(assigned)
        job.wait(timeout=60)


# ---- Devices -------------------------------------------------------------------------------------------------------


def test_a_device_reads_what_its_job_needs_while_it_has_it(
    fleet_of: FleetOf, enrolled: Enrolled, artifact: Artifact
) -> None:
    ann = fleet_of("ann")
    foreign = ann.upload(secrets.token_bytes(1 << 20))
    known = enrolled("nosy-1")
    packed = pack(artifact)
    with FakeAgent(known.address, device_info("nosy-1"), tls=known.tls) as agent:
        ann._ensure_uploaded(packed)
        for blob in (foreign, packed.blob):
            with pytest.raises(MissingBlobError):
                agent.blobs().read(blob)
        with pytest.raises(PermissionDeniedError, match="only while it holds a job"):
            agent.blobs().upload(blob_of(b"anything"), b"anything")
        job = ann.run(artifact, {"x": BIG}, function="big", device="nosy-1")
        assigned = agent.expect(m.AssignJob)
        for part, data in packed.blobs():
            assert bytes(agent.blobs().read(part)) == bytes(data)
        with pytest.raises(MissingBlobError):
            agent.blobs().read(foreign)
        agent.finish(assigned)
        np.testing.assert_array_equal(job.wait(timeout=60)["x_out"], BIG)
        with pytest.raises(MissingBlobError):
            agent.blobs().read(packed.blob)


def test_a_device_cannot_hand_over_anothers_blob_as_a_result(
    fleet_of: FleetOf, enrolled: Enrolled, artifact: Artifact
) -> None:
    """An agent in league with bob names ann's blob as the output of his job."""
    ann, bob = fleet_of("ann"), fleet_of("bob")
    secret = ann.upload(secrets.token_bytes(1 << 20))
    known = enrolled("crook-1")
    with FakeAgent(known.address, device_info("crook-1"), tls=known.tls) as agent:
        job = bob.run(artifact, {"x": X}, device="crook-1")
        assigned = agent.expect(m.AssignJob)
        result = agent.result(assigned.spec)
        stolen = replace(result, outputs=(Tensor("x_out", "float32", (secret.size // 16, 4), secret),))
        agent.say(m.JobFinished(assigned.lease, stolen))
        wait_for(lambda: job.status().faults, "the result to be refused")
        (fault,) = job.status().faults
        assert fault.device == "crook-1" and "named outputs that it has not sent" in fault.reason
        assert missing(bob, secret) == [secret]
        job.cancel()


def test_a_device_speaks_for_itself_alone(enrolled: Enrolled, fleet_of: FleetOf, artifact: Artifact) -> None:
    """Neither under another's name nor about another's job."""
    liar, honest = enrolled("liar-1"), enrolled("honest-1")
    with FakeAgent(liar.address, device_info("honest-1"), tls=liar.tls) as agent:
        agent.ended()
        error = from_rpc_error(agent.status)
        assert isinstance(error, PermissionDeniedError) and "certificate is that of 'liar-1'" in error.message
    ann = fleet_of("ann")
    with (
        FakeAgent(honest.address, device_info("honest-1"), tls=honest.tls) as owner,
        FakeAgent(liar.address, device_info("liar-1"), tls=liar.tls) as other,
    ):
        job = ann.run(artifact, {"x": X}, device="honest-1")
        assigned = owner.expect(m.AssignJob)
        other.say(m.JobFinished(assigned.lease, other.result(assigned.spec)))
        assert other.expect(m.ResultAccepted).stale
        assert job.status().state is not JobState.DONE
        owner.finish(assigned)
        assert job.wait(timeout=60).device == "honest-1"


def test_a_revoked_device_is_disconnected_at_once(enrolled: Enrolled, access: Access) -> None:
    known = enrolled("lost-1")
    with FakeAgent(known.address, device_info("lost-1"), work=echo, tls=known.tls) as agent:
        access.revoke_device("lost-1")
        agent.ended()
    with FakeAgent(known.address, device_info("lost-1"), tls=known.tls) as agent:
        agent.ended()
        assert "was revoked" in from_rpc_error(agent.status).message


def test_a_device_whose_name_another_one_is_given_is_disconnected_at_once(
    enrolled: Enrolled, fleet_of: FleetOf, artifact: Artifact
) -> None:
    first = enrolled("socket-1")
    with FakeAgent(first.address, device_info("socket-1"), tls=first.tls) as old:
        second = enrolled("socket-1")
        old.ended()
        assert "another device was enrolled as 'socket-1'" in from_rpc_error(old.status).message
    with FakeAgent(second.address, device_info("socket-1"), work=echo, tls=second.tls):
        fleet_of("ann").run(artifact, {"x": X}, device="socket-1").wait(timeout=60)


def test_a_reservation_is_its_users_to_give_back(fleet_of: FleetOf, enrolled: Enrolled) -> None:
    ann, bob, reader = fleet_of("ann"), fleet_of("bob"), fleet_of("ann", "read")
    known = enrolled("wanted-1")
    with FakeAgent(known.address, device_info("wanted-1"), tls=known.tls):
        kept = ann.reserve("wanted-1", duration_s=60)
        assert kept.user == "ann"
        with pytest.raises(UnknownReservationError):
            bob.end_reservation(kept.id)
        for refused in (lambda: reader.end_reservation(kept.id), lambda: bob.set_maintenance("wanted-1")):
            with pytest.raises(PermissionDeniedError):
                refused()
        assert ann.end_reservation(kept.id).id == kept.id


def test_a_user_cannot_reserve_all_devices_and_an_administrator_can(fleet_of: FleetOf, enrolled: Enrolled) -> None:
    ann, root = fleet_of("ann"), fleet_of("root", "admin")
    with ExitStack() as stack:
        for name in ("half-1", "half-2"):
            known = enrolled(name)
            stack.enter_context(FakeAgent(known.address, device_info(name), tls=known.tls))
        later = {"duration_s": 60, "begin_unix_s": time.time() + 3_600}
        kept = [ann.reserve("half-1", **later)]
        with pytest.raises(UsageError, match="ann has 1 of 2 devices"):
            ann.reserve("half-2", **later)
        assert ann.devices("half-1")[0].upcoming == (kept[0],)
        kept += [root.reserve("half-2", **later), root.reserve("half-1", 60)]
        for reservation in kept:
            root.end_reservation(reservation.id)


def test_what_is_under_way_ends_with_its_token(
    tracker: RunningTracker, fleet_of: FleetOf, access: Access, artifact: Artifact
) -> None:
    """A watch that waits for a job ends when its token is revoked, or expires; another token's does not."""
    ann, root = fleet_of("ann"), fleet_of("root", "admin")
    job = submit(ann, request_of(ann, artifact))
    watches = []
    for lifetime_s in (0, 2, 0):
        token, join = access.create_token("read", "ann", lifetime_s=lifetime_s)
        fleet = Fleet(tracker.address, Tls(join.ca, token=join.token))
        watch = fleet._stub.WatchJob(fleet_pb2.WatchJobRequest(job_id=job))
        next(watch)
        watches.append((token, fleet, watch))
    (revoked, _, first), (_, _, expiring), (_, _, going_on) = watches
    access.revoke_token(revoked.id)
    for watch, words in ((first, "was revoked"), (expiring, "has expired meanwhile")):
        with pytest.raises(grpc.RpcError) as caught:
            next(watch)
        error = from_rpc_error(caught.value)
        assert isinstance(error, AuthenticationError) and words in error.message
    Job(root, job).cancel()
    assert convert.job_from_pb(next(going_on)).state is JobState.DONE
    for _, fleet, _ in watches:
        fleet.close()


def test_a_stream_of_jobs_ends_with_its_token(
    tracker: RunningTracker, fleet_of: FleetOf, access: Access, artifact: Artifact
) -> None:
    """While a job is waited for, and for the next one; what it had goes on."""
    root = fleet_of("root", "admin")
    token, join = access.create_token("submit", "ann")
    with Fleet(tracker.address, Tls(join.ca, token=join.token)) as fleet, ThreadPoolExecutor(1) as pool:
        fleet._ensure_uploaded(pack(artifact))
        request = request_of(fleet, artifact)
        job = fleet._stream_job(request)
        assert job is not None and fleet._stream is not None
        waiting = pool.submit(job.wait)
        access.revoke_token(token.id)
        with pytest.raises(AuthenticationError, match="was revoked"):
            waiting.result(60)
        with pytest.raises(AuthenticationError, match="was revoked"):
            fleet._stream_job(request)
    Job(root, job.id).cancel()


def test_a_stream_of_jobs_is_for_those_who_may_submit_them(fleet_of: FleetOf, artifact: Artifact) -> None:
    ann, reader = fleet_of("ann"), fleet_of("ann", "read")
    request = request_of(ann, artifact)
    with pytest.raises(PermissionDeniedError, match="may not submit jobs"):
        reader._stream_job(request)
    request.spec.priority = 1
    with pytest.raises(KedgeError, match="priority"):
        ann._stream_job(request)
    request.spec.priority = 0
    first, again = ann._stream_job(request), ann._stream_job(request)
    assert first is not None and again is not None and first.id != again.id, "no key, no memory"
    for job in (first, again):
        job.cancel()


def request_of(fleet: Fleet, artifact: Artifact) -> fleet_pb2.SubmitJobRequest:
    fleet._ensure_uploaded(pack(artifact))
    return fleet_pb2.SubmitJobRequest(spec=nobodys(artifact))


def test_blobs_of_agents_go_by_their_own_channel(enrolled: Enrolled) -> None:
    known = enrolled("idle-1")
    with open_channel(known.address, known.tls) as channel, pytest.raises(PermissionDeniedError):
        BlobClient(channel, known.address).upload(blob_of(b"x"), b"x")


def test_an_agents_transfers_use_the_certificate_that_it_has_now(enrolled: Enrolled) -> None:
    """Its connection for them stays open for months, and calls are judged by the certificate that it began with."""
    known = enrolled("renewed-1")
    link = BlobLink(known.address, lambda: known.tls)
    try:
        with pytest.raises(PermissionDeniedError):  # known, but it has no job
            link.upload(blob_of(b"x"), b"x")
        known = enrolled("renewed-1")
        with pytest.raises(PermissionDeniedError):  # and no AuthenticationError
            link.upload(blob_of(b"x"), b"x")
    finally:
        link.close()


def test_one_users_blobs_leave_room_for_others(tmp_path: Path) -> None:
    at_most = 1 << 20
    limits = Limits(max_user_bytes=at_most)
    with (
        start(port=0, data_dir=tmp_path, settings=QUICK, limits=limits, blob_quota=3 * at_most) as tracker,
        Access(tracker.address, admin_tls(tracker)) as access,
    ):
        anns, bobs = (access.create_token("submit", user)[1] for user in ("ann", "bob"))
        with (
            Fleet(tracker.address, Tls(anns.ca, token=anns.token)) as ann,
            Fleet(tracker.address, Tls(bobs.ca, token=bobs.token)) as bob,
        ):
            parts = [bytes([number]) * (at_most // 3) for number in range(4)]
            with pytest.raises(BlobQuotaError, match=r"more than user 'ann' may have on this tracker: 1048576"):
                ann._blobs.upload_missing([(blob_of(part), part) for part in parts])
            assert not list((tmp_path / "blobs" / "objects").glob("*/*")), "it was refused before anything was sent"
            small, whole = b"s" * 1000, b"w" * at_most
            ann._blobs.upload(blob_of(whole), whole)
            with pytest.raises(BlobQuotaError, match="have 1048576"):
                ann._blobs.upload(blob_of(small), small)
            assert missing(ann, blob_of(whole)) == []
            with pytest.raises(BlobQuotaError):
                missing(ann, blob_of(small))
            bob._blobs.upload(blob_of(whole), whole)
            assert missing(bob, blob_of(whole)) == []
