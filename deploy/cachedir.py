"""Directories that are built once and then shared by every process on this machine."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[str], None]
"""Told what is being done, one short line at a time."""


def silent(_line: str) -> None:
    """A `Progress` that shows nothing."""


def default_cache_dir() -> Path:
    """`$KEDGE_CACHE_DIR`, else `$XDG_CACHE_HOME/kedge`, else `~/.cache/kedge`."""
    if given := os.environ.get("KEDGE_CACHE_DIR"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kedge"


@contextmanager
def _exclusive(lock: Path, progress: Progress) -> Iterator[None]:
    lock.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that prepares {lock.stem}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build_once(final: Path, build: Callable[[Path], None], progress: Progress = silent) -> Path:
    """Return `final`, calling `build(empty_dir)` first if it does not exist yet.

    The directory appears by one rename, so nobody ever sees half of it; parallel callers, in this process or
    another, wait for the one that builds. What a killed builder left behind is removed by the next one.
    """
    if final.is_dir():
        return final
    with _exclusive(final.parent / f"{final.name}.lock", progress):
        if final.is_dir():
            return final
        unfinished = final.parent / f".{final.name}.unfinished"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(parents=True)
        try:
            build(unfinished)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        unfinished.rename(final)
    return final
