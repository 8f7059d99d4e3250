"""Input that no client sends: too large, malformed, replayed, pointing elsewhere; ten thousand messages of noise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import grpc
import pytest

from kedge.protos.v1 import agent_pb2, blobs_pb2, enrolment_pb2, fleet_pb2, sessions_pb2, types_pb2
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.blobs import blob_of
from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.client.plan import pack
from kedge.rpc.errors import AuthenticationError, LimitError, PermissionDeniedError, UsageError
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.protocol import local_protocol
from kedge.rpc.security import identity
from kedge.rpc.security.identity import Identity
from kedge.rpc.status import NameTakenError, QueueFullError, from_rpc_error
from kedge.rpc.tracker.security.folder import Limits
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.tracker.settings import Settings
from kedge.rpc.transport import MAX_MESSAGE_BYTES, Tls, open_channel
from kedge.rpc.types import MAX_LEASE_MS, NO_BLOB, DeviceState, JobResult, JobSpec, JobState, Lease, SessionTask, Tensor
from support.fake_agent import FakeAgent
from support.services import Rpc, rpcs, send
from support.toys import device_info, spec_message

RPCS = {str(rpc): rpc for rpc in rpcs()}
FleetOf = Callable[..., Fleet]
#: What a client may be told when its message makes no sense. UNKNOWN would be an exception that nobody meant.
SENSIBLE = {
    "OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED", "ABORTED",
    "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "ALREADY_EXISTS", "DATA_LOSS",
}  # fmt: skip
FUZZ_MESSAGES = 10_000


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTracker]:
    """A tracker with tight limits."""
    settings = Settings(max_queued_per_user=2)
    limits = Limits(max_blob_bytes=1 << 20, max_calls=8)
    folder = tmp_path_factory.mktemp("small")
    with start(port=0, data_dir=folder / "tracker", settings=settings, limits=limits) as running:
        yield running


def user_of(tracker: RunningTracker, name: str) -> Tls:
    assert tracker.serving.security is not None
    with Access(tracker.address, tracker.serving.security.admin_tls()) as access:
        _, join = access.create_token("submit", name)
    return Tls(join.ca, token=join.token)


# ---- Limits --------------------------------------------------------------------------------------------------------


def test_a_message_that_is_too_large_is_refused(fleet_of: FleetOf) -> None:
    fleet = fleet_of("ann")
    huge = b"\x0a" + b"\xff\xff\xff\x0f" + b"x" * (MAX_MESSAGE_BYTES + 1)
    for name in ("Fleet/SubmitJob", "Blobs/Upload", "Blobs/FindMissing"):
        status, said = send(fleet._channel, RPCS[name], [huge])
        assert status == "RESOURCE_EXHAUSTED" and "larger than max" in said
    assert fleet.devices() is not None, "the connection lives"


def test_what_others_are_shown_is_bounded_by_each(fleet_of: FleetOf, agent: FakeAgent) -> None:
    """One reason of 16 MiB would fill every list of devices."""
    fleet = fleet_of("ann")
    for reason, said in (("x" * 1_001, "ReserveRequest.reason has 1001 characters"), ("\0", "a zero character")):
        status, details = send(
            fleet._channel,
            RPCS["Fleet/Reserve"],
            [fleet_pb2.ReserveRequest(duration_ms=1_000, reason=reason).SerializeToString()],
        )
        assert status in ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT") and said in details
    assert all(device.reservation is None for device in fleet.devices())


def test_a_spec_that_does_not_fit_beside_its_result_is_refused(fleet_of: FleetOf, artifact: Artifact) -> None:
    """It would be cut off from every agent that it is assigned to, and from its client."""
    fleet = fleet_of("ann")
    spec = spec_message(artifact)
    for number in range(5):
        spec.run.inputs.add(name=str(number), dtype="int8", shape=[1 << 20], inline=bytes(1 << 20))
    request = fleet_pb2.SubmitJobRequest(spec=spec, idempotency_key="k")
    status, said = send(fleet._channel, RPCS["Fleet/SubmitJob"], [request.SerializeToString()])
    assert status == "RESOURCE_EXHAUSTED" and "JobSpec has" in said
    key = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact), idempotency_key="k" * 129)
    status, said = send(fleet._channel, RPCS["Fleet/SubmitJob"], [key.SerializeToString()])
    assert status == "RESOURCE_EXHAUSTED" and "idempotency_key has 129 characters" in said
    assert fleet.jobs() == []


def test_only_administrators_have_jobs_go_before_everybodys(fleet_of: FleetOf, artifact: Artifact) -> None:
    ann, root = fleet_of("ann"), fleet_of("root", "admin")
    for fleet in (ann, root):
        fleet._ensure_uploaded(pack(artifact))
    request = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact))
    request.spec.selector = "nobody"
    for priority, fleet, allowed in ((1, ann, False), (1, root, True), (0, ann, True), (-(2**31) + 1, ann, True)):
        request.spec.priority = priority
        status, said = send(fleet._channel, RPCS["Fleet/SubmitJob"], [request.SerializeToString()])
        assert status == ("OK" if allowed else "INVALID_ARGUMENT"), said
    for job in root.jobs(states=(JobState.QUEUED,)):
        root._stub.CancelJob(fleet_pb2.CancelJobRequest(job_id=job.id))


def test_calling_off_what_has_ended_is_nothing_to_write_down(tracker: RunningTracker, fleet_of: FleetOf) -> None:
    fleet = fleet_of("ann")
    spec = convert.job_spec_to_pb(JobSpec(NO_BLOB, "", SessionTask(0), "nobody"))
    job = fleet._stub.SubmitJob(fleet_pb2.SubmitJobRequest(spec=spec)).job
    for _ in range(3):
        fleet._stub.CancelJob(fleet_pb2.CancelJobRequest(job_id=job.id))
    audit = (tracker.data_dir / "security" / "audit.jsonl").read_text().splitlines()
    told = [line for line in map(json.loads, audit) if line["event"] == "job cancelled" and line["job"] == job.id]
    assert len(told) == 1


def test_an_upload_of_which_nothing_comes_ends(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would keep room for all that it has announced."""
    monkeypatch.setattr("kedge.rpc.tracker.blobs_service._CHUNK_S", 0.2)
    fleet, data = fleet_of("ann"), b"d" * 100
    blob = types_pb2.Blob(digest=blob_of(data).digest, size_bytes=len(data))
    more: SimpleQueue[blobs_pb2.UploadRequest | None] = SimpleQueue()
    more.put(blobs_pb2.UploadRequest(blob=blob, data=data[:10]))
    with pytest.raises(grpc.RpcError) as caught:
        fleet._blobs._stub.Upload(iter(more.get, None))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and "nothing came" in (caught.value.details() or "")
    more.put(None)  # gRPC's own thread waits for it
    fleet.upload(data)


