"""One direction of a session through the tracker: frames in order, each at once where nothing is before it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

import grpc

Frame = TypeVar("Frame")
Context = grpc.aio.ServicerContext[Any, Any]

#: Frames that may wait for an end that does not read.
WAITING_FRAMES = 2


class Way(Generic[Frame]):
    """What is on its way to one end of a session. Belongs to one event loop.

    A frame that comes while no other is under way is written in the same turn of the loop in which it came: every turn
    is a part of each call's time. One that comes meanwhile waits in a short queue.
    """

    def __init__(self) -> None:
        #: WAITING_FRAMES at most. A frame leaves as it begins to be written: one whose stream ends before stays.
        self._queue: deque[Frame] = deque()
        self._some = asyncio.Event()
        self._room = asyncio.Event()
        #: Where frames go; None while nobody is there to read them.
        self._stream: Stream[Frame] | None = None

    def put_nowait(self, frame: Frame) -> bool:
        """Put a frame on its way; False where there is no room for it."""
        if self._stream is not None and not self._queue and self._stream.begin(frame):
            return True
        if len(self._queue) >= WAITING_FRAMES:
            return False
        self._queue.append(frame)
        self._some.set()
        return True

    async def put(self, frame: Frame) -> None:
        """The same, once there is room."""
        while not self.put_nowait(frame):
            self._room.clear()
            await self._room.wait()

    async def lead_to(self, stream: Stream[Frame]) -> None:
        """Write what is put to this stream, until cancelled."""
        self._stream = stream
        try:
            while True:
                await self._some.wait()
                await stream.turn()
                if self._queue:
                    frame = self._queue.popleft()
                    self._room.set()
                    await stream.write(frame)
                else:
                    self._some.clear()
        finally:
            if self._stream is stream:
                self._stream = None


class Stream(Generic[Frame]):
    """One stream to an end, on which one frame is written at a time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._idle = asyncio.Event()
        self._idle.set()
        self._begun: asyncio.Future[None] | None = None
        #: Fails where a frame that was begun could not be written.
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def turn(self) -> None:
        """Wait until no frame is being written."""
        while not self._idle.is_set():
            await self._idle.wait()

    async def write(self, frame: Frame) -> None:
        """Write a frame, once no other is being written."""
        await self.turn()
        self._idle.clear()
        try:
            await self._context.write(frame)
        finally:
            self._idle.set()

    def begin(self, frame: Frame) -> bool:
        """Begin to write a frame and do not wait for it; False where another one is being written."""
        if not self._idle.is_set():
            return False
        self._idle.clear()
        self._begun = begin(self._context.write(frame))
        self._begun.add_done_callback(self._written)
        return True

    async def settle(self, within_s: float) -> None:
        """Wait until nothing is being written, within bounds; after that nothing is."""
        try:
            async with asyncio.timeout(within_s):
                await self.turn()
            self._idle.clear()
        except TimeoutError:
            if self._begun is not None:
                self._begun.cancel()

    def _written(self, begun: asyncio.Future[None]) -> None:
        self._idle.set()
        error = None if begun.cancelled() else begun.exception()
        if error is not None and not self.broken.done():
            self.broken.set_exception(error)


def begin(work: Coroutine[Any, Any, None]) -> asyncio.Future[None]:
    """Do the first part of some work at once, up to where it waits, and leave the rest to a task.

    asyncio has that from Python 3.12 on, as eager tasks.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    try:
        waits_for = work.send(None)
    except StopIteration:
        done.set_result(None)
        return done
    except Exception as error:  # noqa: BLE001 - for whoever looks at what became of it
        done.set_exception(error)
        return done
    return loop.create_task(_finish(work, waits_for))


async def _finish(work: Coroutine[Any, Any, None], waits_for: Any) -> None:
    """A coroutine of its own: from Python 3.12 on a task takes no generator in the place of one."""
    await _Rest(work, waits_for)


class _Rest:
    """The work from where it waits on, which a task is told as if it had come to that itself."""

    def __init__(self, work: Coroutine[Any, Any, None], waits_for: Any) -> None:
        self._work = work
        self._waits_for = waits_for

    def __await__(self) -> Generator[Any, Any, None]:
        waits_for = self._waits_for
        while True:
            try:
                try:
                    given = yield waits_for
                except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - it is the work's
                    waits_for = self._work.throw(error)
                else:
                    waits_for = self._work.send(given)
            except StopIteration:
                return
