"""A TCP proxy of the suite's own between the parts of a fleet: it cuts, stalls, half-closes and flips bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal

#: From those who dial, and to them.
Direction = Literal["up", "down"]
Action = Literal["cut", "abort", "half-close", "flip"]
_READ_BYTES = 1 << 16


@dataclass(eq=False)
class Trap:
    """Goes off on the first connection that has carried `after` bytes in this direction since it was set.

    "cut" ends the connection in mid-chunk and in order (FIN), "abort" with a reset; "half-close" ends this direction
    only, and nothing more is heard from there; "flip" inverts one byte.
    """

    action: Action
    direction: Direction
    after: int
    seen: dict[_Link, int] = field(default_factory=dict)
    sprung: threading.Event = field(default_factory=threading.Event)


class _Link:
    """One connection and its other half."""

    def __init__(self, dialled: asyncio.StreamWriter, onwards: asyncio.StreamWriter) -> None:
        self.writers: dict[Direction, asyncio.StreamWriter] = {"up": onwards, "down": dialled}
        self.deaf: set[Direction] = set()

    def close(self, *, reset: bool) -> None:
        for writer in self.writers.values():
            sock = writer.get_extra_info("socket")
            if reset and sock is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if reset:
                writer.transport.abort()
            else:
                writer.close()


class Proxy:
    """Listens on `host`:`port` (0: any free one) and carries to `to`. A context manager that ends all of it."""

    def __init__(self, host: str, port: int, to: tuple[str, int]) -> None:
        self.to = to
        self._links: set[_Link] = set()
        self._traps: list[Trap] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._flowing = self._call(self._make_event())
        self._server = self._call(asyncio.start_server(self._serve, host, port))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # ---- Faults ----

    def set(self, trap: Trap) -> Trap:
        """Arm a trap."""
        self._in_loop(lambda: self._traps.append(trap))
        return trap

    def cut_all(self, *, reset: bool) -> int:
        """End every connection now; how many there were."""

        def cut() -> int:
            links = list(self._links)
            for link in links:
                link.close(reset=reset)
            return len(links)

        return self._in_loop(cut)

    def stall(self) -> None:
        """Carry nothing, in no direction, until `flow`."""
        self._in_loop(self._flowing.clear)

    def flow(self) -> None:
        """Carry again what was held up."""
        self._in_loop(self._flowing.set)

    # ---- Carrying ----

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream, onwards = await asyncio.open_connection(*self.to)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, onwards)
        self._links.add(link)
        try:
            await asyncio.gather(self._pump(link, "up", reader), self._pump(link, "down", upstream))
        finally:
            self._links.discard(link)
            for trap in self._traps:
                trap.seen.pop(link, None)
            link.close(reset=False)

    async def _pump(self, link: _Link, direction: Direction, reader: asyncio.StreamReader) -> None:
        writer = link.writers[direction]
        try:
            while data := await reader.read(_READ_BYTES):
                await self._flowing.wait()
                data = self._passed(link, direction, data)
                if direction not in link.deaf:
                    writer.write(data)
                    await writer.drain()
            if direction not in link.deaf and writer.can_write_eof():
                writer.write_eof()
        except (ConnectionError, OSError, RuntimeError):
            link.close(reset=True)

    def _passed(self, link: _Link, direction: Direction, data: bytes) -> bytes:
        """What goes on of a chunk, once the traps have had their way with it."""
        for trap in [trap for trap in self._traps if trap.direction == direction]:
            carried = trap.seen.get(link, 0)
            trap.seen[link] = carried + len(data)
            if carried + len(data) <= trap.after:
                continue
            self._traps.remove(trap)
            trap.sprung.set()
            at = max(0, min(trap.after - carried, len(data) - 1))
            if trap.action == "flip":
                data = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
                continue
            link.writers[direction].write(data[:at])
            if trap.action == "half-close":
                link.deaf.add(direction)
                link.writers[direction].write_eof()
            else:
                link.deaf |= {"up", "down"}
                link.close(reset=trap.action == "abort")
            return b""
        return data

    async def _make_event(self) -> asyncio.Event:
        event = asyncio.Event()
        event.set()
        return event

    async def _stop(self) -> None:
        self._flowing.set()
        self._server.close()
        for link in list(self._links):
            link.close(reset=True)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _in_loop(self, work: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return work()

        return self._call(run())