def test_an_artifact_for_too_many_kinds_of_devices_is_refused(fleet_of: FleetOf, artifact: Artifact) -> None:
    fleet, packed = fleet_of("ann"), pack(artifact)
    fleet._ensure_uploaded(packed)
    tree = json.loads(packed.json)
    variant = tree["variants"][0]
    tree["variants"] = [{**variant, "features": [f"feature{number}"]} for number in range(101)]
    many = json.dumps(tree).encode()
    fleet.upload(many)
    spec = spec_message(artifact)
    spec.manifest.CopyFrom(convert.blob_to_pb(blob_of(many)))
    status, said = send(
        fleet._channel, RPCS["Fleet/SubmitJob"], [fleet_pb2.SubmitJobRequest(spec=spec).SerializeToString()]
    )
    assert status == "RESOURCE_EXHAUSTED" and "101 kinds of devices" in said


def test_blobs_are_bounded_before_a_byte_is_stored(small: RunningTracker) -> None:
    with Fleet(small.address, user_of(small, "ann")) as fleet:
        for size in ((1 << 20) + 1, 2**62):
            request = blobs_pb2.UploadRequest(blob=types_pb2.Blob(digest="a" * 64, size_bytes=size), data=b"x")
            with pytest.raises(grpc.RpcError) as caught:
                blobs_upload(fleet, request)
            assert isinstance(from_rpc_error(caught.value), LimitError)
        assert not list((small.data_dir / "blobs" / "partial").iterdir())
        fleet.upload(bytes(1 << 20))


