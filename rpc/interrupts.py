"""Ctrl-C at a moment when it does no harm.

gRPC's synchronous calls lose a KeyboardInterrupt that is raised while they are being set up or torn down: it ends in
a destructor or a callback, where Python can only report and forget it. Standard library only, Python 3.9.
"""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from types import FrameType
from typing import Iterator, Optional


@contextmanager
def deferred() -> Iterator[None]:
    """An interrupt that comes inside takes effect at the end. For sections that do not block.

    Only the main thread is interrupted at all; a handler that is not Python's (or the user's) is left alone.
    """
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    came = False

    def note(_number: int, _frame: Optional[FrameType]) -> None:
        nonlocal came
        came = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if came:
            signal.raise_signal(signal.SIGINT)
