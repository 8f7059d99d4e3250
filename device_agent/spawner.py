"""Starts the processes of runners, from a thread that lives as long as this process."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Callable, List, Mapping, Optional, Sequence

from kedge.device_agent.deadline import Deadline, Expired


class _Spawner:
    """A thread that starts processes, one after the other, and lives as long as this process.

    A runner asks the kernel to kill it when its parent dies, and to the kernel the parent is the *thread* that forked:
    started from a short-lived thread it would die too early.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._wanted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # Not a pool's thread: an exec that hangs must not keep this process from ending.
        threading.Thread(target=self._work, name="kedge-runner-spawner", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._wanted.get()()

    def submit(self, start: Callable[[], None]) -> None:
        """Have it call this, which raises nothing."""
        self._wanted.put(start)


_spawner_lock = threading.Lock()
_spawner: Optional[_Spawner] = None


def spawn(
    command: List[str],
    fds: Sequence[int],
    cwd: Optional[Path],
    environment: Optional[Mapping[str, str]],
    deadline: Deadline,
) -> subprocess.Popen[bytes]:
    """Start a runner; raises OSError, and Expired where its program has not begun until then."""
    global _spawner
    with _spawner_lock:
        if _spawner is None or _spawner.owner != os.getpid():
            _spawner = _Spawner()
        spawner = _spawner

    process: Future[subprocess.Popen[bytes]] = Future()

    def start() -> None:
        if not process.set_running_or_notify_cancel():
            return  # what it was to inherit is closed
        try:
            started = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                bufsize=0,
                cwd=None if cwd is None else str(cwd),
                env=environment,
                pass_fds=tuple(fds),
                start_new_session=True,
            )
        except BaseException as error:  # noqa: BLE001 - raised by the thread that waits
            process.set_exception(error)
        else:
            process.set_result(started)

    try:
        spawner.submit(start)
        return process.result(deadline.left_s())
    except FutureTimeout:
        _discard(process)
        with _spawner_lock:
            if _spawner is spawner:  # what it has started needs it; what comes is started by another one
                _spawner = None
        raise Expired from None
    except BaseException:  # an interrupt, perhaps: what is being started would belong to nobody
        _discard(process)
        raise


def _discard(process: Future[subprocess.Popen[bytes]]) -> None:
    """Nobody waits for it: it is not started, or killed once it is."""

    def kill(done: Future[subprocess.Popen[bytes]]) -> None:
        if not done.cancelled() and done.exception() is None:
            with done.result() as started:
                started.kill()

    process.cancel()
    process.add_done_callback(kill)
