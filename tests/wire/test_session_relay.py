"""What the tracker does between the two ends of a session, one rule at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc.tracker import sessions_service
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.grants import Grants
from kedge.rpc.tracker.sessions_service import SessionsService, _Relay


class Shell:
    """Counts how often a client's lease was renewed."""

    def __init__(self) -> None:
        self.renewed = 0

    def session_heard(self, job_id: str) -> None:
        assert job_id == "s"
        self.renewed += 1


def test_a_client_that_is_held_up_keeps_its_lease_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """After that it has to say something itself: one that stopped behind a long call does not keep its device."""
    monkeypatch.setattr(sessions_service, "_HELD_UP_S", 0.01)
    monkeypatch.setattr(sessions_service, "_LONGEST_HELD_UP_S", 0.05)
    shell = Shell()
    service = SessionsService(cast(Any, shell), cast(Any, None), cast(Any, None), cast(Any, None))
    event = pb.DeviceEvent(data=b"x")

    async def main() -> None:
        relay = _Relay()
        while not relay.to_device.full():
            await service._hand_over("s", relay, event)
        assert shell.renewed == 0
        held_up = asyncio.create_task(service._hand_over("s", relay, event))
        _, waiting = await asyncio.wait([held_up], timeout=0.3)
        assert waiting and 0 < shell.renewed <= 5
        relay.to_device.get_nowait()
        await held_up

    asyncio.run(main())


def test_a_client_that_reads_nothing_gives_its_device_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it says that it is there."""
    left: list[str] = []

    class Leaving(Shell):
        def session_left(self, job_id: str, why: str) -> None:
            assert job_id == "s"
            left.append(why)

    service = SessionsService(cast(Any, Leaving()), cast(Any, None), cast(Any, None), cast(Any, None))
    event = pb.ClientEvent(data=b"x")

    async def main() -> None:
        relay = _Relay()
        while not relay.to_client.full():
            await service._tell_client("s", relay, event)
        slow = asyncio.create_task(service._tell_client("s", relay, event))
        await asyncio.sleep(0)
        relay.to_client.get_nowait()
        await slow
        assert left == [], "one that reads a frame in time is only slow"
        monkeypatch.setattr(sessions_service, "_LONGEST_HELD_UP_S", 0.05)
        async with asyncio.timeout(60):
            for _ in range(5_000):  # what its device still says, to its end, is not waited for
                await service._tell_client("s", relay, event)
        assert left == ["its client read nothing of what its device said for 0.05 s"]

    asyncio.run(main())


def test_what_was_granted_stays_until_it_is_withdrawn_as_often(tmp_path: Path) -> None:
    blobs = TrackerBlobs(tmp_path, 100)
    grants = Grants(blobs)
    shared, own, other = (blobs.put(data).digest for data in (b"s" * 40, b"o" * 20, b"x" * 20))
    grants.add("s", own, (own, shared))
    grants.add("s", own, (own, shared))
    grants.add("s", other, (other, shared))
    assert grants.allow("s", shared) and not grants.allow("t", shared)
    grants.withdraw("s", own)
    grants.withdraw("t", own)
    grants.withdraw("s", "f" * 64)
    assert grants.allow("s", own)
    grants.withdraw("s", own)
    grants.withdraw("s", own)
    assert not grants.allow("s", own) and grants.allow("s", shared)
    blobs.put(b"n" * 30)  # room is made with what nobody holds any more, and with nothing else
    there = {blob.digest for blob in blobs}
    assert own not in there and {shared, other} <= there
    grants.end("s")
    blobs.put(b"m" * 70)
    assert shared not in {blob.digest for blob in blobs}