def blobs_upload(fleet: Fleet, *requests: blobs_pb2.UploadRequest) -> None:
    fleet._blobs._stub.Upload(iter(requests))


def test_a_users_queue_is_bounded_and_leaves_others_room(small: RunningTracker, artifact: Artifact) -> None:
    spec = spec_message(artifact)
    spec.selector = "nobody"
    message = fleet_pb2.SubmitJobRequest(spec=spec)
    with Fleet(small.address, user_of(small, "ann")) as ann, Fleet(small.address, user_of(small, "bob")) as bob:
        for fleet in (ann, bob):
            fleet._ensure_uploaded(pack(artifact))
        for _ in range(2):
            ann._stub.SubmitJob(message)
        with pytest.raises(grpc.RpcError) as caught:
            ann._stub.SubmitJob(message)
        assert isinstance(from_rpc_error(caught.value), QueueFullError)
        bob._stub.SubmitJob(message)


def test_calls_under_way_are_bounded(small: RunningTracker) -> None:
    slow = fleet_pb2.ListDevicesRequest(selector="nobody", wait_ms=60_000)
    with Fleet(small.address, user_of(small, "cleo")) as fleet, Fleet(small.address, user_of(small, "dora")) as other:
        waiting = [fleet._stub.ListDevices.future(slow) for _ in range(8)]
        # Which of the nine is one too many is the server's to say.
        waiting.append(fleet._stub.ListDevices.future(slow))
        refused = next(call for call in iter(lambda: [c for c in waiting if c.done()], None) if call)[0]
        assert isinstance(from_rpc_error(refused.exception()), LimitError)
        assert other.devices() == []
        for call in waiting:
            call.cancel()


# ---- Malformed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "digest", ["../../../../etc/passwd", "a" * 63 + "/", "A" * 64, "a" * 65, "\0" * 64, "", "ä" * 32]
)
def test_a_digest_never_names_a_path(fleet_of: FleetOf, tracker: RunningTracker, digest: str) -> None:
    fleet = fleet_of("root", "admin")  # whoever sees everything
    blob = types_pb2.Blob(digest=digest, size_bytes=3)
    requests = {
        "Blobs/FindMissing": blobs_pb2.FindMissingRequest(blobs=[blob]),
        "Blobs/QueryUpload": blobs_pb2.QueryUploadRequest(blob=blob),
        "Blobs/Upload": blobs_pb2.UploadRequest(blob=blob, data=b"abc"),
        "Blobs/Download": blobs_pb2.DownloadRequest(blob=blob),
        "Fleet/SubmitJob": fleet_pb2.SubmitJobRequest(spec=types_pb2.JobSpec(manifest=blob, run=types_pb2.RunTask())),
    }
    for name, request in requests.items():
        assert send(fleet._channel, RPCS[name], [request.SerializeToString()])[0] == "INVALID_ARGUMENT", name
    assert not (tracker.data_dir.parent / "etc").exists()


@pytest.mark.parametrize("name", ["../../evil", "a/b", ".", "", "x" * 200, "a\nb", "ä"])
def test_a_device_or_a_user_never_names_a_path(access: Access, name: str) -> None:
    with pytest.raises(UsageError):
        access.create_token("submit", name or "/")
    join, _ = access.enrol_token("")
    with pytest.raises(UsageError, match="cannot be a device's name"):
        identity.enrol(join, name)
    assert identity.enrol(join, "fine-1").device == "fine-1", "what was refused has not spent the token"
    access.revoke_device("fine-1")


