"""What the tracker does between the two ends of a session, one rule at a time."""

from __future__ import annotations

import asyncio
import inspect
from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from kedge.protos.v1 import sessions_pb2 as pb
from kedge.rpc.tracker import sessions_service
from kedge.rpc.tracker.blobs import TrackerBlobs
from kedge.rpc.tracker.grants import Grants
from kedge.rpc.tracker.session_way import WAITING_FRAMES, Stream, Way
from kedge.rpc.tracker.sessions_service import SessionsService, _Relay

#: Frames until whoever puts one has to wait: one that is being written, and those that wait.
MOST = 1 + WAITING_FRAMES


class Shell:
    """Counts how often a client's lease was renewed."""

    def __init__(self) -> None:
        self.renewed = 0

    def session_heard(self, job_id: str) -> None:
        assert job_id == "s"
        self.renewed += 1


class Reader:
    """A stream whose other end takes a frame only while it reads."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.reads = asyncio.Event()

    async def write(self, frame: Any) -> None:
        self.heard.append(frame)
        await self.reads.wait()


def test_a_frame_is_written_as_it_comes_where_nothing_is_before_it() -> None:
    """In the same turn of the loop; the ones behind it keep their order, whoever writes them."""

    async def main() -> None:
        way: Way[int] = Way()
        end = Reader()
        stream: Stream[int] = Stream(cast(Any, end))
        assert way.put_nowait(0), "nobody is there yet"
        speaking = asyncio.create_task(way.lead_to(stream))
        end.reads.set()
        while end.heard != [0] or way._queue:
            await asyncio.sleep(0)
        end.reads.clear()
        assert way.put_nowait(1) and end.heard == [0, 1]
        for frame in range(2, MOST):
            assert way.put_nowait(frame)
        last = asyncio.create_task(way.put(MOST))
        await asyncio.sleep(0)
        assert end.heard == [0, 1]
        end.reads.set()
        await last
        assert not stream.broken.done()
        async with asyncio.timeout(60):
            while len(end.heard) <= MOST:
                await asyncio.sleep(0)
        assert end.heard == list(range(MOST + 1))
        speaking.cancel()

    asyncio.run(main())


def test_a_frame_that_waits_for_its_turn_stays_for_the_next_stream() -> None:
    """A client that comes back on another one is told everything, and there is as much room as before."""

    async def main() -> None:
        way: Way[int] = Way()
        end, other = Reader(), Reader()
        speaking = asyncio.create_task(way.lead_to(Stream(cast(Any, end))))
        await asyncio.sleep(0)
        for frame in range(MOST):
            assert way.put_nowait(frame)
        for _ in range(5):  # it comes to wait for its turn
            await asyncio.sleep(0)
        speaking.cancel()
        await asyncio.wait([speaking])
        assert end.heard == [0] and not way.put_nowait(MOST), "both are still there"
        speaking = asyncio.create_task(way.lead_to(Stream(cast(Any, other))))
        other.reads.set()
        async with asyncio.timeout(60):
            while len(other.heard) < WAITING_FRAMES:
                await asyncio.sleep(0)
        assert other.heard == list(range(1, MOST))
        other.reads.clear()
        assert [way.put_nowait(frame) for frame in range(MOST + 1)] == [True] * MOST + [False]
        speaking.cancel()

    asyncio.run(main())


def test_a_frame_that_cannot_be_written_breaks_its_stream_and_nothing_else() -> None:
    """Be it at once or later: whoever put it is at the other end, and is told by what becomes of the session."""

    class Gone(Reader):
        def __init__(self, at_once: bool) -> None:
            super().__init__()
            self.at_once = at_once

        async def write(self, frame: Any) -> None:
            if not self.at_once:
                await asyncio.sleep(0)
            raise grpc.aio.UsageError("gone")

    async def main(at_once: bool) -> None:
        way: Way[int] = Way()
        stream: Stream[int] = Stream(cast(Any, Gone(at_once)))
        speaking = asyncio.create_task(way.lead_to(stream))
        await asyncio.sleep(0)
        assert way.put_nowait(1)
        with pytest.raises(grpc.aio.UsageError):
            async with asyncio.timeout(60):
                await stream.broken
        speaking.cancel()

    for at_once in (True, False):
        asyncio.run(main(at_once))


def test_a_stream_that_settles_ends_what_its_end_does_not_take() -> None:
    async def main() -> None:
        way: Way[int] = Way()
        end = Reader()
        stream: Stream[int] = Stream(cast(Any, end))
        speaking = asyncio.create_task(way.lead_to(stream))
        await asyncio.sleep(0)
        assert way.put_nowait(1)
        begun = stream._begun
        assert isinstance(begun, asyncio.Task)
        assert inspect.iscoroutine(begun.get_coro()), "a task takes nothing else from Python 3.12 on"
        await stream.settle(0.01)
        with pytest.raises(asyncio.CancelledError):
            await begun
        other: Stream[int] = Stream(cast(Any, end))  # of the same end, which came back
        speaking.cancel()
        end.reads.set()
        await other.write(2)
        await other.settle(60)
        waiting = asyncio.create_task(other.write(3))
        await asyncio.sleep(0)
        assert not waiting.done() and end.heard == [1, 2] and not other.begin(3)
        waiting.cancel()

    asyncio.run(main())


def test_a_client_that_is_held_up_keeps_its_lease_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """After that it has to say something itself: one that stopped behind a long call does not keep its device."""
    monkeypatch.setattr(sessions_service, "_HELD_UP_S", 0.01)
    monkeypatch.setattr(sessions_service, "_LONGEST_HELD_UP_S", 0.05)
    shell = Shell()
    service = SessionsService(cast(Any, shell), cast(Any, None), cast(Any, None), cast(Any, None))
    event = pb.DeviceEvent(data=b"x")

    async def main() -> None:
        relay = _Relay()
        end = Reader()
        speaking = asyncio.create_task(relay.to_device.lead_to(Stream(cast(Any, end))))
        await asyncio.sleep(0)
        for _ in range(MOST):
            await service._hand_over("s", relay, event)
        assert shell.renewed == 0 and len(end.heard) == 1
        held_up = asyncio.create_task(service._hand_over("s", relay, event))
        _, waiting = await asyncio.wait([held_up], timeout=0.3)
        assert waiting and 0 < shell.renewed <= 5
        end.reads.set()
        await held_up
        async with asyncio.timeout(60):
            while len(end.heard) <= MOST:
                await asyncio.sleep(0)
        speaking.cancel()

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
        end = Reader()
        speaking = asyncio.create_task(relay.to_client.lead_to(Stream(cast(Any, end))))
        await asyncio.sleep(0)
        for _ in range(MOST):
            await service._tell_client("s", relay, event)
        slow = asyncio.create_task(service._tell_client("s", relay, event))
        await asyncio.sleep(0)
        end.reads.set()
        await slow
        end.reads.clear()
        assert left == [], "one that reads a frame in time is only slow"
        monkeypatch.setattr(sessions_service, "_LONGEST_HELD_UP_S", 0.05)
        async with asyncio.timeout(60):
            for _ in range(5_000):  # what its device still says, to its end, is not waited for
                await service._tell_client("s", relay, event)
        assert left == ["its client read nothing of what its device said for 0.05 s"]
        speaking.cancel()

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
