"""Blocking calls for asyncio that may take as long as they like: each has a thread of its own.

The loop's default executor has a few threads for everybody. Calls that wait for one another there, as those that wait
for a device and the one that gives it back, would never end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def start(call: Callable[[], T], name: str) -> Future[T]:
    """Begin a call in a thread of its own; the future has what it returns or raises."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
            future.set_exception(error)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


async def do(call: Callable[[], T], name: str) -> T:
    """Make a call in a thread of its own. Cancelling does not end it."""
    return await asyncio.wrap_future(start(call, name))
