"""How much of the user's disk the cache takes: kernels and artifacts together; the least recently used go first.

What is there is counted once a day, and where something has to go. In between a file has the count, and a line for what
was written since: each process adds its own, so that none has to look at thousands of files or wait for another. Where
two write and remove at once the count is off by little, until the next one.

A folder may hold what another user wrote, as after one `sudo kedge compile`. What cannot be removed stays, and counts.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kedge.compiler.errors import CacheError, CompileWarning
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
_COUNT_SCRATCH = re.compile(re.escape(_COUNT) + r"\.[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class Kept:
    """A file of the cache: of which part, its bytes, and when it was last used (Unix seconds)."""

    part: str
    path: Path
    size: int
    used: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What one walk through the cache found: files that count, those that processes were writing, refusals."""

    kept: list[Kept] = field(default_factory=list)
    unfinished: list[Kept] = field(default_factory=list)
    refused: list[OSError] = field(default_factory=list)


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
        """Count bytes that were written just now, and remove what is least recently used where it is too much.

        What stays too much, since it cannot be removed, is a CompileWarning.
        """
        total = self._total()
        if total is not None and self._note(written):
            total += written
        else:
            total = self._count(self.look().kept)
        if total > self.limit:
            # A tenth more than needed: else each compile from here on would look at every file.
            left, refused = self._shrink(self.limit * 9 // 10)
            if left > self.limit and refused:
                warnings.warn(
                    f"the cache {self.root} holds {left} bytes, more than the {self.limit} of {VARIABLE}: "
                    f"{_text(refused)} ({_remedy(self.root)})",
                    CompileWarning,
                    stacklevel=3,
                )

    def make_room(self, wanted: int) -> None:
        """Remove what is least recently used until so many bytes more are within the quota."""
        total = self._total()
        if total is None:
            total = self._count(self.look().kept)
        if total + wanted > self.limit:
            self._shrink(max(0, min(self.limit * 9 // 10, self.limit - wanted)))

    def look(self) -> Seen:
        """Look at every file of the parts once, without those that vanish meanwhile."""
        seen = Seen()
        for part in PARTS:
            for each in _walk(self.root / part, self.root, part, seen.refused):
                (seen.unfinished if each.path.name.startswith(".") else seen.kept).append(each)
        for path in self.root.glob(f"{_COUNT}.*"):
            if _COUNT_SCRATCH.fullmatch(path.name):
                with contextlib.suppress(OSError):  # whole by now; or nobody's to be seen, as the parts are
                    facts = path.lstat()
                    seen.unfinished.append(Kept("", path, facts.st_size, facts.st_mtime))
        return seen

    def seen(self) -> Seen:
        """As `look`, for who wants to know of all of it.

        Raises:
            CacheError: a folder cannot be read.
        """
        seen = self.look()
        if seen.refused:
            raise self._untold(seen.refused)
        return seen

    def kept(self) -> list[Kept]:
        """The files that count; raises CacheError where a folder cannot be read."""
        return self.seen().kept

    def other_bytes(self) -> int:
        """What lies in the folder beside the parts, without the count, and without what vanishes meanwhile.

        Raises:
            CacheError: a folder cannot be read.
        """
        refused: list[OSError] = []
        sizes = [facts.st_size for facts in _beside(self.root, refused)]
        if refused:
            raise self._untold(refused)
        return sum(sizes)

    def _untold(self, refused: list[OSError]) -> CacheError:
        text = f"cannot tell what the cache {self.root} holds: {_text(refused)}"
        return CacheError(text, hint=_remedy(self.root))

    def clear(self, parts: tuple[str, ...] = PARTS) -> list[Kept]:
        """Remove all of some parts, and tell what that was; what may be being written now is left.

        Raises:
            CacheError: files cannot be removed, or folders not be read; all the others are gone, and counted.
        """
        seen = self.look()
        refused = [*seen.refused, *_remove_abandoned(seen.unfinished)]
        removed: list[Kept] = []
        left = [each for each in seen.kept if each.part not in parts]
        for each in (each for each in seen.kept if each.part in parts):
            error = _refusal(each.path)
            if error is None:
                removed.append(each)
            else:
                refused.append(error)
                left.append(each)
        self._count(left)
        if refused:
            size = sum(each.size for each in removed)
            raise CacheError(
                f"the cache {self.root} is not empty: {_text(refused)}; {len(removed)} files of {size} bytes are gone",
                hint=_remedy(self.root),
            )
        return removed

    def _total(self) -> int | None:
        """The bytes that are kept, as far as is known; None where they were not counted within a day."""
        try:
            first, *added = (self.root / _COUNT).read_text().splitlines()
            counted, when = first.split()
            return int(counted) + sum(map(int, added)) if 0 <= time.time() - float(when) < _DAY else None
        except (OSError, ValueError):  # none yet, or one that only another user may read: all is counted anew
            return None

    def _note(self, written: int) -> bool:
        """Add a line to the count; whether that may be done: another user's can only be replaced."""
        try:
            with (self.root / _COUNT).open("a") as file:
                file.write(f"{written}\n")
        except OSError:
            return False
        return True

    def _count(self, kept: list[Kept]) -> int:
        total = sum(each.size for each in kept)
        scratch = self.root / f"{_COUNT}.{secrets.token_hex(8)}"
        # Where this user may not write, or the disk is full, each compile counts anew: slower, and no less right.
        with contextlib.suppress(OSError):
            try:
                scratch.write_text(f"{total} {int(time.time())}\n")
                scratch.replace(self.root / _COUNT)
            finally:
                scratch.unlink(missing_ok=True)
        return total

    def _shrink(self, goal: int) -> tuple[int, list[OSError]]:
        """Remove what is least recently used until `goal` bytes are left; gives what are, and why not fewer.

        What cannot be removed is passed over.
        """
        seen = self.look()
        _remove_abandoned(seen.unfinished)
        total = sum(each.size for each in seen.kept)
        left, refused = [], []
        for each in sorted(seen.kept, key=lambda each: each.used):
            error = _refusal(each.path) if total > goal else None
            if error is not None:
                refused.append(error)
            if error is not None or total <= goal:
                left.append(each)
            else:
                total -= each.size
        return self._count(left), refused


def _refusal(path: Path) -> OSError | None:
    """Remove a file; why it is still there, or None where it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return error
    return None


def _remove_abandoned(unfinished: Iterable[Kept]) -> list[OSError]:
    """Remove what processes that were killed left unfinished, and tell what cannot be; a day later nobody writes it."""
    now = time.time()
    errors = [_refusal(each.path) for each in unfinished if now - each.used > _DAY]
    return [error for error in errors if error is not None]


def _text(refused: list[OSError]) -> str:
    """What was refused, in a line: how many files or folders, and why the first."""
    what = "one file or folder is" if len(refused) == 1 else f"{len(refused)} files or folders are"
    return f"{what} out of reach, such as {refused[0].filename}: {refused[0].strerror}"


def _remedy(root: Path) -> str:
    return (
        f"another user's files are theirs to remove: KEDGE_CACHE_DIR={root} kedge cache clear; "
        "or set KEDGE_CACHE_DIR to a folder of your own"
    )


def _beside(root: Path, refused: list[OSError]) -> Iterator[os.stat_result]:
    """The facts of the files that are no part of the cache; folders that cannot be read go to `refused`."""

    def note(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            refused.append(error)

    for folder, folders, names in os.walk(root, onerror=note):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in PARTS]
            names = [name for name in names if name != _COUNT and not _COUNT_SCRATCH.fullmatch(name)]
        for name in names:
            try:
                facts = Path(folder, name).lstat()
            except OSError as error:
                note(error)
                continue
            if stat.S_ISREG(facts.st_mode):
                yield facts


def _walk(folder: Path, root: Path, part: str, refused: list[OSError]) -> Iterator[Kept]:
    """The files of a part, unfinished ones too; folders that cannot be read go to `refused`."""
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        refused.append(error)
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(path, root, part, refused)
        elif _KEPT.fullmatch(path.relative_to(root).as_posix()) or _SCRATCH.fullmatch(entry.name):
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            except OSError as error:
                refused.append(error)
                continue
            yield Kept(part, path, facts.st_size, facts.st_mtime)
