"""A bounded queue between threads that either end may close. Standard library, Python 3.7."""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue
from typing import Generic, Iterator, Optional, TypeVar, Union, cast

T = TypeVar("T")


class PipeClosed(Exception):
    """Nothing goes through this pipe any more."""


class _End:
    """What lies behind the last item."""


_END = _End()


class Pipe(Generic[T]):
    """At most `most` items that were put and not got yet: whoever puts one more waits.

    Items go from thread to thread through a SimpleQueue, in native code: what is asked of a session passes four pipes.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: SimpleQueue[Union[T, _End]] = SimpleQueue()
        #: Of those who put; getting takes it only where somebody waits for room.
        self._room = threading.Condition(threading.Lock())
        self._waiting = 0
        self._closed = False

    def put(self, item: T) -> None:
        """Put one in once there is room; raises PipeClosed."""
        with self._room:
            self._wait()
            self._items.put(item)

    def wait_while_over(self) -> None:
        """Wait while more are in than `most`, after a push; raises PipeClosed."""
        with self._room:
            self._wait(over=True)

    def get(self, timeout: Optional[float] = None) -> T:
        """The next one; raises PipeClosed when there will be none, TimeoutError when there is none in `timeout` s."""
        try:
            item = self._items.get(True, timeout)
        except Empty:
            raise TimeoutError from None
        if item is _END:
            self._items.put(_END)  # for whoever gets next
            raise PipeClosed
        if self._waiting:
            with self._room:
                self._room.notify_all()  # one alone may take no room, or be interrupted, and the rest would sleep
        return cast(T, item)

    def close(self) -> None:
        """No more is put in; what is in can still be got."""
        with self._room:
            if not self._closed:
                self._end()

    def push(self, item: T) -> None:
        """Put one in at once, over the bound: for the few that must not wait; raises PipeClosed."""
        with self._room:
            if self._closed:
                raise PipeClosed
            self._items.put(item)

    def finish(self, item: T) -> None:
        """Close with a last item, unless it is closed already; what is in and was not got is dropped."""
        with self._room:
            if not self._closed:
                self._drop()
                self._items.put(item)
                self._end()

    def abort(self) -> None:
        """Close, and drop what is in."""
        with self._room:
            self._drop()
            self._end()

    def _wait(self, over: bool = False) -> None:
        most = self._most if over else self._most - 1
        if self._items.qsize() > most and not self._closed:
            self._waiting += 1
            try:
                self._room.wait_for(lambda: self._items.qsize() <= most or self._closed)
            finally:
                self._waiting -= 1
        if self._closed:
            raise PipeClosed

    def _end(self) -> None:
        self._closed = True
        self._items.put(_END)
        self._room.notify_all()

    def _drop(self) -> None:
        try:
            while True:
                self._items.get_nowait()
        except Empty:
            return

    def __iter__(self) -> Iterator[T]:
        """All that come, until it is closed."""
        while True:
            try:
                yield self.get()
            except PipeClosed:
                return
