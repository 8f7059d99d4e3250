"""Jobs in the real runner: what works, and every way in which one can fail."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from kedge.device_agent import cache as caching
from kedge.device_agent import jobs
from kedge.device_agent.agent import sendable
from kedge.device_agent.cache import ArtifactCache, CacheFullError
from kedge.device_agent.jobs import Board, Job
from kedge.device_agent.results import ResultStore, to_pb
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.blobs import BlobError, BlobQuotaError, BlobStore, CorruptBlobError, DiskFullError, blob_of
from kedge.rpc.errors import ConnectError, PermissionDeniedError
from kedge.rpc.measure import POWERSAVE
from kedge.rpc.outcome import Outcome, OutcomeKind, Stage
from kedge.rpc.types import (
    MAX_PROFILE_SAMPLES,
    MAX_SAMPLES,
    BenchTask,
    Blob,
    Deadlines,
    Health,
    JobResult,
    JobSpec,
    Lease,
    Measurement,
    RunTask,
    Tensor,
    TimeOptions,
    Verdict,
)
from support.doubling import gpu_artifact, opencl_device
from support.handmade import artifact, compile_module

from .conftest import FUNCTIONS, Remote


@pytest.fixture
def made(module: bytes) -> Artifact:
    return artifact(module, FUNCTIONS)


#: A few nanoseconds of work, repeated until the clock can see it.
LONG = TimeOptions(repeat=5, min_repeat_ns=200_000)


def floats(*values: float) -> Tensor:
    return Tensor("x", "float32", (len(values),), struct.pack(f"<{len(values)}f", *values))


def run_spec(manifest: Blob, function: str, deadlines: Deadlines | None = None) -> JobSpec:
    return JobSpec(manifest, function, RunTask((floats(1, 2, 3),)), deadlines=deadlines or Deadlines())


def run_job(job: Job) -> JobResult:
    """The result of a job that has cleaned up."""
    try:
        return job.run()
    finally:
        job.clean_up()


def execute(board: Board, spec: JobSpec) -> JobResult:
    stages: list[Stage] = []
    result = run_job(Job(board, spec, stages.append))
    assert list(board.scratch.iterdir()) == [], "a job's folder is removed, whatever happened"
    order = [Stage.TRANSFER, Stage.LOAD, Stage.RUN, Stage.TRANSFER]
    assert stages == order[: len(stages)], "stages come in their order"
    return result


def test_a_run_returns_outputs_and_stage_times(board: Board, remote: Remote, made: Artifact) -> None:
    result = execute(board, run_spec(remote.publish(made), "add"))
    assert result.outcome.ok, result.outcome
    (y,) = result.outputs
    assert (y.name, y.dtype, y.shape) == ("y", "float32", (3,))
    assert isinstance(y.data, bytes)
    assert struct.unpack("<3f", y.data) == (2.0, 3.0, 4.0)
    assert [item.stage for item in result.stage_times] == [Stage.TRANSFER, Stage.LOAD, Stage.RUN]
    assert all(item.duration_ns > 0 for item in result.stage_times)
    assert result.device == "here"


def test_weights_in_parts_are_put_together_and_fetched_once(board: Board, remote: Remote, made: Artifact) -> None:
    manifest = remote.publish(made)
    for _ in range(2):
        result = execute(board, run_spec(manifest, "weigh"))
        (y,) = result.outputs
        assert isinstance(y.data, bytes)
        assert struct.unpack("<3f", y.data) == (11.0, 12.0, 13.0)
    assert len(remote.fetched) == len(set(remote.fetched)) == 4


def test_large_tensors_travel_as_blobs_both_ways(board: Board, remote: Remote, made: Artifact) -> None:
    count = (1 << 20) // 4 + 1
    values = struct.pack("<f", 4.0) * count
    blob = remote.store.put(values)
    spec = replace(run_spec(remote.publish(made), "add"), task=RunTask((Tensor("x", "float32", (count,), blob),)))
    stages: list[Stage] = []
    result = run_job(Job(board, spec, stages.append))
    assert stages[2:] == [Stage.RUN, Stage.TRANSFER], "the time of the upload is not that of the run"
    assert result.outcome.ok, result.outcome
    (y,) = result.outputs
    assert isinstance(y.data, Blob)
    assert remote.store.read(y.data.digest) == struct.pack("<f", 5.0) * count


def test_outputs_can_be_discarded(board: Board, remote: Remote, made: Artifact) -> None:
    spec = replace(run_spec(remote.publish(made), "add"), task=RunTask((floats(1),), discard_outputs=True))
    result = execute(board, spec)
    assert result.outcome.ok
    assert result.outputs == ()


@pytest.mark.parametrize(
    ("function", "kind", "stage", "signal", "status", "words"),
    [
        ("crash", OutcomeKind.CRASH, Stage.RUN, 11, 0, "SIGSEGV"),
        ("leave", OutcomeKind.CRASH, Stage.RUN, 0, 7, "leaving for good"),
        ("refuse", OutcomeKind.CRASH, Stage.RUN, 0, 0, "kernel"),
        ("hog", OutcomeKind.OUT_OF_MEMORY, Stage.RUN, 0, 0, ""),
        ("absent", OutcomeKind.BAD_REQUEST, Stage.TRANSFER, 0, 0, "it has: add, crash"),
    ],
)
def test_what_goes_wrong_has_a_name(
    board: Board, remote: Remote, made: Artifact,
    function: str, kind: OutcomeKind, stage: Stage, signal: int, status: int, words: str,
) -> None:  # fmt: skip
    manifest = remote.publish(made)
    outcome = execute(board, run_spec(manifest, function)).outcome
    assert (outcome.kind, outcome.stage, outcome.signal, outcome.exit_status) == (kind, stage, signal, status)
    assert words in outcome.message
    assert execute(board, run_spec(manifest, "add")).outcome.ok, "the next job is not harmed"


def test_a_kernel_that_never_ends_meets_the_deadline_of_its_stage(board: Board, remote: Remote, made: Artifact) -> None:
    began = time.monotonic()
    outcome = execute(board, run_spec(remote.publish(made), "spin", Deadlines(run_ms=300))).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.TIMEOUT, Stage.RUN)
    assert time.monotonic() - began < 60


def test_a_runner_that_the_deadline_left_no_time_to_start(
    board: Board, remote: Remote, made: Artifact, tmp_path: Path
) -> None:
    silent = tmp_path / "silent-runner"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    manifest = remote.publish(made)
    slow = replace(board, runner=silent)
    outcome = execute(slow, run_spec(manifest, "add", Deadlines(load_ms=300))).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.TIMEOUT, Stage.LOAD), outcome
    assert "300 ms" in outcome.message


def test_a_folder_that_cannot_be_made_is_the_devices_fault(board: Board, remote: Remote, made: Artifact) -> None:
    board.scratch.rmdir()
    outcome = run_job(Job(board, run_spec(remote.publish(made), "add"), lambda _: None)).outcome
    assert outcome.kind is OutcomeKind.DEVICE_FAULT and "No such file" in outcome.message


@pytest.mark.parametrize(
    "options",
    [
        TimeOptions(repeat=0), TimeOptions(repeat=MAX_SAMPLES + 1),
        TimeOptions(repeat=MAX_PROFILE_SAMPLES + 1, profile=True),
    ],
)  # fmt: skip
def test_samples_that_no_message_carries_are_refused(
    board: Board, remote: Remote, made: Artifact, options: TimeOptions
) -> None:
    task = BenchTask((floats(1),), options)
    outcome = execute(board, replace(run_spec(remote.publish(made), "add"), task=task)).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.BAD_REQUEST, Stage.TRANSFER)
    assert "repeat" in outcome.message


def test_a_result_that_cannot_be_sent_says_so_instead(board: Board, remote: Remote, made: Artifact) -> None:
    lease = Lease("j", 1)
    task = BenchTask((floats(1, 2, 3),), TimeOptions(repeat=MAX_SAMPLES), return_outputs=True)
    full = execute(board, replace(run_spec(remote.publish(made), "add"), task=task))
    assert full.outcome.kind in (OutcomeKind.OK, OutcomeKind.INVALID_MEASUREMENT)
    assert sendable(lease, full).result is full, "the most samples that are allowed do fit"
    assert full.measurement is not None
    measured = replace(full.measurement, samples_ns=full.measurement.samples_ns * 3)
    for result, words in (
        (replace(full, measurement=measured), "bytes, and at most"),
        (JobResult(Outcome(OutcomeKind.OK, message="a folder named \udce9")), "cannot be sent"),
    ):
        instead = sendable(lease, result).result.outcome
        assert instead.kind is OutcomeKind.BAD_REQUEST and words in instead.message
        assert len(convert.job_result_to_bytes(JobResult(instead))) < 1_000


def test_a_result_is_converted_once_however_often_it_is_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    converted = []
    convert_result = convert.job_result_to_pb
    monkeypatch.setattr(convert, "job_result_to_pb", lambda each: [converted.append(each), convert_result(each)][1])
    finished = m.JobFinished(Lease("j", 2), JobResult(Outcome(OutcomeKind.OK), (floats(1, 2),), device="here"))
    packed = sendable(finished.lease, finished.result)
    store = ResultStore(tmp_path / "results")
    store.keep(packed)
    sent = [to_pb(packed, number) for number in (4, 5)]
    assert converted == [finished.result]
    assert [message.request_id for message in sent] == [4, 5]
    assert [convert.agent_message_from_pb(message) for message in sent] == [finished] * 2
    assert store.load() == [finished]


def test_what_is_too_long_to_read_is_cut_and_the_result_is_sent() -> None:
    measured = Measurement(TimeOptions(), (1.0, 2.0), 1, 1, reasons=("x" * 5_000, "short"))
    full = JobResult(Outcome(OutcomeKind.OK, message="y" * 100_000), measurement=measured)
    sent = sendable(Lease("j", 1), full).result
    assert sent.outcome.kind is OutcomeKind.OK and sent.measurement is not None
    assert sent.outcome.message == "y" * ((64 << 10) - 1) + "…"
    assert sent.measurement.reasons == ("x" * 999 + "…", "short") and sent.measurement.samples_ns == (1.0, 2.0)


def test_a_transfer_that_stalls_meets_its_deadline(board: Board, remote: Remote, made: Artifact) -> None:
    remote.gate.clear()
    outcome = execute(board, run_spec(remote.publish(made), "add", Deadlines(transfer_ms=200))).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.TIMEOUT, Stage.TRANSFER)
    assert "200 ms" in outcome.message


def test_a_tracker_that_comes_back_in_time_is_waited_for(board: Board, remote: Remote, made: Artifact) -> None:
    remote.away = 2
    assert execute(board, run_spec(remote.publish(made), "add")).outcome.ok


def test_a_tracker_that_stays_away_is_a_transfer_timeout(board: Board, remote: Remote, made: Artifact) -> None:
    remote.away = 1 << 30
    outcome = execute(board, run_spec(remote.publish(made), "add", Deadlines(transfer_ms=300))).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.TIMEOUT, Stage.TRANSFER)


@pytest.mark.parametrize("error", [DiskFullError, BlobQuotaError])
def test_a_tracker_without_room_for_a_result_is_waited_for(
    board: Board, remote: Remote, made: Artifact, monkeypatch: pytest.MonkeyPatch, error: type[BlobError]
) -> None:
    data = struct.pack("<f", 1.5) * ((1 << 18) + 1)
    x = Tensor("x", "float32", (len(data) // 4,), remote.store.put(data))
    take, refusals = remote.upload, 1

    def upload(blob: Blob, source: bytes | memoryview) -> None:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise error("no room on the tracker")
        take(blob, source)

    monkeypatch.setattr(remote, "upload", upload)
    spec = replace(run_spec(remote.publish(made), "add", Deadlines(transfer_ms=3_000)), task=RunTask((x,)))
    assert execute(board, spec).outcome.ok
    refusals = 1 << 30
    outcome = execute(board, replace(spec, deadlines=Deadlines(transfer_ms=600))).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.TIMEOUT, Stage.TRANSFER)
    assert "no room on the tracker" in outcome.message


def test_a_tracker_without_room_for_what_another_one_has_is_waited_for(
    board: Board, remote: Remote, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, refusals = remote.download, 1

    def download(blob: Blob, store: BlobStore) -> Path:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise BlobQuotaError("no room on the tracker")
        return take(blob, store)

    monkeypatch.setattr(remote, "download", download)
    assert execute(board, run_spec(remote.publish(made), "add")).outcome.ok


def test_a_result_of_a_job_that_others_have_by_now(
    board: Board, remote: Remote, made: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The device was cut off for longer than its lease: what it has is not wanted, and that is no bug."""
    data = struct.pack("<f", 1.5) * ((1 << 18) + 1)
    x = Tensor("x", "float32", (len(data) // 4,), remote.store.put(data))

    def refuse(_blob: Blob, _source: bytes | memoryview) -> None:
        raise PermissionDeniedError("a device sends blobs only while it holds a job")

    monkeypatch.setattr(remote, "upload", refuse)
    outcome = execute(board, replace(run_spec(remote.publish(made), "add"), task=RunTask((x,)))).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.DEVICE_FAULT, Stage.TRANSFER)
    assert "only while it holds a job" in outcome.message and caplog.records == []


@pytest.mark.parametrize("function", ["spin", "add"])
def test_cancelling(board: Board, remote: Remote, made: Artifact, function: str) -> None:
    """In the middle of native code that does not listen, and in the middle of a transfer."""
    manifest = remote.publish(made)
    entered = remote.waiting
    if function == "add":
        remote.gate.clear()
    else:
        entered = threading.Event()
    job = Job(board, run_spec(manifest, function), lambda stage: entered.set() if stage is Stage.RUN else None)
    results: list[JobResult] = []
    thread = threading.Thread(target=lambda: results.append(run_job(job)))
    thread.start()
    assert entered.wait(60)
    job.cancel("enough")
    job.cancel("again")
    thread.join(60)
    (result,) = results
    assert result.outcome.kind is OutcomeKind.CANCELLED
    assert result.outcome.message == "enough"
    assert list(board.scratch.iterdir()) == []


def test_cancelled_before_it_began(board: Board, remote: Remote, made: Artifact) -> None:
    job = Job(board, run_spec(remote.publish(made), "add"), lambda _: None)
    job.cancel("never mind")
    assert run_job(job).outcome.kind is OutcomeKind.CANCELLED


def test_native_code_starts_no_process_and_leaves_no_file(board: Board, remote: Remote, made: Artifact) -> None:
    result = execute(board, run_spec(remote.publish(made), "litter"))
    assert result.outcome.ok, result.outcome
    assert isinstance(result.outputs[0].data, bytes)
    assert struct.unpack("<3f", result.outputs[0].data)[0] == -1, "what fork gave it"


def test_another_architecture_is_refused_before_anything_is_fetched(
    board: Board, remote: Remote, module: bytes
) -> None:
    made = artifact(module, FUNCTIONS, arch="aarch64" if board.device.arch != "aarch64" else "x86_64")
    manifest = remote.publish(made)
    outcome = execute(board, run_spec(manifest, "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.LOAD_ERROR, Stage.LOAD)
    assert "cannot run on this" in outcome.message
    assert remote.fetched == [manifest.digest]


def test_a_missing_cpu_feature_is_refused(board: Board, remote: Remote, module: bytes) -> None:
    made = artifact(module, FUNCTIONS, features=("warp-drive",))
    outcome = execute(board, run_spec(remote.publish(made), "add")).outcome
    assert outcome.kind is OutcomeKind.LOAD_ERROR
    assert "warp-drive" in outcome.message


def test_a_module_whose_manifest_hides_what_it_needs_is_refused_by_the_runtime(
    board: Board, remote: Remote, tmp_path: Path
) -> None:
    source = Path(__file__).with_name("module.c")
    lib = compile_module(source, tmp_path / "lib.so", features="warp-drive").read_bytes()
    outcome = execute(board, run_spec(remote.publish(artifact(lib, FUNCTIONS)), "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.LOAD_ERROR, Stage.LOAD)
    assert "warp-drive" in outcome.message


@pytest.mark.parametrize("lib", [b"not a library at all" * 100, b""])
def test_a_library_that_is_none(board: Board, remote: Remote, lib: bytes) -> None:
    outcome = execute(board, run_spec(remote.publish(artifact(lib, FUNCTIONS)), "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.LOAD_ERROR, Stage.LOAD)


def test_functions_in_another_order_than_promised(board: Board, remote: Remote, module: bytes) -> None:
    made = artifact(module, tuple(reversed(FUNCTIONS)))
    outcome = execute(board, run_spec(remote.publish(made), "weigh")).outcome
    assert outcome.kind is OutcomeKind.LOAD_ERROR
    assert f"promises 'weigh' as function {FUNCTIONS[::-1].index('weigh')}" in outcome.message


def test_a_manifest_that_is_none(board: Board, remote: Remote) -> None:
    outcome = execute(board, run_spec(remote.store.put(b"{}"), "add")).outcome
    assert outcome.kind is OutcomeKind.LOAD_ERROR
    assert "not a kedge manifest" in outcome.message


def test_members_that_their_parts_do_not_make_up(board: Board, remote: Remote, made: Artifact) -> None:
    members = list(made.manifest.members)
    swapped = replace(members[1], parts=tuple(reversed(members[1].parts)))
    manifest = replace(made.manifest, members=(members[0], swapped))
    remote.publish(made)
    outcome = execute(board, run_spec(remote.store.put(manifest.to_json()), "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.LOAD_ERROR, Stage.TRANSFER)
    assert "corrupt" in outcome.message


def test_a_blob_that_arrives_corrupt(board: Board, remote: Remote, made: Artifact) -> None:
    manifest = remote.publish(made)
    lib = made.manifest.member("lib.so")
    path = remote.store.path(lib.digest)
    path.write_bytes(b"\0" + path.read_bytes()[1:])
    outcome = execute(board, run_spec(manifest, "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.LOAD_ERROR, Stage.TRANSFER)
    assert lib.digest in outcome.message


@pytest.mark.parametrize("restarted", [True, False], ids=["while-it-was-off", "while-it-ran"])
def test_a_blob_that_rotted_on_the_devices_disk_is_fetched_again(
    board: Board, remote: Remote, made: Artifact, tmp_path: Path, restarted: bool
) -> None:
    manifest = remote.publish(made)
    assert execute(board, run_spec(manifest, "weigh")).outcome.ok
    cache = tmp_path / "agent" / "cache"
    kept = (*cache.glob("blobs/objects/*/*"), *cache.glob("members/*"))
    assert kept
    for path in kept:
        path.write_bytes(b"\xff" + path.read_bytes()[1:])
    later = replace(board, cache=ArtifactCache(cache, 1 << 28)) if restarted else board
    assert execute(later, run_spec(manifest, "weigh")).outcome.ok
    for path in (*cache.glob("blobs/objects/*/*"), *cache.glob("members/*")):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


def test_a_blob_that_was_verified_is_not_the_one_of_another_size(tmp_path: Path, remote: Remote) -> None:
    cache, blob = ArtifactCache(tmp_path / "cache", 1000), remote.store.put(b"weights")
    asked: list[int] = []

    def fetch(wanted: Blob, store: BlobStore) -> None:
        asked.append(wanted.size)
        if wanted == blob:
            remote.download(wanted, store)

    with cache.hold() as hold:
        hold.fetch([blob], fetch)
        hold.fetch([blob], fetch)
        assert asked == [7]
        hold.fetch([replace(blob, size=8)], fetch)
    assert asked == [7, 8], "the store has none that is so large: whoever has it is asked, and refuses"


def test_what_a_job_was_shown_is_not_read_again_for_the_next(
    board: Board, remote: Remote, made: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    real = caching._hash
    monkeypatch.setattr(caching, "_hash", lambda path: read.append(path) or real(path))
    spec = run_spec(remote.publish(made), "weigh")
    again = {}
    for guarded in (True, False):
        own = replace(board, cache=ArtifactCache(tmp_path / str(guarded), 1 << 28, guarded=guarded))
        assert execute(own, spec).outcome.ok
        read.clear()
        assert execute(own, spec).outcome.ok
        again[guarded] = len(read)
    assert again[True] == 0 < again[False], "where a job could write, what a link changed is looked at"


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((), "takes the inputs x; given: (none)"),
        ((replace(floats(1), name="z"),), "given: z"),
        ((floats(1), floats(1)), "given: x, x"),
        ((Tensor("x", "float64", (1,), b"\0" * 8),), "does not take float64[1]"),
        ((Tensor("x", "float32", (1, 1), b"\0" * 4),), "does not take float32[1, 1]"),
        ((Tensor("x", "float32", (3,), b"\0" * 4),), "takes 12 bytes"),
        ((Tensor("x", "float32", (0,), b""),), ""),
    ],
)
def test_inputs_that_do_not_fit(
    board: Board, remote: Remote, made: Artifact, inputs: tuple[Tensor, ...], words: str
) -> None:
    spec = replace(run_spec(remote.publish(made), "add"), task=RunTask(inputs))
    outcome = execute(board, spec).outcome
    assert outcome.kind is OutcomeKind.BAD_REQUEST, outcome
    assert words in outcome.message


def test_more_threads_than_the_device_offers(board: Board, remote: Remote, made: Artifact) -> None:
    outcome = execute(board, replace(run_spec(remote.publish(made), "add"), num_threads=3)).outcome
    assert outcome.kind is OutcomeKind.BAD_REQUEST
    assert "wants 3 threads; here offers 2" in outcome.message


def test_blobs_that_the_tracker_lacks(board: Board, remote: Remote) -> None:
    outcome = execute(board, run_spec(blob_of(b"nobody has this"), "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.BAD_REQUEST, Stage.TRANSFER)


def test_a_runner_that_does_not_start_is_the_devices_fault(
    board: Board, remote: Remote, made: Artifact, tmp_path: Path
) -> None:
    broken = tmp_path / "no-runner"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    outcome = execute(replace(board, runner=broken), run_spec(remote.publish(made), "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.DEVICE_FAULT, Stage.LOAD)


def test_what_does_not_fit_into_the_cache_is_no_fault_of_the_device(
    board: Board, remote: Remote, made: Artifact, tmp_path: Path
) -> None:
    """Three such jobs in a row would otherwise have a sound device quarantined."""
    small = replace(board, cache=ArtifactCache(tmp_path / "small", 1000))
    outcome = execute(small, run_spec(remote.publish(made), "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.OUT_OF_MEMORY, Stage.TRANSFER)
    assert "may hold 1000" in outcome.message


@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own needs root to be mounted")
def test_a_full_disk_is_the_devices_fault(
    board: Board, remote: Remote, made: Artifact, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,nr_inodes=64", "tmpfs", str(disk)], check=True)
    request.addfinalizer(lambda: subprocess.run(["umount", str(disk)], check=True))
    full = replace(board, cache=ArtifactCache(disk, 1 << 28))
    outcome = execute(full, run_spec(remote.publish(made), "add")).outcome
    assert (outcome.kind, outcome.stage) == (OutcomeKind.DEVICE_FAULT, Stage.TRANSFER)
    assert "space" in outcome.message


def test_a_bench_measures_and_says_what_to_think_of_it(board: Board, remote: Remote, made: Artifact) -> None:
    options = replace(LONG, number=2)
    spec = replace(run_spec(remote.publish(made), "add"), num_threads=1)
    result = execute(board, replace(spec, task=BenchTask((floats(1, 2),), options, return_outputs=True)))
    assert result.outcome.ok, result.outcome
    measured = result.measurement
    assert measured is not None
    assert len(measured.samples_ns) == 5
    assert all(sample > 0 for sample in measured.samples_ns)
    assert measured.options.number > 2, "it grew until a repeat lasted long enough"
    assert replace(measured.options, number=2) == options
    assert measured.num_threads == 1
    assert measured.resolution_ns > 0
    assert measured.before is not None
    assert measured.after is not None
    assert measured.verdict in (Verdict.VALID, Verdict.SUSPECT)
    (y,) = result.outputs
    assert isinstance(y.data, bytes)
    assert struct.unpack("<2f", y.data) == (2.0, 3.0)


HOT = Health(temperature_celsius=91.0)
SLOW = Health(temperature_celsius=60.0, throttled=("under-voltage",))
CALM = Health(temperature_celsius=60.0)


FULL = Health(temperature_celsius=60.0, memory_available_bytes=1 << 20)


@pytest.mark.parametrize("at_first", [HOT, SLOW, FULL])
def test_a_measurement_waits_for_the_device_to_be_calm(
    board: Board, remote: Remote, made: Artifact, at_first: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_CALM_PAUSE_S", 0.001)
    readings = iter([at_first, at_first, CALM])
    monkeypatch.setattr(jobs, "read_health", lambda _folder, cpu: next(readings, CALM))
    measured = execute(board, bench_spec(remote.publish(made))).measurement
    assert measured is not None and measured.before == CALM and next(readings, None) is None


def test_a_device_that_stays_hot_is_measured_all_the_same_and_suspected(
    board: Board, remote: Remote, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "read_health", lambda _folder, cpu: replace(HOT, throttled=("heat",)))
    measured = execute(replace(board, calm_s=0.01), bench_spec(remote.publish(made))).measurement
    assert measured is not None and measured.verdict is Verdict.SUSPECT
    assert "the device was hot (91 °C)" in measured.reasons
    assert "the device was slowed down (heat)" in measured.reasons


def test_a_device_without_memory_or_disk_is_measured_all_the_same_and_suspected(
    board: Board, remote: Remote, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "read_health", lambda _folder, cpu: replace(FULL, disk_free_bytes=1 << 20))
    measured = execute(replace(board, calm_s=0.01), bench_spec(remote.publish(made))).measurement
    assert measured is not None and measured.verdict is Verdict.SUSPECT
    (unfit,) = [reason for reason in measured.reasons if "not fit to measure" in reason]
    assert "1 MiB of memory are free, less than 32; 1 MiB of its disk are free" in unfit


def test_a_governor_that_holds_the_lowest_clock_is_told_and_not_waited_for(
    board: Board, remote: Remote, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = replace(CALM, governor="powersave", throttled=(POWERSAVE,))
    monkeypatch.setattr(jobs, "read_health", lambda _folder, cpu: slow)
    measured = execute(replace(board, calm_s=600.0), bench_spec(remote.publish(made))).measurement
    assert measured is not None and f"the device was slowed down ({POWERSAVE})" in measured.reasons


def test_whoever_waits_for_a_device_to_cool_down_can_be_cancelled(
    board: Board, remote: Remote, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Event()

    def hot(_: Path, cpu: int | None) -> Health:
        waits.set()
        return HOT

    monkeypatch.setattr(jobs, "read_health", hot)
    job = Job(replace(board, calm_s=600.0), bench_spec(remote.publish(made)), lambda _: None)
    canceller = threading.Thread(target=lambda: waits.wait(60) and job.cancel("enough"))
    canceller.start()
    result = run_job(job)
    canceller.join()
    assert result.outcome.kind is OutcomeKind.CANCELLED


def bench_spec(manifest: Blob) -> JobSpec:
    return JobSpec(manifest, "add", BenchTask((floats(1, 2, 3),), LONG))


def test_a_measurement_that_says_nothing_is_no_success(board: Board, remote: Remote, made: Artifact) -> None:
    task = BenchTask((floats(1),), TimeOptions(number=1, repeat=3))
    result = execute(board, replace(run_spec(remote.publish(made), "add"), task=task))
    assert result.outcome.kind is OutcomeKind.INVALID_MEASUREMENT, result
    assert "too short for a clock" in result.outcome.message
    assert result.measurement is not None
    assert len(result.measurement.samples_ns) == 3


def test_a_bench_on_an_emulated_device_says_so(board: Board, remote: Remote, made: Artifact) -> None:
    emulated = replace(board, device=replace(board.device, emulated=True))
    spec = replace(run_spec(remote.publish(made), "add"), task=BenchTask((floats(1),), LONG))
    measured = execute(emulated, spec).measurement
    assert measured is not None
    assert measured.verdict is Verdict.EMULATED


def test_what_a_job_holds_is_never_dropped_and_the_longest_unused_goes_first(tmp_path: Path, remote: Remote) -> None:
    cache = ArtifactCache(tmp_path / "cache", 1000)
    blobs = [remote.store.put(bytes([number]) * 400) for number in range(4)]
    with cache.hold() as first:
        first.fetch(blobs[:1], remote.download)
        os.utime(str(first.path(blobs[0])), (1, 1))
        with cache.hold() as second:
            second.fetch(blobs[1:2], remote.download)
        with cache.hold() as third:
            third.fetch(blobs[2:3], remote.download)
            assert first.path(blobs[0]).exists()
            assert not cache.store.has(blobs[1])
    with cache.hold() as last:
        os.utime(str(cache.store.path(blobs[0].digest)), (1, 1))
        last.fetch(blobs[3:4], remote.download)
    assert [cache.store.has(blob) for blob in blobs] == [False, False, True, True]


@pytest.mark.parametrize(
    ("total", "kind", "words"),
    [
        (1 << 30, OutcomeKind.DEVICE_FAULT, "its disk is full of other things"),
        (1_000, OutcomeKind.OUT_OF_MEMORY, "1200 more"),
    ],
)
def test_a_disk_that_others_filled_is_the_devices_fault_and_one_too_small_the_jobs(
    board: Board,
    remote: Remote,
    made: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    total: int,
    kind: OutcomeKind,
    words: str,
) -> None:
    board, spec = replace(board, cache=ArtifactCache(tmp_path / "own")), run_spec(remote.publish(made), "add")
    assert execute(board, spec).outcome.ok
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=total, used=total, free=0))
    large = Tensor("x", "float32", (300,), remote.store.put(bytes(1_200)))
    outcome = execute(board, replace(spec, task=RunTask((large,)))).outcome
    assert (outcome.kind, outcome.stage) == (kind, Stage.TRANSFER), outcome
    assert words in outcome.message


def test_a_damaged_blob_is_never_returned(tmp_path: Path, remote: Remote) -> None:
    blob = remote.store.put(b"x" * 100)
    with ArtifactCache(tmp_path / "cache", 1000).hold() as hold:
        hold.fetch([blob], remote.download)
    (tmp_path / "cache/blobs/objects" / blob.digest[:2] / blob.digest).write_bytes(b"y" * 100)

    def fail(blob: Blob, store: BlobStore) -> None:
        raise CorruptBlobError("asked for it again")

    with ArtifactCache(tmp_path / "cache", 1000).hold() as hold, pytest.raises(CorruptBlobError, match="again"):
        hold.fetch([blob], fail)


def test_what_an_interrupted_transfer_left_counts_and_goes_like_anything_else(tmp_path: Path) -> None:
    cache = ArtifactCache(tmp_path, 1_000)
    left, wanted, other = blob_of(b"l" * 600), blob_of(b"w" * 900), blob_of(b"o" * 400)
    with cache.store.begin(left) as writer:
        writer.append(b"l" * 500)
    assert cache.used_bytes() == 500

    def interrupted(blob: Blob, store: BlobStore) -> None:
        with store.begin(blob) as writer:
            writer.append(b"w" * 800)
            raise ConnectError("the tracker went away")

    with cache.hold() as hold, pytest.raises(ConnectError):
        hold.fetch([wanted], interrupted)
    assert cache.store.committed_bytes(left) == 0 and cache.used_bytes() == 800

    def resume(blob: Blob, store: BlobStore) -> None:
        with store.begin(blob, 800) as writer:
            writer.append(b"w" * 100)
            writer.commit()

    with cache.hold() as hold:
        hold.fetch([wanted], resume)
        assert cache.used_bytes() == 900, "what was there already is not asked room for again"
        with pytest.raises(CacheFullError):
            cache.make_room(other.size)


def test_a_gpu_variant_runs_on_the_gpu_that_the_probe_found(board: Board, remote: Remote) -> None:
    gpu = opencl_device(board.runner)
    made = remote.publish(gpu_artifact())
    able = replace(board, device=replace(board.device, accelerators=(gpu,)), threads=2)
    for on in ("", "opencl", "opencl:0"):
        result = execute(able, replace(run_spec(made, "main"), on=on))
        assert result.outcome.ok, result.outcome
        assert struct.unpack("<3f", bytes(result.outputs[0].data)) == (3, 5, 7)
    bench = replace(run_spec(made, "main"), task=BenchTask((floats(1, 2),), LONG))
    measured = execute(able, bench).measurement
    assert measured is not None and measured.num_threads == 1, "the host only launches"


@pytest.mark.parametrize(
    ("on", "kind", "words"),
    [
        ("", OutcomeKind.LOAD_ERROR, "needs an OpenCL device, and there is none"),
        ("cpu", OutcomeKind.LOAD_ERROR, "no variant for cpu"),
        ("gpu", OutcomeKind.BAD_REQUEST, "there is no device 'gpu'"),
    ],
)
def test_a_gpu_variant_where_there_is_none(
    board: Board, remote: Remote, on: str, kind: OutcomeKind, words: str
) -> None:
    outcome = execute(board, replace(run_spec(remote.publish(gpu_artifact()), "main"), on=on)).outcome
    assert outcome.kind is kind and words in outcome.message, outcome


def test_manifests_are_read_once_and_the_last_ones_are_remembered(
    tmp_path: Path, made: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = made.manifest.to_json()
    monkeypatch.setattr(caching, "_MANIFEST_BYTES", 2 * len(text) + 4)
    cache = ArtifactCache(tmp_path / "cache")
    blobs = [cache.store.put(text + b" " * spaces) for spaces in range(3)]
    seen: list[bytes] = []
    first, second, third = (cache.manifest(blob, seen.append) for blob in blobs)
    assert first == second == third == made.manifest
    assert cache.manifest(blobs[2], seen.append) is third and cache.manifest(blobs[1], seen.append) is second
    assert cache.manifest(blobs[0], seen.append) is not first, "of three there is room for two"
    assert [len(each) - len(text) for each in seen] == [0, 1, 2, 2, 1, 0], "each is judged every time"
    padded = cache.store.put(text + b" " * (len(text) + 5))
    assert cache.manifest(padded, seen.append) is not cache.manifest(padded, seen.append), "too large to remember"
    assert cache.manifest(blobs[0], seen.append) is cache.manifest(blobs[0], seen.append)


def test_nothing_is_read_of_a_manifest_that_nobody_signed(board: Board, remote: Remote) -> None:
    stranger = replace(board, signers=frozenset({b"k" * 32}))
    outcome = execute(stranger, run_spec(remote.store.put(b"no manifest at all"), "add")).outcome
    assert outcome.kind is not OutcomeKind.OK and "is not signed" in outcome.message, outcome
