"""Files of the cache: a line of text and some bytes, with a digest over both. They appear whole, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from pathlib import Path

from kedge.compiler.errors import ToolchainError

_MAGIC = b"kedge-kernel 3\n"
#: What begins the name of a file that is not whole yet.
SCRATCH = ".kernel-"
#: Seconds within which a second use of a file is not noted.
_NOTED_S = 3600.0


def touch(path: Path) -> None:
    """Note that a file of the cache was used: what was not for long goes first where there is no room."""
    # Of another user's cache nothing can be noted, and what has just been removed was read before.
    with contextlib.suppress(OSError):
        if time.time() - path.stat().st_mtime > _NOTED_S:
            os.utime(path)


def read_entry(path: Path) -> tuple[str, bytes] | None:
    """A line of text and machine code, as `write_entry` wrote them; None if there is no file, or it is not whole."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, body = data[len(_MAGIC) : len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    if not data.startswith(_MAGIC) or digest != hashlib.sha256(body).digest():
        return None
    head, _, code = body.partition(b"\n")
    return head.decode(), code


def make_folder(path: Path) -> None:
    """Make a folder of the cache.

    Raises:
        ToolchainError: the cache cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> ToolchainError:
    return ToolchainError(
        f"cannot write the cache {path}: {error.strerror}",
        hint="set KEDGE_CACHE_DIR to a folder with room that you may write to",
    )


def write_entry(path: Path, head: str, code: bytes) -> int:
    """Keep a line of text and machine code in a file, which appears whole; gives the bytes that it takes.

    Raises:
        ToolchainError: the folder cannot be written.
    """
    body = head.encode() + b"\n" + code
    data = _MAGIC + hashlib.sha256(body).digest() + body
    try:
        try:
            _write_whole(path, data)
        except FileNotFoundError:  # another process has just removed the folder, as one that nobody used for long
            _write_whole(path, data)
    except OSError as error:
        raise _unwritable(path.parent, error) from error
    return len(data)


def _write_whole(path: Path, data: bytes) -> None:
    make_folder(path.parent)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=SCRATCH)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
