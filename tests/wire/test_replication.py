"""Copies of blobs at a fleet's other trackers."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from wire.test_store import RESULT, accepted, write

from kedge.rpc.artifact import Artifact
from kedge.rpc.blobs import blob_of
from kedge.rpc.client import Fleet
from kedge.rpc.client.access import Access
from kedge.rpc.tracker import replication
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.facts import JobDone
from kedge.rpc.tracker.leadership import Resources, RetainedBlobs
from kedge.rpc.tracker.replication import PeerReplication
from kedge.rpc.tracker.security.folder import Limits
from kedge.rpc.tracker.security.owners import StoredOwners
from kedge.rpc.tracker.server import RunningTracker, start
from kedge.rpc.tracker.store import Store
from kedge.rpc.transport import Address
from kedge.rpc.types import Blob, JobState, Tensor
from support.agents import wait_for
from support.postgres import PostgresServer
from support.toys import QUICK

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def objects(data_dir: Path) -> set[str]:
    return {path.name for path in (data_dir / "blobs" / "objects").glob("*/*")}


def with_peer(
    tracker: RunningTracker, blobs: TrackerBlobs, act: Callable[[PeerReplication], Coroutine[Any, Any, None]]
) -> None:
    async def main() -> None:
        peers = PeerReplication(blobs, None)
        peers.update({"b": tracker.address})
        try:
            await act(peers)
        finally:
            await asyncio.to_thread(peers.close)

    asyncio.run(main())


def test_what_is_needed_is_sent_once(tracker: RunningTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = TrackerBlobs(tmp_path / "blobs", None)
    one, two = blobs.put(b"one"), blobs.put(b"two")
    sent: list[set[str]] = []
    upload = replication.BlobClient.upload_missing

    def counted(client: Any, items: Any, *rest: Any) -> Any:
        sent.append({blob.digest for blob, _ in items})
        return upload(client, items, *rest)

    monkeypatch.setattr(replication.BlobClient, "upload_missing", counted)

    async def act(peers: PeerReplication) -> None:
        await peers.copy(one)
        await peers.ensure({one.digest, two.digest})
        await peers.ensure({one.digest, two.digest})

    with_peer(tracker, blobs, act)
    assert sent == [{one.digest}, {two.digest}]
    assert {one.digest, two.digest} <= objects(tracker.data_dir)


def test_no_tracker_is_blamed_for_the_time_that_others_take(tracker: RunningTracker, tmp_path: Path) -> None:
    async def act(peers: PeerReplication) -> None:
        (peer,), let_go = peers._peers.values(), threading.Event()
        slow = [asyncio.create_task(peers._ask(peer, "slow", 60.0, let_go.wait, 60)) for _ in range(8)]
        quick = asyncio.create_task(peers._ask(peer, "quick", 2.0, int))
        await asyncio.wait([quick], timeout=2.5)
        assert not quick.done()
        let_go.set()
        assert await quick is True and all(await asyncio.gather(*slow)) and peer.avoid_until == 0.0

    with_peer(tracker, TrackerBlobs(tmp_path / "blobs", None), act)


def test_what_goes_wrong_when_nobody_waits_any_more_is_no_mystery(tracker: RunningTracker, tmp_path: Path) -> None:
    async def act(peers: PeerReplication) -> None:
        unknown: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unknown.append(context))
        (peer,), began, let_go = peers._peers.values(), threading.Event(), threading.Event()

        def fail() -> None:
            began.set()
            let_go.wait(60)
            raise ValueError("Cannot invoke RPC on closed channel!")

        asking = asyncio.create_task(peers._ask(peer, "blobs", 60.0, fail))
        assert await asyncio.to_thread(began.wait, 60)
        asking.cancel()
        await asyncio.wait([asking])
        let_go.set()
        await asyncio.gather(*(peers._free.acquire() for _ in range(8)))  # the eighth is the one that it had
        del asking
        gc.collect()
        await asyncio.sleep(0)
        assert unknown == []

    with_peer(tracker, TrackerBlobs(tmp_path / "blobs", None), act)


def test_a_tracker_that_stands_still_holds_up_no_other(
    tracker: RunningTracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the one that led does when another one takes over: it is found out once, and not by every blob in turn."""
    monkeypatch.setattr(replication, "_ANSWER_S", 2.0)
    blobs = TrackerBlobs(tmp_path / "blobs", None)
    wanted = [blob_of(b"blob %d" % number) for number in range(200)]

    asked: list[bool] = []

    async def act(peers: PeerReplication) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            peers.update({"hung": Address("127.0.0.1", silent.getsockname()[1])})
            hung = peers._peers["hung"].client
            download = hung.download
            monkeypatch.setattr(hung, "download", lambda *what: (asked.append(True), download(*what)))
            assert not await peers.fetch(wanted), "it may have what nobody else has"

    with_peer(tracker, blobs, act)
    assert 1 <= len(asked) <= replication._THREADS, "those that it was asked for at once"


