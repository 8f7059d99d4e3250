"""What the board keeps between jobs: blobs by digest, and the members that are put together from them.

    root/blobs/…                   parts as they travel (kedge.rpc.blobs)
    root/members/abcdef…           members of several parts, put together; named by their own digest

Everything is verified before it is used for the first time after a start, as a disk may rot while a board is off, and
again whenever anybody has written to its file. The cache is bounded, interrupted transfers included; the longest unused
goes first, never anything that a job holds.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, List, NoReturn, Optional, Tuple, Union

from kedge.rpc.artifact.manifest import Blob, Manifest, Member
from kedge.rpc.blobs import BlobError, BlobStore, CorruptBlobError, DiskFullError
from kedge.rpc.errors import KedgeError

log = logging.getLogger("kedge.agent")

#: Without a limit given, the share of the disk's free space (what the cache holds counted as free) it may take.
DISK_SHARE = 0.5
_READ_BYTES = 1 << 20
#: Of manifests, as they are written, so much is remembered: what they are read into takes some times as much.
_MANIFEST_BYTES = 256 << 10
#: An interrupted download is gone on with when the blob is wanted again so soon.
_PARTIAL_KEPT_S = 24 * 3600

#: Fetches one blob into the store.
Fetch = Callable[[Blob, BlobStore], object]


class CacheFullError(KedgeError):
    """What one job needs is more than the cache may ever hold."""


class ArtifactCache:
    """The cache below `root`; one process per root.

    Args:
        root: a folder, made when it does not exist.
        limit_bytes: of all that is kept; None means half of the disk space that is free for it.
        guarded: whether nothing that jobs run can write to its files. If so, what a link changes in a file that a job
            was shown makes nobody read the whole of it again.
    """

    def __init__(self, root: Path, limit_bytes: Optional[int] = None, *, guarded: bool = False) -> None:
        self._guarded = guarded
        self.store = BlobStore(root / "blobs")
        self._members = root / "members"
        self._members.mkdir(exist_ok=True)
        old = time.time() - _PARTIAL_KEPT_S
        for leftover in (*self._members.glob("*.new"), *self.store.unfinished()):
            if leftover.suffix == ".new" or leftover.stat().st_mtime < old:
                leftover.unlink()
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._held: Dict[str, int] = {}
        #: What was verified, and how its file looked then.
        self._verified: Dict[str, Tuple[int, ...]] = {}
        #: The manifests that were used last: their texts, and what they say.
        self._manifests: OrderedDict[str, Tuple[bytes, Manifest]] = OrderedDict()

    def hold(self) -> Hold:
        """A job's claim on what it uses; use it as a context manager."""
        return Hold(self)

    def limit_bytes(self) -> int:
        """How much may be kept now."""
        if self._limit_bytes is not None:
            return self._limit_bytes
        return int((shutil.disk_usage(str(self._members)).free + self.used_bytes()) * DISK_SHARE)

    def used_bytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(size for _, _, size, _ in self._entries())

    def make_room(self, needed_bytes: int) -> None:
        """Drop the longest unused entries until `needed_bytes` more fit.

        Raises:
            CacheFullError: with what is held they are more than the cache may ever hold.
            DiskFullError: they would fit, had others not filled the disk.
        """
        with self._lock:
            entries = list(self._entries())
            limit = self.limit_bytes()
            free = [entry for entry in entries if entry[1] not in self._held]
            total = sum(size for _, _, size, _ in entries) + needed_bytes
            droppable = sum(size for _, _, size, _ in free)
            if total - droppable > limit:
                self._refuse(needed_bytes, total - droppable, limit)
            excess = total - limit
            for _, digest, size, path in sorted(free):
                if excess <= 0:
                    break
                path.unlink()
                self._verified.pop(digest, None)
                excess -= size

    def manifest(self, blob: Blob, allow: Callable[[bytes], None]) -> Manifest:
        """A manifest of the store that was verified; the last ones are remembered. See `Hold.manifest`."""
        with self._lock:
            known = self._manifests.get(blob.digest)
        if known is not None:
            allow(known[0])
        else:
            text = self.store.read(blob.digest)
            allow(text)
            known = text, Manifest.from_json(text)
        if blob.size <= _MANIFEST_BYTES:
            with self._lock:
                self._manifests[blob.digest] = known
                self._manifests.move_to_end(blob.digest)
                while sum(len(text) for text, _ in self._manifests.values()) > _MANIFEST_BYTES:
                    self._manifests.popitem(last=False)
        return known[1]

    def _refuse(self, needed_bytes: int, least_bytes: int, limit: int) -> NoReturn:
        """Say whose fault it is: without a limit given, a job that half of an empty disk could hold is not to blame."""
        text = f"this job needs {needed_bytes} more bytes on the device, whose cache may hold {limit}"
        if self._limit_bytes is None and least_bytes <= shutil.disk_usage(str(self._members)).total * DISK_SHARE:
            raise DiskFullError(f"{text}, as its disk is full of other things", hint="free space on the device's disk")
        raise CacheFullError(text, hint="use a smaller model, or a device with a larger disk")

    def _entries(self) -> Iterator[Tuple[float, str, int, Path]]:
        """When last used, digest, size and file of everything that is kept."""
        for blob in self.store:
            path = self.store.path(blob.digest)
            yield path.stat().st_mtime, blob.digest, blob.size, path
        for path in (*self._members.iterdir(), *self.store.unfinished()):
            status = path.stat()
            yield status.st_mtime, path.name.partition(".")[0], status.st_size, path

    def _claim(self, digest: str) -> None:
        with self._lock:
            self._held[digest] = self._held.get(digest, 0) + 1

    def _release(self, digest: str) -> None:
        with self._lock:
            self._held[digest] -= 1
            if not self._held[digest]:
                del self._held[digest]

    def _verify(self, digest: str, path: Path) -> None:
        """Raise CorruptBlobError, and forget the file, unless its bytes are those of `digest`."""
        if self._verified.get(digest) != self._look(str(path)) and _hash(path) != digest:
            self._verified.pop(digest, None)
            path.unlink()
            raise CorruptBlobError(f"{path} was damaged on the device's disk", hint="run the job again")
        self._trust(digest, path)

    def _is_sound(self, blob: Blob) -> bool:
        """Whether a blob is in the store, and as it should be; what is not is dropped."""
        name = self.store.name(blob.digest)
        try:
            look = self._look(name)
        except FileNotFoundError:
            return False
        if look[1] != blob.size:
            return False
        # As a rule that is all: no Path is made of what was verified before, and its file is looked at once.
        if self._verified.get(blob.digest) == look:
            self._trust(blob.digest, name)
            return True
        try:
            self._verify(blob.digest, Path(name))
        except CorruptBlobError as error:
            log.warning("%s", error.message)
            return False
        return True

    def _trust(self, digest: str, path: Union[str, Path]) -> None:
        """The file's bytes are those of `digest`; it counts as used now."""
        name = str(path)
        os.utime(name)
        self._verified[digest] = self._look(name)

    def _look(self, path: str) -> Tuple[int, ...]:
        """What changes whenever a file is written to, renamed over, or marked as used."""
        status = os.stat(path)  # noqa: PTH116 - of every file of every job
        # Who writes to a file can give it any time of modification, but not of this change.
        changed = 0 if self._guarded else status.st_ctime_ns
        return status.st_ino, status.st_size, status.st_mtime_ns, changed