def test_manifests_that_make_no_sense_are_refused(fleet_of: FleetOf, artifact: Artifact) -> None:
    """Mutated ones, endless ones, and some that quote so much of themselves that no answer could carry it."""
    ann = fleet_of("ann")
    packed = pack(artifact)
    ann._ensure_uploaded(packed)
    rng = random.Random(7)
    tree = json.loads(packed.json)
    bad = [
        b"",
        b"{}",
        b"[" * 200_000,
        b'{"format":1}',
        b"\xff" * 9,
        json.dumps({**tree, "name": ["x" * 100_000]}).encode(),
    ]
    bad.append(json.dumps({**tree, "functions": [{"name": "x" * 200_000}]}).encode())
    digits = [at for at, byte in enumerate(packed.json) if byte in b"0123456789"]
    for _ in range(150):
        data = bytearray(packed.json)
        if rng.random() < 0.5:
            data[rng.choice(digits)] = rng.choice(b'-9"[{x')
        else:
            data[rng.randrange(len(data))] = rng.choice(b'-9"[]{},x\x00')
        bad.append(bytes(data))
    answers = set()
    for data in bad:
        message = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact))
        message.spec.selector = "nobody"
        message.spec.manifest.CopyFrom(convert.blob_to_pb(ann.upload(data)))
        status, said = send(ann._channel, RPCS["Fleet/SubmitJob"], [message.SerializeToString()])
        answers.add(status)
        assert status in SENSIBLE and len(said) < 2_000, said[:300]
    assert "INVALID_ARGUMENT" in answers


# ---- Tokens --------------------------------------------------------------------------------------------------------


def test_an_enrolment_token_works_once(access: Access) -> None:
    _, join = access.create_token("enrol")
    assert identity.enrol(join, "once-1").device == "once-1"
    for name in ("once-1", "once-2"):
        with pytest.raises(AuthenticationError, match="is spent"):
            identity.enrol(join, name)


def test_a_token_raced_for_enrols_one_device(access: Access) -> None:
    _, join = access.create_token("enrol")

    def attempt(number: int) -> Identity | AuthenticationError:
        try:
            return identity.enrol(join, f"race-{number}")
        except AuthenticationError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        came = list(pool.map(attempt, range(8)))
    assert sum(isinstance(each, Identity) for each in came) == 1


def test_an_enrolled_name_is_not_for_the_taking(tracker: RunningTracker, access: Access) -> None:
    first = identity.enrol(access.enrol_token("prize-1")[0], "prize-1")
    _, anybody = access.create_token("enrol")
    with pytest.raises(NameTakenError, match="enrolled under the name 'prize-1' already"):
        identity.enrol(anybody, "prize-1")
    with pytest.raises(PermissionDeniedError, match="this token enrols 'prize-2', not 'prize-1'"):
        identity.enrol(access.enrol_token("prize-2")[0], "prize-1")
    audit = (tracker.data_dir / "security" / "audit.jsonl").read_text().splitlines()
    refused = [line for line in map(json.loads, audit) if line["event"] == "enrolment refused"]
    reasons = [line["reason"] for line in refused if line["device"] == "prize-1"]
    assert len(reasons) == 2 and "already" in reasons[0] and "enrols 'prize-2'" in reasons[1]
    second = identity.enrol(access.enrol_token("prize-1")[0], "prize-1")
    renew = RPCS["Enrolment/Renew"]
    with open_channel(first.address, first.tls) as old, open_channel(second.address, second.tls) as new:
        assert send(old, renew)[0] == "UNAUTHENTICATED" and send(new, renew)[0] == "OK"


