"""The tracker's store of blobs stays within its quota, and never drops what a job needs."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.blob_client import BlobClient
from kedge.rpc.blobs import BlobQuotaError, BlobWriter, MissingBlobError, blob_of
from kedge.rpc.client import connect
from kedge.rpc.client.plan import pack
from kedge.rpc.outcome import Outcome, OutcomeKind
from kedge.rpc.tracker.allowance import Allowance
from kedge.rpc.tracker.blobs import DISK_SHARE, PROMISE_S, TrackerBlobs
from kedge.rpc.tracker.catalog import Catalog
from kedge.rpc.tracker.facts import JobAccepted, JobDone, JobWithdrawn
from kedge.rpc.tracker.needed import Needed
from kedge.rpc.tracker.security.owners import FileOwners
from kedge.rpc.tracker.security.principal import Principal, Role
from kedge.rpc.tracker.server import start
from kedge.rpc.transport import open_channel
from kedge.rpc.types import Blob, JobResult, JobSpec, RunTask, SessionTask, Tensor
from support.fake_agent import FakeAgent
from support.toys import QUICK, device_info

QUOTA = 100
STEP = 16
DATA = [bytes([65 + number]) * size for number, size in enumerate((0, 10, 10, 20, 30, 30, 45, 60, 120))]
BLOBS = [blob_of(data) for data in DATA]
any_blob = st.integers(0, len(DATA) - 1)


class Clock:
    """Unix seconds that stand still unless told."""

    def __init__(self) -> None:
        self.now = 1_000_000_000.0

    def __call__(self) -> float:
        self.now += 1e-3  # files' times must differ
        return self.now


def files(store: TrackerBlobs) -> dict[str, int]:
    """Every file of the store: `objects` or `partial`, a slash, its name."""
    found = (path for path in store.root.rglob("*") if path.is_file())
    return {f"{path.relative_to(store.root).parts[0]}/{path.name}": path.stat().st_size for path in found}


def test_an_upload_that_was_let_in_finds_its_room_on_the_disk_that_it_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free becomes less with each byte of it; also where it is broken off and gone on with."""

    def disk_usage(_: str) -> SimpleNamespace:
        return SimpleNamespace(free=1_000 - sum(files(store).values()))

    store = TrackerBlobs(tmp_path / "blobs")
    monkeypatch.setattr("kedge.rpc.tracker.blobs.STEP_BYTES", STEP)
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    data = b"u" * 700
    blob = blob_of(data)
    for begin, end in ((0, 350), (350, 700)):
        with store.begin(blob, begin) as writer:
            for at in range(begin, end, 50):
                writer.append(data[at : at + 50])
            if end == len(data):
                writer.commit()
    assert store.has(blob) and store.quota_bytes() == 750
    with pytest.raises(BlobQuotaError):
        store.begin(blob_of(b"w" * 751), 0)


def test_jobs_that_end_one_after_the_other_do_not_touch_their_files_each_time(tmp_path: Path) -> None:
    clock = Clock()
    store = TrackerBlobs(tmp_path / "blobs", QUOTA, clock=clock)
    blob = store.put(b"artifact")
    clock.now += PROMISE_S + 1
    store.end_promises()
    used = []
    for wait_s in (0, 3, 3, 20):
        clock.now += wait_s
        store.hold((blob.digest,))
        store.let_go((blob.digest,))
        used.append(store._object(blob.digest).stat().st_mtime)
    assert used[0] == used[1] == used[2] < used[3]


