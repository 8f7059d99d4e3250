"""The files of an interactive session: one flat folder, with a quota, which ends with the session.

The code of the session's artifacts runs in that folder and may leave anything there, links included. So nothing is
followed: only plain files are shown and read, and what is written takes the place of whatever had the name.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from itertools import islice
from pathlib import Path
from typing import BinaryIO, List, Tuple

from kedge.rpc.errors import InputError, LimitError

#: Of all files of a session together, as far as the client sends them.
QUOTA_BYTES = 4 << 30
#: Of the disk, which is not for the files of sessions.
_SPARE_BYTES = 64 << 20
#: Names in one folder.
MAX_FILES = 1_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,126}")


class SessionFiles:
    """The files below `folder`, which exists; what is being written lies in `staging` until it is whole."""

    def __init__(self, folder: Path, staging: Path, quota_bytes: int = QUOTA_BYTES) -> None:
        self._folder = folder
        self._staging = staging
        self._quota_bytes = quota_bytes

    def list(self) -> List[Tuple[str, int]]:
        """Names and sizes in bytes, by name; raises LimitError where artifacts have left too many."""
        with os.scandir(str(self._folder)) as entries:
            plain = (entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False))
            found = list(islice(plain, MAX_FILES + 1))
        if len(found) > MAX_FILES:
            raise LimitError(
                f"the session's folder has more than {MAX_FILES} files",
                hint="remove those that artifacts wrote, by their names; a new session begins without any",
            )
        return sorted((entry.name, entry.stat(follow_symlinks=False).st_size) for entry in found)

    def begin(self, name: str, size: int) -> BinaryIO:
        """A file of `size` bytes to be written, and then given to `commit`.

        Raises:
            InputError: the name is no name of one file.
            LimitError: there is no room for it.
        """
        _check(name)
        files = self.list()
        held = sum(size for other, size in files if other != name)
        if size < 0 or held + size > self._quota_bytes:
            raise LimitError(
                f"{name!r} has {size} bytes, and {held} of the session's {self._quota_bytes} are taken",
                hint="remove files of the session first",
            )
        free = shutil.disk_usage(str(self._staging)).free
        if size > free - _SPARE_BYTES:
            raise LimitError(
                f"{name!r} has {size} bytes, and the device's disk has {max(0, free - _SPARE_BYTES)} to spare",
                hint="remove files of the session, or choose a device with a larger disk",
            )
        if len(files) >= MAX_FILES and name not in (other for other, _ in files):
            raise LimitError(f"the session has {MAX_FILES} files already", hint="remove some of them first")
        return (self._staging / name).open("wb")

    def commit(self, name: str) -> None:
        """The file is whole, and visible from now on."""
        target = self._folder / name
        if target.is_dir() and not target.is_symlink():
            raise InputError(f"there is a folder called {name!r}", hint="choose another name")
        (self._staging / name).replace(target)

    def discard(self, name: str) -> None:
        """What was begun is not wanted."""
        path = self._staging / name
        if path.exists():
            path.unlink()

    def open(self, name: str) -> Tuple[BinaryIO, int]:
        """A file to be read, and its size in bytes now; raises InputError."""
        _check(name)
        try:
            # Without O_NONBLOCK a pipe of this name would be waited on.
            fd = os.open(str(self._folder / name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise _absent(name) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise _absent(name)
        return os.fdopen(fd, "rb"), status.st_size

    def remove(self, name: str) -> None:
        """Remove one; raises InputError."""
        _check(name)
        try:
            (self._folder / name).unlink()
        except OSError as error:
            raise _absent(name) from error


def _check(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:200]!r} is not the name of a session's file",
            hint="letters, digits, dots, dashes and underscores; no folders, and no dot at the beginning",
        )


def _absent(name: str) -> InputError:
    return InputError(f"the session has no file {name!r}", hint="device.files() lists them")
