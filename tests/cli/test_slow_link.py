"""A tracker far away: every byte takes its time, in both directions."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kedge.demo import processes
from kedge.rpc.security import credentials
from kedge.rpc.transport import parse_address
from support.commands import Kedge

ONE_WAY_S = 0.2


@contextlib.contextmanager
def far_away(address: str, one_way_s: float) -> Iterator[str]:
    """An address where the peer at `address` answers, `one_way_s` away."""
    peer = parse_address(address)
    loop = asyncio.new_event_loop()
    writers: list[asyncio.StreamWriter] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                loop.call_later(one_way_s, writer.write, data)
        loop.call_later(one_way_s, writer.close)

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(peer.host, peer.port)
        writers.extend((writer, there[1]))
        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer))

    async def end() -> None:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    server = loop.run_until_complete(asyncio.start_server(join, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_tracker_behind_a_slow_link_answers(kedge: Kedge, tmp_path: Path) -> None:
    with processes.tracker(tmp_path / "tracker") as address, far_away(address, ONE_WAY_S) as far:
        peer = parse_address(far)
        known = credentials.find(parse_address(address))
        credentials.remember(replace(known, addresses=(peer,), own=False))
        done = kedge("devices", "--tracker", far)
    assert done.returncode == 1 and "no device is connected" in done.stderr, done.stderr


def test_a_refused_connection_is_told_at_once(kedge_here: Kedge) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        command = ("devices", "--tracker", f"127.0.0.1:{free.getsockname()[1]}")
        kedge_here(*command)  # what it imports may take long
        began = time.monotonic()
        done = kedge_here(*command)
    assert done.returncode == 6 and "refused" in done.stderr
    assert time.monotonic() - began < 5, "that is how long a connection may take to be made"