class Quota(RuleBasedStateMachine):
    """Uploads that are done, broken off, gone on with and refused, while jobs come and go and the tracker dies."""

    def __init__(self) -> None:
        super().__init__()
        self.patched = pytest.MonkeyPatch()
        self.patched.setattr("kedge.rpc.tracker.blobs.STEP_BYTES", STEP)
        self.folder = TemporaryDirectory()
        self.clock = Clock()
        self.holds: Counter[str] = Counter()
        self.promised: dict[str, float] = {}
        self.writers: list[BlobWriter] = []
        self.open_store()

    def open_store(self) -> None:
        root = Path(self.folder.name) / "blobs"
        self.store = TrackerBlobs(root, QUOTA, on_evict=self.evict, clock=self.clock)
        self.store.hold(self.holds.elements())
        self.kept: dict[str, int] = {}
        self.store.when_kept(self.keep)

    def keep(self, digest: str, size: int) -> None:
        self.kept.pop(digest, None)
        if size:
            self.kept[digest] = size

    @invariant()
    def whoever_asked_knows_what_has_to_stay(self) -> None:
        self.store.end_promises()
        there = {name.removeprefix("objects/"): size for name, size in files(self.store).items() if size}
        assert self.kept == {digest: there[digest] for digest in self.protected() & there.keys()}

    def evict(self, digest: str) -> None:
        assert digest not in self.protected()

    def teardown(self) -> None:
        for writer in self.writers:
            writer.close()
        self.folder.cleanup()
        self.patched.undo()

    def protected(self) -> set[str]:
        """What must not go."""
        promised = {digest for digest, until in self.promised.items() if until > self.clock.now}
        return promised | set(self.holds)

    def staying(self) -> int:
        """Bytes that have to stay, and that uploads have announced."""
        self.store.end_promises()
        there = sum(blob.size for blob in self.store if blob.digest in self.protected())
        return there + sum(writer.blob.size for writer in self.writers)

    def idle(self) -> set[str]:
        """Files of uploads that nobody goes on with now."""
        busy = {f"partial/{writer.path.name}" for writer in self.writers}
        return {name for name in files(self.store) if name.startswith("partial/")} - busy

    def begin(self, number: int, *, resume: bool) -> BlobWriter | None:
        """An upload, if it fits beside what has to stay; nothing goes before its bytes come."""
        blob, before = BLOBS[number], files(self.store)
        fits = self.staying() + blob.size <= QUOTA
        try:
            writer = self.store.begin(blob, self.store.unfinished_bytes(blob) if resume else 0)
        except BlobQuotaError as error:
            assert error.hint is not None and "--blob-quota" in error.hint
            assert files(self.store) == before, "what is refused costs nobody anything"
            assert not fits
            return None
        assert fits
        self.writers.append(writer)
        gone = before.keys() - files(self.store).keys()
        assert not any(name.startswith("objects/") for name in gone)
        return writer

    def send(self, writer: BlobWriter, data: bytes) -> None:
        """Append, having checked what went to make room for it."""
        before, taken = files(self.store), self.store.taken_bytes()
        writer.append(data)
        gone = before.keys() - files(self.store).keys()
        assert not gone & {f"objects/{digest}" for digest in self.protected()}
        assert not gone or taken + max(len(data), STEP) > QUOTA, "nothing goes before it must"
        if any(name.startswith("objects/") for name in gone):
            assert not self.idle(), "leftovers go first"

    @rule(number=any_blob, resume=st.booleans())
    def upload(self, number: int, resume: bool) -> None:
        writer = self.begin(number, resume=resume)
        if writer is not None:
            self.finish(writer)

    @rule(number=any_blob, share=st.floats(0, 1), resume=st.booleans())
    def begin_upload(self, number: int, share: float, resume: bool) -> None:
        writer = self.begin(number, resume=resume)
        if writer is not None:
            left = DATA[number][writer.size :]
            self.send(writer, left[: int(len(left) * share)])

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), whole=st.booleans())
    def end_upload(self, data: st.DataObject, whole: bool) -> None:
        writer = data.draw(st.sampled_from(self.writers))
        if whole:
            self.finish(writer)
        else:
            writer.close()
            self.writers.remove(writer)

    def finish(self, writer: BlobWriter) -> None:
        self.send(writer, DATA[BLOBS.index(writer.blob)][writer.size :])
        writer.commit()
        writer.close()
        self.promised[writer.blob.digest] = self.clock.now + PROMISE_S
        self.writers.remove(writer)

    @rule(number=any_blob)
    def job_begins(self, number: int) -> None:
        if self.store.has(BLOBS[number]) and not self.store.promise([BLOBS[number]]):
            return  # it is refused
        self.store.hold([BLOBS[number].digest])
        self.store.redeem([BLOBS[number].digest])
        self.holds[BLOBS[number].digest] += 1
        self.promised.pop(BLOBS[number].digest, None)

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def job_ends(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.holds)))
        self.store.let_go([digest])
        self.holds = self.holds - Counter([digest])

    @rule(numbers=st.sets(any_blob))
    def find_missing(self, numbers: set[int]) -> None:
        asked = [BLOBS[number] for number in numbers]
        here = {blob.digest for blob in asked if self.store.has(blob)}
        room = QUOTA - self.staying()
        there = self.store.promise(asked)
        assert there >= here & self.protected() and there <= here
        left = [blob.size for blob in asked if blob.digest in here - there]
        room -= sum(blob.size for blob in asked if blob.digest in there - self.protected())
        assert room >= 0 and all(size > room for size in left), "what cannot stay is not promised"
        self.promised.update((digest, self.clock.now + PROMISE_S - 1) for digest in there)

    @rule(number=any_blob)
    def download(self, number: int) -> None:
        if self.store.has(BLOBS[number]):
            with self.store.open(BLOBS[number].digest) as file:
                assert file.read() == DATA[number]

    @rule(seconds=st.sampled_from([1.0, PROMISE_S / 2, PROMISE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def tracker_dies(self) -> None:
        """What was promised is as good as its files' times."""
        for writer in self.writers:
            os.close(writer._fd)
        self.writers.clear()
        self.open_store()
        self.promised = {blob.digest: self.store.path(blob.digest).stat().st_mtime + PROMISE_S for blob in self.store}

    @invariant()
    def books_are_those_of_the_disk(self) -> None:
        on_disk = sum(files(self.store).values())
        assert on_disk <= self.store.taken_bytes() <= min(QUOTA, on_disk + STEP * len(self.writers))

    @invariant()
    def what_was_let_in_finds_room(self) -> None:
        assert self.staying() <= QUOTA or not self.writers


Quota.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestQuota = Quota.TestCase


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_longest_unused_goes_first_also_after_a_restart(tmp_path: Path, clock: Clock) -> None:
    gone: list[str] = []
    store = TrackerBlobs(tmp_path, QUOTA, clock=clock)
    a, b, c = (store.put(text * 30) for text in (b"a", b"b", b"c"))
    store.open(a.digest).close()
    clock.now += PROMISE_S + 1
    again = TrackerBlobs(tmp_path, QUOTA, on_evict=gone.append, clock=clock)
    again.put(b"d" * 30)
    assert gone == [b.digest] and not again.has(b) and again.has(a) and again.has(c)
    again.put(b"e" * 60)
    assert gone == [b.digest, c.digest, a.digest]


def test_who_announces_much_and_sends_nothing_costs_nobody_anything(tmp_path: Path, clock: Clock) -> None:
    store = TrackerBlobs(tmp_path, QUOTA, clock=clock)
    cached, other = store.put(b"c" * 40), store.put(b"o" * 40)
    clock.now += PROMISE_S + 1
    with store.begin(blob_of(b"m" * 90)) as writer:
        assert store.has(cached) and store.has(other)
        with pytest.raises(BlobQuotaError, match=r"20 more bytes do not fit"):
            store.put(b"n" * 20)
        assert store.promise([cached]) == set(), "it has to give way if what was announced comes"
        writer.append(b"m" * 90)
        writer.commit()
    assert not store.has(cached) and not store.has(other)


def test_leftovers_go_before_blobs(tmp_path: Path, clock: Clock) -> None:
    store = TrackerBlobs(tmp_path, QUOTA, clock=clock)
    old = store.put(b"o" * 40)
    clock.now += PROMISE_S + 1
    with store.begin(blob_of(b"half" * 10)) as writer:
        writer.append(b"half" * 9)
    assert store.taken_bytes() == 76
    store.put(b"n" * 50)
    assert store.has(old) and list(store.unfinished()) == []


def test_what_was_just_sent_waits_for_its_job(tmp_path: Path, clock: Clock) -> None:
    store = TrackerBlobs(tmp_path, QUOTA, clock=clock)
    sent = store.put(b"s" * 80)
    with pytest.raises(BlobQuotaError, match=r"80 more bytes do not fit.*60 of the 100"):
        store.put(b"t" * 80)
    clock.now += PROMISE_S + 1
    store.put(b"t" * 80)
    assert not store.has(sent)


def test_without_a_quota_it_takes_a_share_of_the_disk(tmp_path: Path) -> None:
    store = TrackerBlobs(tmp_path)
    status = os.statvfs(tmp_path)
    assert store.quota_bytes() == pytest.approx(status.f_bavail * status.f_frsize * DISK_SHARE, rel=0.05)


def test_jobs_hold_what_they_need_and_kept_results_give_way_last(
    tmp_path: Path, clock: Clock, artifact: Artifact
) -> None:
    packed = pack(artifact)
    store = TrackerBlobs(tmp_path / "blobs", 1 << 20, clock=clock)
    parts = [store.put(data) for _, data in packed.blobs()]
    given, made = store.put(b"input"), store.put(b"output")
    spec = JobSpec(packed.blob, "main", RunTask((Tensor("x", "int8", (5,), given),)))
    catalog = Catalog(store, FileOwners(tmp_path / "owners"))
    needed = Needed(store, catalog.members_of)
    jobs = [JobAccepted(name, seq, spec, (), "", 0) for seq, name in enumerate(("one", "two"))]
    done = JobDone("one", JobResult(Outcome(OutcomeKind.OK), (Tensor("y", "int8", (6,), made),)), 5)
    inputs = {blob.digest for blob in (*parts, given)}

    def left() -> set[str]:
        """What is there after all that may go has gone."""
        clock.now += PROMISE_S + 1
        while list(store):
            try:
                store.make_room((1 << 20) - store.taken_bytes() + 1)
            except BlobQuotaError:
                break
        return {blob.digest for blob in store}

    needed.expected(jobs)
    needed.expected([done])
    clock.now += PROMISE_S / 2
    with pytest.raises(BlobQuotaError):
        store.make_room(1 << 20)
    assert store.has(made), "whoever waits for it has some minutes"
    clock.now += PROMISE_S
    unused = store.put(b"newer, and no result's")
    clock.now += PROMISE_S + 1
    store.make_room((1 << 20) - store.taken_bytes() + 1)
    assert not store.has(unused) and store.has(made), "outputs go last"
    assert left() == inputs
    needed.stored([done])
    assert left() == inputs, "the other job needs the same"
    needed.stored([JobWithdrawn("two")])
    assert left() == set()


def test_outputs_of_kept_results_are_remembered_until_those_are_forgotten(tmp_path: Path, clock: Clock) -> None:
    store = TrackerBlobs(tmp_path, QUOTA, clock=clock)
    needed = Needed(store, lambda manifest: ())
    output, newer = store.put(b"o" * 40), store.put(b"n" * 40)
    needed.restore((), [("one", output.digest), ("two", output.digest)])
    needed.forgotten(["one"])
    clock.now += PROMISE_S + 1
    store.make_room(60)
    assert store.has(output) and not store.has(newer)
    clock.now += PROMISE_S + 1
    newer = store.put(b"n" * 40)
    needed.forgotten(["two"])
    clock.now += PROMISE_S + 1
    store.make_room(60)
    assert store.has(newer) and not store.has(output)


def test_outputs_that_gave_way_shut_nobody_out_and_are_told(
    tmp_path: Path, artifact: Artifact, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedge.rpc.tracker.blobs.PROMISE_S", 0.0)
    large = b"y" * (1 << 20)
    with (
        start(port=0, data_dir=tmp_path, settings=QUICK, insecure_loopback=True, blob_quota=3 << 19) as tracker,
        connect(tracker.address) as fleet,
        FakeAgent(tracker.address, device_info()) as agent,
        open_channel(tracker.address) as channel,
    ):
        job = fleet.run(artifact, {"x": np.zeros((2, 4), np.float32)})
        assigned = agent.expect(m.AssignJob)
        blobs = BlobClient(channel, tracker.address)
        blobs.upload(blob_of(large), large)
        output = Tensor("y", "int8", (1 << 20,), blob_of(large))
        agent.say(m.JobStarted(assigned.lease))
        agent.say(m.JobFinished(assigned.lease, JobResult(Outcome(OutcomeKind.OK), (output,))))
        assert job.wait(timeout=60)["y"].nbytes == 1 << 20
        other = b"z" * (1 << 20)
        blobs.upload(blob_of(other), other)
        with pytest.raises(MissingBlobError, match=f"job {job.id} is done, .* needed the room") as gone:
            job.wait(timeout=60)
        assert gone.value.hint is not None and "--blob-quota" in gone.value.hint


def test_a_full_tracker_refuses_an_upload_and_takes_it_when_the_job_is_done(tmp_path: Path, artifact: Artifact) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    with (
        start(port=0, data_dir=tmp_path, settings=QUICK, insecure_loopback=True, blob_quota=1 << 20) as tracker,
        connect(tracker.address) as fleet,
        FakeAgent(tracker.address, device_info()) as agent,
        open_channel(tracker.address) as channel,
    ):
        job = fleet.run(artifact, {"x": x})
        assigned = agent.expect(m.AssignJob)
        blobs = BlobClient(channel, tracker.address)
        large = b"l" * (1 << 20)
        with pytest.raises(BlobQuotaError, match=r"do not fit into the tracker's blob store") as caught:
            blobs.upload(blob_of(large), large)
        assert caught.value.hint is not None and "--blob-quota" in caught.value.hint
        agent.finish(assigned)
        job.wait(timeout=60)
        blobs.upload(blob_of(large), large)


ANN, BOB = Principal("ann", Role.SUBMIT), Principal("bob", Role.SUBMIT)


def test_what_a_user_may_have_is_what_cannot_go(tmp_path: Path, clock: Clock) -> None:
    store = TrackerBlobs(tmp_path / "blobs", 100, clock=clock)
    owners = FileOwners(tmp_path / "owners")
    allowance = Allowance(store, owners)
    sent, other = store.put(b"s" * 30), blob_of(b"o" * 30)
    owners.add(ANN.owner, sent.digest)
    with pytest.raises(
        BlobQuotaError, match=r"30 more bytes .* 10 more than user 'ann' may have .* 50, .* have 30"
    ) as no:
        allowance.check(ANN, [other])
    assert no.value.hint is not None and "--blob-quota-per-user" in no.value.hint
    allowance.check(ANN, [sent, blob_of(b"x" * 20)])  # what is there counts once
    allowance.check(BOB, [other])
    for role in (Role.AGENT, Role.PEER):
        allowance.check(Principal("ann", role), [blob_of(b"y" * 90)])
    owners.add(BOB.owner, sent.digest)
    with pytest.raises(BlobQuotaError):
        allowance.check(BOB, [other])
    clock.now += PROMISE_S + 1
    allowance.check(ANN, [other])  # nobody needs it any more
    store.hold([sent.digest])
    store.hold([sent.digest])
    allowance.check(ANN, [blob_of(b"x" * 20)])
    with pytest.raises(BlobQuotaError):
        allowance.check(ANN, [other])
    again = Allowance(store, FileOwners(tmp_path / "owners"), 10)
    with pytest.raises(BlobQuotaError, match=r"have 30"):
        again.check(BOB, [blob_of(b"z")])


def test_uploads_under_way_count_with_all_that_they_announce(tmp_path: Path) -> None:
    allowance = Allowance(TrackerBlobs(tmp_path / "blobs", 100), FileOwners(tmp_path / "owners"))
    a, b = blob_of(b"a" * 30), blob_of(b"b" * 30)
    with allowance.upload(ANN, a):
        with pytest.raises(BlobQuotaError), allowance.upload(ANN, b):
            pass
        with allowance.upload(BOB, b):
            pass
    with allowance.upload(ANN, b):
        pass


def test_a_blob_that_is_sent_twice_at_a_time_counts_once(tmp_path: Path) -> None:
    store, owners = TrackerBlobs(tmp_path / "blobs", 100), FileOwners(tmp_path / "owners")
    allowance = Allowance(store, owners)
    catalog = Catalog(store, owners, allowance)
    blob = blob_of(b"a" * 30)
    with allowance.upload(ANN, blob):
        with allowance.upload(ANN, blob):
            assert catalog.missing([blob], ANN) == [blob]
        with pytest.raises(BlobQuotaError, match="have 30"):
            allowance.check(ANN, [Blob(blob.digest, 40)])
        owners.add(ANN.owner, store.put(b"a" * 30).digest)
        allowance.check(ANN, [blob, blob_of(b"b" * 20)])
    with pytest.raises(BlobQuotaError):
        allowance.check(ANN, [Blob(blob.digest, 40)])


def test_inputs_beyond_what_jobs_may_carry_become_blobs(tmp_path: Path, artifact: Artifact) -> None:
    settings = replace(QUICK, max_carried_bytes_per_user=40)
    with (
        start(port=0, data_dir=tmp_path, settings=settings, insecure_loopback=True) as tracker,
        connect(tracker.address) as fleet,
    ):
        jobs = [fleet.run(artifact, {"x": np.full((2, 4), number, np.float32)}) for number in range(3)]
        with FakeAgent(tracker.address, device_info()) as agent, open_channel(tracker.address) as channel:
            blobs = BlobClient(channel, tracker.address)
            for number, job in enumerate(jobs):
                assigned = agent.expect(m.AssignJob)
                assert not isinstance(assigned.spec.task, SessionTask)
                data = assigned.spec.task.inputs[0].data
                assert isinstance(data, Blob) == (number > 0)
                whole = blobs.read(data) if isinstance(data, Blob) else data
                assert np.frombuffer(whole, np.float32).tolist() == [number] * 8
                agent.say(m.JobStarted(assigned.lease))
                agent.say(m.JobFinished(assigned.lease, JobResult(Outcome(OutcomeKind.OK))))
                assert job.wait(timeout=60).outcome.ok
            fleet.run(artifact, {"x": np.zeros((2, 4), np.float32)})
            (tensor,) = agent.expect(m.AssignJob).spec.task.inputs
            assert isinstance(tensor.data, bytes), "the others are done"


def test_inputs_that_become_blobs_are_their_users_and_count(tmp_path: Path) -> None:
    store, owners = TrackerBlobs(tmp_path / "blobs", 100), FileOwners(tmp_path / "owners")
    catalog = Catalog(store, owners)

    def spec(data: bytes) -> JobSpec:
        return JobSpec(Blob("0" * 64, 1), "main", RunTask((Tensor("x", "int8", (len(data),), data),)))

    stored = asyncio.run(catalog.store_inputs(spec(b"x" * 30), ANN))
    blob = blob_of(b"x" * 30)
    assert stored.task.inputs == (Tensor("x", "int8", (30,), blob),) and store.read(blob.digest) == b"x" * 30
    assert owners.has(ANN, blob.digest) and not owners.has(BOB, blob.digest)
    assert asyncio.run(catalog.store_inputs(spec(b"x" * 30), ANN)) == stored
    with pytest.raises(BlobQuotaError):
        asyncio.run(catalog.store_inputs(spec(b"y" * 30), ANN))