def test_tokens_of_users_enrol_nothing_and_those_that_enrol_ask_nothing(
    access: Access, tracker: RunningTracker
) -> None:
    _, user = access.create_token("admin", "ann")
    with pytest.raises(AuthenticationError, match="a user's"):
        identity.enrol(user, "x-1")
    _, device = access.create_token("enrol")
    with Fleet(tracker.address, Tls(device.ca, token=device.token)) as fleet, pytest.raises(PermissionDeniedError):
        fleet.hello()


def test_no_secret_is_in_any_file_of_the_tracker_but_its_own(tracker: RunningTracker, access: Access) -> None:
    secret = access.create_token("submit", "ann")[1].token
    enrolling = access.enrol_token("kept-1")[0]
    known = identity.enrol(enrolling, "kept-1")
    folder = tracker.data_dir / "security"
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
        text = path.read_bytes()
        for hidden in (secret, enrolling.token, known.key):
            assert hidden.encode() not in text, path
    assert folder.stat().st_mode & 0o077 == 0
    assert tracker.data_dir.stat().st_mode & 0o077 == 0, "what users sent is for nobody else on this machine"
    hashes = [item["hash"] for item in json.loads((folder / "tokens.json").read_text())]
    assert all(len(digest) == 64 for digest in hashes)


# ---- Noise ---------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, message: bytes) -> bytes:
    """Bytes that protobuf may or may not be able to read."""
    data = bytearray(message)
    for _ in range(rng.randint(0, 4)):
        kind = rng.randrange(5)
        at = rng.randint(0, len(data))
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at:at] = rng.randbytes(rng.randint(1, 12))
        elif kind == 2:
            del data[at : at + rng.randint(1, 8)]
        elif kind == 3:
            data += data[at:]
        else:
            data[at:at] = bytes([rng.randrange(1, 8) << 3 | rng.choice((0, 1, 2, 5))]) + b"\xff" * rng.randint(1, 11)
    return bytes(data)


def seeds(artifact: Artifact) -> dict[str, bytes]:
    """A sensible message for calls whose empty one says little."""
    blob = convert.blob_to_pb(blob_of(b"abc"))
    spec = spec_message(artifact)
    return {
        "Fleet/SubmitJob": fleet_pb2.SubmitJobRequest(spec=spec, idempotency_key="k").SerializeToString(),
        "Fleet/ListDevices": fleet_pb2.ListDevicesRequest(selector="a=b,c in (d,e)").SerializeToString(),
        "Fleet/ListJobs": fleet_pb2.ListJobsRequest(states=[1, 2], limit=3).SerializeToString(),
        "Blobs/FindMissing": blobs_pb2.FindMissingRequest(blobs=[blob, blob]).SerializeToString(),
        "Blobs/Upload": blobs_pb2.UploadRequest(blob=blob, data=b"abc").SerializeToString(),
        "Blobs/Download": blobs_pb2.DownloadRequest(blob=blob).SerializeToString(),
        "Access/CreateToken": enrolment_pb2.CreateTokenRequest(user="ann", role=2, lifetime_s=60).SerializeToString(),
        "Enrolment/Enrol": enrolment_pb2.EnrolRequest(device="fuzz-1").SerializeToString(),
    }


def agents_talk(device: str) -> list[bytes]:
    """What an agent says, its hello first."""
    lease = Lease("a" * 12, 1)
    result = JobResult(Outcome(OutcomeKind.OK), (Tensor("y", "float32", (1,), bytes(4)),))
    bodies = (
        m.Hello(local_protocol(), device_info(device), "instance", (lease,), m.Health()),
        m.Heartbeat(m.Health(load_1min=1.0), (lease,)),
        m.JobStarted(lease),
        m.JobProgress(lease, Stage.RUN),
        m.JobFinished(lease, result),
        m.Goodbye("tired"),
    )
    return [convert.agent_message_to_pb(body, number).SerializeToString() for number, body in enumerate(bodies, 1)]