def test_a_damaged_copy_is_as_good_as_none_and_nobody_is_to_blame(tracker: RunningTracker, tmp_path: Path) -> None:
    blobs, kept = TrackerBlobs(tmp_path / "blobs", None), TrackerBlobs(tracker.data_dir / "blobs", None)
    damaged, sound = kept.put(b"damaged"), kept.put(b"sound")
    kept.path(damaged.digest).write_bytes(b"DAMAGED")

    async def act(peers: PeerReplication) -> None:
        assert await peers.fetch([damaged, blob_of(b"nowhere")])
        assert await peers.fetch([sound])

    with_peer(tracker, blobs, act)
    assert blobs.has(sound) and not blobs.has(damaged)


def test_nothing_is_missing_while_a_tracker_that_may_have_it_is_silent(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    options = {"settings": QUICK, "database": postgres.new_database()}
    with start(port=0, data_dir=tmp_path / "a", **options) as a:
        assert a.serving.keys is not None
        tls = a.serving.keys.admin_tls()
        with Fleet(a.address, tls) as fleet, Access(a.address, tls) as access:
            join = access.create_token("tracker")[1]
            with start(port=0, data_dir=tmp_path / "b", join=join, **options):
                wait_for(lambda: len(fleet.status().trackers) == 2, "both to be seen")
                data = b"only there"
                blob = blob_of(data)
                fleet._blobs.upload(blob, data)
                wait_for(lambda: blob.digest in objects(tmp_path / "b"), "a copy")
                next((tmp_path / "a" / "blobs" / "objects").glob(f"*/{blob.digest}")).unlink()
                fetch, silent = PeerReplication.fetch, [True, True]

                async def silent_at_first(peers: PeerReplication, blobs: Any) -> bool:
                    return not silent.pop() if silent else await fetch(peers, blobs)

                monkeypatch.setattr(PeerReplication, "fetch", silent_at_first)
                assert fleet._blobs.read(blob) == data and not silent


def test_what_the_last_leader_had_alone_is_not_missing_while_both_are_restarted(
    postgres: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(replication, "_RETURN_S", 600.0)  # however long a tracker takes to start here
    options = {"settings": QUICK, "database": postgres.new_database()}
    data = b"only there"
    blob = blob_of(data)
    with start(port=0, data_dir=tmp_path / "a", **options) as a:
        assert a.serving.keys is not None
        tls = a.serving.keys.admin_tls()
        with Access(a.address, tls) as access:
            join = access.create_token("tracker")[1]
        with start(port=0, data_dir=tmp_path / "b", join=join, **options):
            pass  # it is known, and then being restarted
        with Fleet(a.address, tls) as fleet:
            fleet._blobs.upload(blob, data)
    with start(port=0, data_dir=tmp_path / "b", **options) as b:
        b_address = b.address
        with Fleet(b_address, tls) as fleet, ThreadPoolExecutor(1) as pool:
            reading = pool.submit(fleet._blobs.read, blob)
            wait_for(lambda: fleet.status().trackers[0].leads, "b to lead")
            with start(port=0, data_dir=tmp_path / "a", **options):
                assert reading.result(timeout=60) == data


def test_what_was_dropped_while_another_tracker_led_is_nobodys(tmp_path: Path) -> None:
    blobs = TrackerBlobs(tmp_path / "blobs", None)
    here = blobs.put(b"here")
    store = Store(tmp_path)
    done = JobDone("j", replace(RESULT, outputs=(Tensor("y", "int8", (40,), Blob("1" * 64, 40)),)), 5)
    write(store, accepted("j", 1), done)
    owners = StoredOwners(store)
    for digest in (here.digest, "1" * 64, "2" * 64):
        owners.add("user.ann", digest)
    owners.add("agent.a", "2" * 64)
    resources = Resources(
        tmp_path, blobs, cast(Any, None), cast(Any, None), Limits(), None, cast(Any, None), metrics=None
    )
    RetainedBlobs(resources, store, owners).forget_strays()
    assert sorted(store.owners().result(60)) == sorted([(here.digest, "user.ann"), ("1" * 64, "user.ann")])
    assert set(owners) == {("user.ann", here.digest), ("user.ann", "1" * 64)}
    store.close()


def test_a_job_whose_blobs_were_there_already_outlives_the_tracker_that_had_them(
    postgres: PostgresServer, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_CONFIG_DIR", str(tmp_path / "config"))
    options = {"settings": QUICK, "database": postgres.new_database()}
    with start(port=0, data_dir=tmp_path / "a", **options) as a:
        assert a.serving.keys is not None
        tls = a.serving.keys.admin_tls()
        with Fleet(a.address, tls) as fleet, Access(a.address, tls) as access:
            fleet.run(artifact, {"x": X}).cancel()
            join = access.create_token("tracker")[1]

            async def nothing(_peers: Any, _digests: Any) -> None:
                """What is offered from time to time would come later."""

            monkeypatch.setattr(PeerReplication, "offer", nothing)
            with start(port=0, data_dir=tmp_path / "b", join=join, **options):
                wait_for(lambda: len(fleet.status().trackers) == 2, "both to be seen")
                assert not objects(tmp_path / "b")
                job = fleet.run(artifact, {"x": X})
                assert job.status().state is JobState.QUEUED
                assert objects(tmp_path / "a") == objects(tmp_path / "b") != set()
