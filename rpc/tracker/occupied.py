"""One tracker in a data folder: its blobs, keys and audit log are one process's, wherever its tables are."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from kedge.rpc.tracker.schema import StoreError

if sys.platform == "win32":
    import msvcrt

    #: Far behind the number, which others must be able to read.
    _LOCKED_BYTE = 1 << 20

    def _locked(fd: int) -> bool:
        os.lseek(fd, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except PermissionError:
            return False
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return True
else:
    import fcntl

    def _locked(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextmanager
def occupied(data_dir: Path) -> Iterator[None]:
    """The folder, made where there is none, is this tracker's alone meanwhile; a process that ends lets go of it.

    Raises:
        StoreError: another tracker uses it, or it cannot be made.
    """
    with ExitStack() as stack:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            fd = os.open(data_dir / "tracker.lock", os.O_RDWR | os.O_CREAT, 0o600)
            stack.callback(os.close, fd)
            if not _locked(fd):
                # Empty in the moment in which the other one has just begun.
                number = os.read(fd, 32).decode(errors="replace")
                raise StoreError(
                    f"another tracker uses the data folder {data_dir}" + (f": process {number}" if number else ""),
                    hint="stop it, or name another folder with --data-dir",
                )
            os.ftruncate(fd, 0)
            os.write(fd, str(os.getpid()).encode())
        except OSError as error:
            raise StoreError(
                f"cannot use the data folder {data_dir}: {error.strerror}", hint="name another with --data-dir"
            ) from error
        yield