def open_session(fleet: Fleet, selector: str = "nobody=here") -> str:
    """A session that waits for a device, or has it."""
    spec = JobSpec(NO_BLOB, "", SessionTask(MAX_LEASE_MS), selector)
    request = fleet_pb2.SubmitJobRequest(spec=convert.job_spec_to_pb(spec))
    return str(fleet._stub.SubmitJob(request).job.id)


def sessions_talk(job_id: str, epoch: int = 1) -> dict[str, list[bytes]]:
    """What the two ends of a session say, their first words first."""
    value = sessions_pb2.Value(name="x", dtype="float32", shape=[1], inline=bytes(4))
    request = sessions_pb2.SessionRequest(id=1, call=sessions_pb2.CallFunction(artifact=1, inputs=[value]))
    manifest = types_pb2.Blob(digest="a" * 64, size_bytes=9)
    client = (
        sessions_pb2.ClientFrame(attach=sessions_pb2.AttachSession(job_id=job_id)),
        sessions_pb2.ClientFrame(renew=sessions_pb2.RenewSession()),
        sessions_pb2.ClientFrame(grant=sessions_pb2.GrantArtifact(manifest=manifest)),
        sessions_pb2.ClientFrame(withdraw=sessions_pb2.WithdrawArtifact(manifest=manifest)),
        sessions_pb2.ClientFrame(data=request.SerializeToString()),
    )
    device = (
        sessions_pb2.DeviceFrame(serve=types_pb2.Lease(job_id=job_id, epoch=epoch)),
        sessions_pb2.DeviceFrame(data=sessions_pb2.SessionReply(id=1).SerializeToString()),
        sessions_pb2.DeviceFrame(done=sessions_pb2.CloseSession()),
    )
    return {
        "Sessions/Attach": [frame.SerializeToString() for frame in client],
        "Sessions/Serve": [frame.SerializeToString() for frame in device],
    }


def test_noise_harms_nothing(tracker: RunningTracker, access: Access, artifact: Artifact) -> None:
    """Ten thousand mutated messages, on every call, by an administrator, a device and somebody without a token."""
    rng = random.Random(20261126)
    assert tracker.serving.security is not None
    security = tracker.serving.security
    device = identity.enrol(access.enrol_token("fuzz-0")[0], "fuzz-0")
    places = [
        (open_channel(tracker.address, security.admin_tls()), ("Fleet", "Blobs", "Sessions", "Access", "Enrolment")),
        (
            open_channel(tracker.address, Tls(security.authority.certificate_pem)),
            ("Fleet", "Blobs", "Sessions", "Access"),
        ),
        (open_channel(device.address, device.tls), ("Agents", "Blobs", "Sessions", "Enrolment")),
    ]
    known = seeds(artifact)
    hello, *talk = agents_talk("fuzz-0")
    client = Fleet(tracker.address, security.admin_tls())
    sent, answers = 0, set[tuple[str, str]]()

    def attempt(channel: grpc.Channel, rpc: Rpc, messages: list[bytes]) -> tuple[str, str, str]:
        status, said = send(channel, rpc, messages, timeout=60)
        return str(rpc), status, said

    with ThreadPoolExecutor(16) as pool:
        pending = []
        while sent < FUZZ_MESSAGES:
            channel, services = rng.choice(places)
            name = rng.choice([name for name in RPCS if name.split("/")[0] in services])
            rpc = RPCS[name]
            seed = known.get(name, b"")
            messages = [mutated(rng, seed or rng.randbytes(rng.randint(0, 40)))]
            if rpc.client_streams:
                messages += [mutated(rng, rng.choice((seed, messages[0], b""))) for _ in range(rng.randint(0, 6))]
            if name == "Agents/Connect" and rng.random() < 0.7:
                messages = [hello, *(mutated(rng, rng.choice(talk)) for _ in range(rng.randint(1, 8)))]
            if name.startswith("Sessions/") and rng.random() < 0.7:
                first, *rest = sessions_talk(open_session(client))[name]
                messages = [first, *(mutated(rng, rng.choice(rest)) for _ in range(rng.randint(1, 6)))]
            if name == "Fleet/ListDevices" and fleet_waits(messages[0]):
                continue
            sent += len(messages)
            pending.append(pool.submit(attempt, channel, rpc, messages))
        for each in pending:
            name, status, said = each.result()
            if status not in SENSIBLE:
                answers.add((name, f"{status}: {said[:200]}"))
    assert answers == set()
    client.close()
    for channel, _ in places:
        channel.close()
    # And it serves as before.
    with Fleet(tracker.address, security.admin_tls()) as fleet:
        fleet.hello()
        assert fleet.jobs() is not None
    assert json.loads((tracker.data_dir / "security" / "tokens.json").read_text())


