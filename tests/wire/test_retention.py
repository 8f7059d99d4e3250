"""Old jobs are forgotten with all that is stored of them, and never hold up new ones."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from wire.test_store import RESULT, accepted, write

from kedge.protos.v1 import fleet_pb2
from kedge.rpc import convert
from kedge.rpc import messages as m
from kedge.rpc.artifact import Artifact
from kedge.rpc.client import connect
from kedge.rpc.client.plan import pack
from kedge.rpc.status import UnknownJobError
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.facts import JobDone
from kedge.rpc.tracker.needed import Needed
from kedge.rpc.tracker.retention import PIECE, Retention
from kedge.rpc.tracker.server import start
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import Tensor
from support.agents import wait_for
from support.fake_agent import FakeAgent
from support.toys import QUICK, device_info, spec_message

NOW_S = 1_000_000.0
SOON = 0.01


def fill(folder: Path, ended_s: list[float]) -> None:
    """A database with a job for each of these ends, j0 first, and one that is not done."""
    store = Store(folder)
    for number, at in enumerate(ended_s):
        job_id = f"j{number}"
        write(store, accepted(job_id, number, f"key{number}"), JobDone(job_id, RESULT, round(at * 1000)))
    write(store, accepted("live", 10_000, "live"))
    store.close()


def kept(folder: Path, keep: Retention, expected: list[str]) -> None:
    """Wait until these are the jobs that are left, oldest first."""
    store = Store(folder, keep=keep, clock=lambda: NOW_S)
    store.when_forgotten(lambda jobs, keys: None)
    wait_for(lambda: sorted(job.id for job in store.jobs(1000, ()).result(60).jobs) == sorted(expected), "only these")
    for job_id in expected:
        assert store.job(job_id).result(60) is not None
        assert store.job_of_key(job_id.replace("j", "key")).result(60) == job_id
    store.close()
    again = Store(folder)
    assert len(again.found.keys) == len(expected) and len(again.found.records) == 1
    again.close()


def test_the_newest_are_kept_by_number(tmp_path: Path) -> None:
    fill(tmp_path, [50, 10, 40, 20, 30])
    kept(tmp_path, Retention(jobs=2, every_s=SOON), ["j0", "j2", "live"])


def test_the_newest_are_kept_by_what_they_take(tmp_path: Path) -> None:
    fill(tmp_path, [50, 10, 40, 20, 30])
    one = len(convert.job_result_to_bytes(RESULT)) + len(convert.job_spec_to_bytes(accepted("j", 1).spec))
    kept(tmp_path, Retention(bytes=3 * one, every_s=SOON), ["j0", "j2", "j4", "live"])
    kept(tmp_path, Retention(bytes=2 * one - 1, every_s=SOON), ["j0", "live"])


def test_none_is_kept_beyond_its_age(tmp_path: Path) -> None:
    fill(tmp_path, [NOW_S - 86_401, NOW_S - 86_399, NOW_S - 200_000])
    kept(tmp_path, Retention(days=1, every_s=SOON), ["j1", "live"])


def test_what_has_just_ended_is_kept_however_many_there_are(tmp_path: Path) -> None:
    fill(tmp_path, [NOW_S - 601, NOW_S - 599, NOW_S - 598])
    kept(tmp_path, Retention(jobs=1, every_s=SOON), ["j1", "j2", "live"])


def test_many_go_in_pieces_between_which_others_are_stored(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write(store, *(accepted(f"j{number}", number) for number in range(3 * PIECE)))
    write(store, *(JobDone(f"j{number}", RESULT, number) for number in range(3 * PIECE)))
    store.close()
    store = Store(tmp_path, keep=Retention(jobs=1), clock=lambda: NOW_S)
    store.when_forgotten(lambda jobs, keys: None)
    write(store, accepted("new", 10_000))
    assert len(store.jobs(1000, ()).result(60).jobs) > PIECE, "one piece at a time"
    wait_for(
        lambda: [job.id for job in store.jobs(1000, ()).result(60).jobs] == ["new", f"j{3 * PIECE - 1}"],
        "the rest goes too",
    )
    store.close()


def test_blobs_of_forgotten_results_may_go_and_their_keys_are_told(tmp_path: Path) -> None:
    blobs = TrackerBlobs(tmp_path / "blobs", 100)
    made, newer = blobs.put(b"made" * 10), blobs.put(b"newer" * 10)
    store = Store(tmp_path, keep=Retention(days=1, every_s=SOON), clock=lambda: NOW_S)
    store.keep_needed(Needed(blobs, lambda manifest: (manifest.digest,)))
    result = replace(RESULT, outputs=(Tensor("y", "int8", (40,), made),))
    write(store, accepted("j", 1, "key"), JobDone("j", result, 5))
    blobs.redeem([made.digest, newer.digest])
    blobs.make_room(50)
    assert blobs.has(made) and not blobs.has(newer), "as long as the result is kept others go first"
    newer = blobs.put(b"newer" * 10)
    heard: queue.Queue[tuple[Sequence[str], Sequence[str]]] = queue.Queue()
    store.when_forgotten(lambda jobs, keys: heard.put((jobs, keys)))
    assert heard.get(timeout=60) == (["j"], ["key"])
    blobs.redeem([newer.digest])
    blobs.make_room(50)
    assert blobs.has(newer) and not blobs.has(made)
    store.close()


def test_a_key_is_new_again_when_its_job_was_forgotten(tmp_path: Path, artifact: Artifact) -> None:
    keep = Retention(jobs=1, least_s=0, every_s=SOON)
    request = fleet_pb2.SubmitJobRequest(spec=spec_message(artifact))
    with (
        start(port=0, data_dir=tmp_path, settings=QUICK, insecure_loopback=True, keep=keep) as tracker,
        connect(tracker.address) as fleet,
        FakeAgent(tracker.address, device_info()) as agent,
    ):
        fleet._ensure_uploaded(pack(artifact))
        known = []
        for key in ("first", "second"):
            request.idempotency_key = key
            known.append(fleet._stub.SubmitJob(request, timeout=60).job.id)
            agent.finish(agent.expect(m.AssignJob))
            agent.expect(m.ResultAccepted)
        wait_for(lambda: [job.id for job in fleet.jobs()] == known[1:], "the first is forgotten")
        assert fleet.job(known[1]).id == known[1]
        with pytest.raises(UnknownJobError):
            fleet.job(known[0])
        request.idempotency_key = "second"
        assert fleet._stub.SubmitJob(request, timeout=60).job.id == known[1]
        request.idempotency_key = "first"
        again = fleet._stub.SubmitJob(request, timeout=60)
        assert not again.existed and again.job.id not in known
