"""Tensors in files in memory: made for a runner, and mapped as a runner made them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
from typing import Sequence

from kedge.device_agent.runtime.protocol import ProtocolError, Tensor

#: A file that is longer is not believed.
MAX_FILE_BYTES = 4 << 30
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034  # fcntl names them only where the C library did when Python was built
_SEAL_SHRINK, _SEAL_GROW, _SEAL_WRITE = 2, 4, 8
_SEALED = _SEAL_SHRINK | _SEAL_GROW | _SEAL_WRITE


class NoRoomError(Exception):
    """A reply came whole, but this process cannot map its file."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def shared_file(tensors: Sequence[Tensor], offsets: Sequence[int], size: int) -> int:
    """A sealed memory file with the tensors at their offsets."""
    fd = os.memfd_create("kedge-inputs", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        for tensor, offset in zip(tensors, offsets):
            view = memoryview(tensor.data).cast("B") if tensor.nbytes else memoryview(b"")
            while view:
                written = os.pwrite(fd, view[: 1 << 30], offset)
                view, offset = view[written:], offset + written
        # Without seals the runner copies what it would otherwise map: an emulator may not know them.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, _F_ADD_SEALS, _SEALED)
    except BaseException:
        os.close(fd)
        raise
    return fd


def map_shared(fd: int) -> memoryview:
    """The content of a file from the runner, writable: mapped if it can neither shrink nor change, else copied.

    Raises:
        ProtocolError: it is no file with results.
        NoRoomError: this process cannot map it.
    """
    state = os.fstat(fd)
    if not stat.S_ISREG(state.st_mode) or state.st_size > MAX_FILE_BYTES:
        raise ProtocolError(f"a result of mode {state.st_mode:#o} and {state.st_size} bytes")
    if state.st_size == 0:
        return memoryview(b"")
    try:
        sealed = fcntl.fcntl(fd, _F_GET_SEALS) & _SEALED == _SEALED
    except OSError:
        sealed = False
    if not sealed:
        return _copy_file(fd, state.st_size)
    try:
        mapped = mmap.mmap(fd, state.st_size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise NoRoomError(error) from error
    return memoryview(mapped)


def _copy_file(fd: int, size: int) -> memoryview:
    try:
        copy = memoryview(bytearray(size))
    except MemoryError:
        raise NoRoomError(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))) from None
    at = 0
    while at < size:
        try:
            got = os.preadv(fd, [copy[at : at + (1 << 30)]], at)
        except OSError as error:
            raise ProtocolError(f"the file with the results cannot be read: {error.strerror}") from error
        if got == 0:
            raise ProtocolError("the file with the results shrank")
        at += got
    return copy