def test_noise_between_the_two_ends_of_a_session(tmp_path: Path) -> None:
    """Whatever either end says once both are there, the session ends, and its device is free."""
    # A device that breaks off session after session would be quarantined.
    with start(port=0, data_dir=tmp_path / "tracker", settings=Settings(quarantine_after=1_000)) as tracker:
        make_noise(tracker, random.Random(20261126))


def make_noise(tracker: RunningTracker, rng: random.Random) -> None:
    assert tracker.serving.security is not None
    with Access(tracker.address, tracker.serving.security.admin_tls()) as access:
        device = identity.enrol(access.enrol_token("fuzz-1")[0], "fuzz-1")
    answers = set[tuple[str, str]]()
    with (
        open_channel(device.address, device.tls) as channel,
        Fleet(tracker.address, tracker.serving.security.admin_tls()) as fleet,
    ):
        said: SimpleQueue[bytes] = SimpleQueue()
        talk = cast(Any, channel).stream_stream("/kedge.v1.Agents/Connect")(iter(said.get, None))
        said.put(saying(m.Hello(local_protocol(), device_info("fuzz-1"), "instance", health=m.Health())))
        assert isinstance(heard(talk), m.Welcome)
        for _ in range(60):
            job_id = open_session(fleet, "fuzz-1")
            lease = heard(talk).lease
            assert lease.job_id == job_id
            said.put(saying(m.JobStarted(lease)))
            ends = sessions_talk(job_id, lease.epoch)
            noise = {
                name: [mutated(rng, rng.choice(words)) for _ in range(rng.randint(0, 8))]
                for name, words in ends.items()
            }
            with ThreadPoolExecutor(2) as pool:
                served = pool.submit(
                    send, channel, RPCS["Sessions/Serve"], [ends["Sessions/Serve"][0], *noise["Sessions/Serve"]]
                )
                attached = pool.submit(
                    send,
                    fleet._channel,
                    RPCS["Sessions/Attach"],
                    [ends["Sessions/Attach"][0], *noise["Sessions/Attach"]],
                )
            answers |= {served.result(), attached.result()}
            said.put(saying(m.JobFinished(lease, JobResult(Outcome(OutcomeKind.OK)))))
            while not isinstance(heard(talk), m.ResultAccepted):
                pass
        (status,) = fleet.devices("fuzz-1")
        assert status.state is DeviceState.IDLE
        said.put(saying(m.Goodbye("done")))
        talk.cancel()
    assert {status for status, _ in answers} <= SENSIBLE, answers
    assert len({status for status, _ in answers}) > 1, "some of both"


def saying(body: m.AgentBody) -> bytes:
    return convert.agent_message_to_pb(body, 1).SerializeToString()


def heard(talk: Any) -> Any:
    return convert.tracker_message_from_pb(agent_pb2.TrackerMessage.FromString(next(talk)))


def fleet_waits(message: bytes) -> bool:
    try:
        return bool(fleet_pb2.ListDevicesRequest.FromString(message).wait_ms > 0)
    except Exception:  # noqa: BLE001 - noise
        return False
