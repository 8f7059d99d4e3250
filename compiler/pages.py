"""Memory for weights while compiling, and filling it on several cores."""

from __future__ import annotations

import math
import mmap
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import numpy as np

from kedge.rpc import cores

Item = TypeVar("Item")

#: Bytes of a weight that one thread fills at a time.
PIECE_BYTES: Final = 1 << 20

#: numpy asks for huge pages from here on.
_LARGE_BYTES: Final = 1 << 22


def empty(shape: Sequence[int], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """As `numpy.empty`, but in pages of the usual size.

    Huge pages gain little where memory is written once, and cost much in virtual machines that give free memory back to
    their host: on one, 160 MB took 350 ms to be had again instead of 80.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE_BYTES or sys.platform == "win32":
        return np.empty(shape, dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype).reshape(shape)


def spread(work: Callable[[Item], object], items: Sequence[Item]) -> None:
    """Call `work` of each item, on as many threads as this process may use: numpy lets others go on.

    The caller's is one of them, and does everything where no other can be started. All have its `np.errstate`.

    Raises:
        what `work` raised for the first item that it failed for; no further ones are begun then.
    """
    threads = min(cores.usable_threads(), len(items))
    if threads < 2:
        for item in items:
            work(item)
        return
    todo, lock = iter(enumerate(items)), threading.Lock()
    failures: dict[int, BaseException] = {}
    errors, on_error = np.geterr(), np.geterrcall()

    def run() -> None:
        np.seterr(**errors)  # a thread has numpy's defaults
        np.seterrcall(on_error)
        while True:
            with lock:
                one = None if failures else next(todo, None)
            if one is None:
                return
            try:
                work(one[1])
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                failures[one[0]] = error

    others: list[threading.Thread] = []
    for _ in range(threads - 1):
        thread = threading.Thread(target=run, name="kedge-pages")
        try:
            thread.start()
        except RuntimeError:  # a control group's limit on processes counts threads, too: fewer do as well
            break
        others.append(thread)
    run()
    for thread in others:
        thread.join()
    if failures:
        raise failures[min(failures)]
