"""Files of the cache: a line of text and some bytes, with a digest over both. They appear whole, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
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


class DamagedError(Exception):
    """A file of the cache that is not what was written."""


def load_entry(path: Path) -> tuple[str, bytes]:
    """A line of text and machine code, as `write_entry` wrote them.

    Raises:
        OSError: there is no file, or this user may not read it.
        DamagedError: it is not whole.
    """
    data = path.read_bytes()
    digest, body = data[len(_MAGIC) : len(_MAGIC) + 32], data[len(_MAGIC) + 32 :]
    if not data.startswith(_MAGIC) or digest != hashlib.sha256(body).digest():
        raise DamagedError(f"{path} is not what was written")
    head, _, code = body.partition(b"\n")
    return head.decode(), code


def read_entry(path: Path) -> tuple[str, bytes] | None:
    """As `load_entry`; None where there is nothing that can be read and is whole, so that it is made anew."""
    try:
        return load_entry(path)
    except (OSError, DamagedError):
        return None


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
    # As the user's umask has it, and not for this user alone, as `tempfile` does: others may share the folder.
    scratch = path.with_name(f"{SCRATCH}{secrets.token_hex(8)}")
    try:
        with scratch.open("xb") as file:
            file.write(data)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
