"""A limit against hangs, which says where everything hung."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import pytest


@contextmanager
def time_limit(seconds: float, end: Callable[[], object], stacks: int, margin_s: float = 60.0) -> Iterator[None]:
    """Fail the test where this is not left in time: for the main thread of a process, and one at a time.

    First the stacks of all threads are written to the file descriptor `stacks`, and `end` is called, by another thread,
    to end what the test has started. Where even that does not make the main thread leave, because it is in native code,
    the process ends after `margin_s` more, with its stacks.
    """
    left = threading.Event()

    def watch() -> None:
        if left.wait(seconds):
            return
        faulthandler.dump_traceback(stacks, all_threads=True)
        try:
            end()
        finally:
            if not left.is_set():
                signal.pthread_kill(main, signal.SIGALRM)

    def fail(_number: int, _frame: FrameType | None) -> None:
        if not left.is_set():
            pytest.fail(f"it hung: it was not over after {seconds:g} s; the stacks of its threads are on stderr")

    main = threading.main_thread().ident
    assert main == threading.get_ident(), "only the main thread can be interrupted"
    before = signal.signal(signal.SIGALRM, fail)
    faulthandler.dump_traceback_later(seconds + margin_s, exit=True, file=stacks)
    watcher = threading.Thread(target=watch, name="time-limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join(margin_s)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def real_stderr(config: pytest.Config) -> int:
    """A descriptor of what stderr is outside of pytest's capture, to be closed by the caller."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        return os.dup(2)
    with capture.global_and_fixture_disabled():
        return os.dup(2)