class Hold:
    """What one job uses; nothing of it is dropped before the hold ends."""

    def __init__(self, cache: ArtifactCache) -> None:
        self._cache = cache
        self._claimed: List[str] = []

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *exc_info: object) -> None:
        while self._claimed:
            self._cache._release(self._claimed.pop())

    def fetch(self, blobs: Iterable[Blob], fetch: Fetch) -> None:
        """Have these blobs in the store, calling `fetch` for each that is missing or damaged.

        Raises:
            CacheFullError, DiskFullError: there is no room for them.
        """
        distinct = {blob.digest: blob for blob in blobs}
        for digest in distinct:
            self._claim(digest)
        store = self._cache.store
        missing = [blob for blob in distinct.values() if not self._cache._is_sound(blob)]
        if missing:
            self._cache.make_room(sum(blob.size - store.committed_bytes(blob) for blob in missing))
        for blob in missing:
            fetch(blob, store)
            self._cache._trust(blob.digest, store.path(blob.digest))

    def path(self, blob: Blob) -> Path:
        """The file of a blob that `fetch` brought."""
        return self._cache.store.path(blob.digest)

    def manifest(self, blob: Blob, allow: Callable[[bytes], None]) -> Manifest:
        """A manifest that `fetch` brought; raises ArtifactError.

        `allow` is given its text before anything of it is read, whether or not it is remembered, and may raise.
        """
        return self._cache.manifest(blob, allow)

    def member(self, member: Member) -> Path:
        """The file of a member whose parts `fetch` brought.

        Raises:
            CorruptBlobError: the parts do not make up the member that the manifest promises.
            CacheFullError, DiskFullError: there is no room to put it together.
        """
        if len(member.parts) == 1 and member.parts[0].digest == member.digest:
            return self.path(member.parts[0])
        self._claim(member.digest)
        path = self._cache._members / member.digest
        if path.exists():
            try:
                self._cache._verify(member.digest, path)
            except CorruptBlobError:
                self._assemble(member, path)
        else:
            self._assemble(member, path)
        return path

    def _assemble(self, member: Member, path: Path) -> None:
        self._cache.make_room(member.size)
        scratch = path.with_name(f"{path.name}.new")
        digest = hashlib.sha256()
        try:
            with scratch.open("wb") as out:
                for part in member.parts:
                    with self._cache.store.open(part.digest) as file:
                        for chunk in iter(lambda: file.read(_READ_BYTES), b""):
                            digest.update(chunk)
                            out.write(chunk)
            if digest.hexdigest() != member.digest:
                raise CorruptBlobError(
                    f"member {member.name} is corrupt: its parts do not add up to the manifest's SHA-256",
                    hint="compile the model again",
                )
            scratch.replace(path)
            self._cache._trust(member.digest, path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            kind = DiskFullError if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else BlobError
            raise kind(f"cannot put member {member.name} together: {error.strerror}") from error
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise

    def _claim(self, digest: str) -> None:
        self._cache._claim(digest)
        self._claimed.append(digest)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in iter(lambda: file.read(_READ_BYTES), b""):
            digest.update(chunk)
    return digest.hexdigest()
