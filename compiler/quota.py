"""How much of the user's disk the cache takes: kernels and artifacts together; the least recently used go first.

What is there is counted once a day, and where something has to go. In between a file has the count, and a line for what
was written since: each process adds its own, so that none has to look at thousands of files or wait for another. Where
two write and remove at once the count is off by little, until the next one.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kedge.compiler.errors import CacheError
from kedge.compiler.toolchain import cache_dir
from kedge.rpc.sizes import parse_size

VARIABLE: Final = "KEDGE_CACHE_SIZE"
DEFAULT_BYTES: Final = 5 << 30
KERNELS, ARTIFACTS = "kernels", "artifacts"
#: The folders that the quota is for.
PARTS: Final = (KERNELS, ARTIFACTS)
_DAY = 24 * 3600.0
_COUNT = ".size"
#: Where what is kept lies, below the folder of its part: somebody may have put other files beside.
_KEPT = re.compile(
    r"kernels/((code|lowered)-[0-9a-f]{16}/(objects/)?[0-9a-f]{2}/[0-9a-f]{64}"
    r"|([0-9a-f]{2}|objects/[0-9a-f]{2}|groups/[0-9a-f]{2})/[0-9a-f]{64})"
    r"|artifacts/(keys|models)/[0-9a-f]{2}/[0-9a-f]{64}|artifacts/objects/[0-9a-f]{2}/[0-9a-f]{64}\.kdg"
)
#: Files that a process was writing: whole ones get their names when they are.
_SCRATCH = re.compile(r"\.kernel-\w+|\.[0-9a-f]{64}\.kdg\.\w+")


@dataclass(frozen=True, slots=True)
class Kept:
    """A file of the cache: of which part, its bytes, and when it was last used (Unix seconds)."""

    part: str
    path: Path
    size: int
    used: float

    @property
    def unfinished(self) -> bool:
        """Whether a process was writing it when it was seen."""
        return self.path.name.startswith(".")


def limit() -> int:
    """The bytes that kernels and artifacts may take: KEDGE_CACHE_SIZE, else 5 GiB; 0 keeps nothing.

    Raises:
        CacheError: KEDGE_CACHE_SIZE is no size.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return DEFAULT_BYTES
    found = parse_size(text)
    if found is None:
        raise CacheError(
            f"{VARIABLE} is {text!r}, which is no number of bytes", hint="a number and a unit: 5GiB, 500MB; or unset it"
        )
    return found


class Quota:
    """The cache's folder with its quota (`limit`, read when this is made).

    A cache that this user may not write to is its owner's to keep small.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_dir() if root is None else root
        self.limit = limit()

    def add(self, written: int) -> None:
        """Count bytes that were written just now, and remove what is least recently used where it is too much."""
        with contextlib.suppress(OSError):
            total = self._total()
            if total is None:
                total = self._count(self.kept())
            else:
                with (self.root / _COUNT).open("a") as file:
                    file.write(f"{written}\n")
                total += written
            if total > self.limit:
                # A tenth more than needed: else each compile from here on would look at every file.
                self._shrink(self.limit * 9 // 10)

    def make_room(self, wanted: int) -> None:
        """Remove what is least recently used until so many bytes more are within the quota."""
        with contextlib.suppress(OSError):
            total = self._total()
            if total is None:
                total = self._count(self.kept())
            if total + wanted > self.limit:
                self._shrink(max(0, min(self.limit * 9 // 10, self.limit - wanted)))

    def kept(self) -> list[Kept]:
        """All files that count, without those that vanish meanwhile."""
        return [each for each in self._files() if not each.unfinished]

    def clear(self, parts: tuple[str, ...] = PARTS) -> list[Kept]:
        """Remove all of some parts, and tell what that was; what may be being written now is left.

        Raises:
            OSError: a file cannot be removed.
        """
        self._remove_abandoned()
        removed = [each for each in self.kept() if each.part in parts]
        for each in removed:
            each.path.unlink(missing_ok=True)
        if self.root.is_dir():
            self._count(self.kept())
        return removed

    def _total(self) -> int | None:
        """The bytes that are kept, as far as is known; None where they were not counted within a day."""
        try:
            first, *added = (self.root / _COUNT).read_text().splitlines()
            counted, when = first.split()
            return int(counted) + sum(map(int, added)) if 0 <= time.time() - float(when) < _DAY else None
        except (FileNotFoundError, ValueError):
            return None

    def _count(self, kept: list[Kept]) -> int:
        total = sum(each.size for each in kept)
        scratch = self.root / f"{_COUNT}.{secrets.token_hex(8)}"
        try:
            scratch.write_text(f"{total} {int(time.time())}\n")
            scratch.replace(self.root / _COUNT)
        finally:
            scratch.unlink(missing_ok=True)
        return total

    def _shrink(self, goal: int) -> None:
        """Remove what is least recently used until `goal` bytes are left."""
        self._remove_abandoned()
        kept = sorted(self.kept(), key=lambda each: each.used)
        total = sum(each.size for each in kept)
        gone = 0
        for each in kept:
            if total <= goal:
                break
            each.path.unlink(missing_ok=True)
            total -= each.size
            gone += 1
        self._count(kept[gone:])

    def _remove_abandoned(self) -> None:
        """Remove what processes that were killed left unfinished; a day later nobody writes it any more."""
        for each in self._files():
            if each.unfinished and time.time() - each.used > _DAY:
                each.path.unlink(missing_ok=True)

    def _files(self) -> Iterator[Kept]:
        for part in PARTS:
            yield from _walk(self.root / part, self.root, part)


def _walk(folder: Path, root: Path, part: str) -> Iterator[Kept]:
    """The files of a part, unfinished ones too."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root, part)
        elif _KEPT.fullmatch(path.relative_to(root).as_posix()) or _SCRATCH.fullmatch(entry.name):
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            yield Kept(part, path, facts.st_size, facts.st_mtime)
