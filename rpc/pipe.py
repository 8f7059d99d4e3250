"""A bounded queue between threads that either end may close. Standard library, Python 3.7."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Deque, Generic, Iterator, Optional, TypeVar

T = TypeVar("T")


class PipeClosed(Exception):
    """Nothing goes through this pipe any more."""


class Pipe(Generic[T]):
    """At most `most` items that were put and not got yet: whoever puts one more waits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._items: Deque[T] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        """Put one in once there is room; raises PipeClosed."""
        with self._changed:
            while len(self._items) >= self._most and not self._closed:
                self._changed.wait()
            if self._closed:
                raise PipeClosed
            self._items.append(item)
            self._changed.notify_all()

    def get(self, timeout: Optional[float] = None) -> T:
        """The next one; raises PipeClosed when there will be none, TimeoutError when there is none in `timeout` s."""
        ends = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while not self._items:
                if self._closed:
                    raise PipeClosed
                left = None if ends is None else ends - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self._changed.wait(left)
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def close(self) -> None:
        """No more is put in; what is in can still be got."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def push(self, item: T) -> None:
        """Put one in at once, over the bound: for the few that must not wait; raises PipeClosed."""
        with self._changed:
            if self._closed:
                raise PipeClosed
            self._items.append(item)
            self._changed.notify_all()

    def finish(self, item: T) -> None:
        """Close with a last item, unless it is closed already; what is in and was not got is dropped."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._items.clear()
                self._items.append(item)
                self._changed.notify_all()

    def abort(self) -> None:
        """Close, and drop what is in."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """All that come, until it is closed."""
        while True:
            try:
                yield self.get()
            except PipeClosed:
                return
