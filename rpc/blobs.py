"""Content-addressed files: a blob is named by its SHA-256, appears whole or not at all, and is verified before it does.

    root/objects/ab/abcdef…        committed blobs
    root/partial/abcdef…           interrupted uploads, to be gone on with
    root/partial/abcdef….N         a second upload of a blob that another one holds
    root/partial/abcdef…~TAG       the same for uploads under a tag, which see nothing of others

One process per root. Methods may be called from any thread; those of one `BlobWriter` wait for each other.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
from pathlib import Path
from typing import BinaryIO, Dict, Iterable, Iterator, List, NoReturn, Union

from kedge.rpc.artifact.manifest import Blob
from kedge.rpc.errors import KedgeError

Bytes = Union[bytes, memoryview]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 1 << 20
_WRITE_BEHIND_BYTES = 8 << 20
_KEEP_PARTIAL_S = 7 * 86400
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlobError(KedgeError):
    """A blob that cannot be stored or read."""


class BadDigestError(BlobError):
    """Text that is not a lower-case hex SHA-256, or a negative size."""


class MissingBlobError(BlobError):
    """The store does not have this blob."""


class CorruptBlobError(BlobError):
    """The bytes are not those that the digest promises."""


class UploadOffsetError(BlobError):
    """An upload wants to go on from a place that the store has not reached; ask how much is committed."""


class DiskFullError(BlobError):
    """No space is left for blobs."""


class BlobQuotaError(BlobError):
    """A store may not hold as much as that."""


def check_digest(digest: str) -> str:
    """`digest` itself; raises BadDigestError unless it is one, so that it can never name another path."""
    if not _DIGEST.fullmatch(digest):
        raise BadDigestError(f"{digest[:80]!r} is not a SHA-256 digest (64 lower-case hex digits)")
    return digest


def blob_of(data: Bytes) -> Blob:
    """The blob that these bytes are."""
    view = memoryview(data)
    return Blob(hashlib.sha256(view).hexdigest(), view.nbytes)


class BlobStore:
    """A folder of blobs; it is made when it does not exist.

    With `write_behind`, large uploads go to the disk while they come in and leave the page cache behind them: filling
    fresh pages of the cache can cost a host more than the whole transfer, and the commit has little left to wait for.
    For stores that take in more than they hand out at once.
    """

    def __init__(self, root: Union[str, "os.PathLike[str]"], *, write_behind: bool = False) -> None:
        self.root = Path(root)
        self.write_behind = write_behind and hasattr(os, "posix_fadvise")
        self._objects = self.root / "objects"
        self._partial = self.root / "partial"
        self._lock = threading.Lock()
        self._writers: Dict[str, BlobWriter] = {}
        self._scratch = 0
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)
            self._sweep()
        except OSError as error:
            raise _explain(error, self.root) from error

    # ---- Reading ----

    def name(self, digest: str) -> str:
        """Where the file of a blob is, or would be; raises BadDigestError."""
        return f"{self._objects}/{check_digest(digest)[:2]}/{digest}"

    def path(self, digest: str) -> Path:
        """The file of a committed blob; raises MissingBlobError."""
        name = self.name(digest)
        if not os.path.isfile(name):  # noqa: PTH113 - asked for every blob of every job, and a Path takes longer
            raise MissingBlobError(f"blob {digest} is not in {self.root}", hint="upload it first")
        return Path(name)

    def has(self, blob: Blob) -> bool:
        """True when the blob is there with that size."""
        try:
            return os.stat(self.name(blob.digest)).st_size == blob.size  # noqa: PTH116 - as in `path`
        except FileNotFoundError:
            return False

    def size(self, digest: str) -> int:
        """Bytes of a committed blob; raises MissingBlobError."""
        return self.path(digest).stat().st_size

    def open(self, digest: str) -> BinaryIO:
        """A committed blob as a file for reading; raises MissingBlobError."""
        return self.path(digest).open("rb")

    def read(self, digest: str) -> bytes:
        """A committed blob's bytes; raises MissingBlobError."""
        return self.path(digest).read_bytes()

    def find_missing(self, blobs: Iterable[Blob]) -> List[Blob]:
        """Those that are not there, each digest once, in order."""
        distinct = {blob.digest: blob for blob in blobs}
        return [blob for blob in distinct.values() if not self.has(blob)]

    def __iter__(self) -> Iterator[Blob]:
        for path in self._objects.glob("*/*"):
            yield Blob(path.name, path.stat().st_size)

    def unfinished(self) -> Iterator[Path]:
        """The files of uploads that are not committed, named by their digests and perhaps a number after a dot."""
        return self._partial.iterdir()

    def used_bytes(self) -> int:
        """Bytes of all committed blobs."""
        return sum(blob.size for blob in self)

    # ---- Writing ----

    def put(self, data: Bytes) -> Blob:
        """Store these bytes; returns the blob that they are."""
        blob = blob_of(data)
        if not self.has(blob):
            with self.begin(blob) as writer:
                writer.append(data)
                writer.commit()
        return blob

    def committed_bytes(self, blob: Blob) -> int:
        """How many bytes of an unfinished upload are kept (all of them once it is committed)."""
        return blob.size if self.has(blob) else self.unfinished_bytes(blob)

    def unfinished_bytes(self, blob: Blob, tag: str = "") -> int:
        """How many bytes of an unfinished upload are kept, whether or not the blob is there otherwise."""
        try:
            return min(self._part(blob.digest, tag).stat().st_size, _check_size(blob))
        except FileNotFoundError:
            return 0

    def begin(self, blob: Blob, offset: int = 0, tag: str = "") -> BlobWriter:
        """Start an upload, or go on with one from `offset`, which must not lie beyond what is committed.

        While one writer holds the blob, others work beside it on a copy; the first to commit wins. Uploads under
        different tags (letters and digits) never go on with each other's bytes.
        """
        check_digest(blob.digest)
        if not 0 <= offset <= _check_size(blob):
            raise UploadOffsetError(f"blob {blob.digest} has {blob.size} bytes; {offset} is not within")
        try:
            writer = self._claim(blob, offset, self._part(blob.digest, tag))
            writer._start(offset)
        except OSError as error:
            raise _explain(error, self.root) from error
        return writer

    def discard(self, digest: str) -> None:
        """Forget a blob, if it is there; files that are open keep their bytes."""
        self._object(digest).unlink(missing_ok=True)

    # ---- Internals, shared with BlobWriter ----

    def _sweep(self) -> None:
        """Nobody goes on with second copies of an earlier process, nor with uploads that are a week old."""
        oldest = time.time() - _KEEP_PARTIAL_S
        for leftover in self._partial.iterdir():
            if "." in leftover.name or leftover.stat().st_mtime < oldest:
                leftover.unlink()

    def _object(self, digest: str) -> Path:
        return Path(self.name(digest))

    def _part(self, digest: str, tag: str = "") -> Path:
        return self._partial / (f"{check_digest(digest)}~{tag}" if tag else check_digest(digest))

    def _claim(self, blob: Blob, offset: int, part: Path) -> BlobWriter:
        """A writer for `part`, or for a file beside it while another writer has that."""
        with self._lock:
            kept = part.stat().st_size if part.exists() else 0
            if offset > kept:
                raise UploadOffsetError(
                    f"blob {blob.digest}: {kept} bytes are committed, the upload wants to go on from {offset}"
                )
            if part.name in self._writers:
                self._scratch += 1
                return BlobWriter(self, blob, part.with_name(f"{part.name}.{self._scratch}"), part)
            self._writers[part.name] = BlobWriter(self, blob, part, part)
            return self._writers[part.name]

    def _expect(self, writer: BlobWriter, more_bytes: int) -> None:
        """A writer is about to write so many bytes more: a store with a quota makes room for them, or refuses."""

    def _release(self, writer: BlobWriter) -> None:
        """A writer ends without a commit: keep the longer of its bytes and what was kept before."""
        part = writer.part
        with self._lock:
            if self._writers.get(part.name) is writer:
                del self._writers[part.name]
            elif writer.path != part and writer.path.exists():
                kept = part.stat().st_size if part.exists() else 0
                if part.name in self._writers or writer.size <= kept:
                    writer.path.unlink()
                else:
                    writer.path.replace(part)

    def _publish(self, writer: BlobWriter) -> None:
        final = self._object(writer.blob.digest)
        final.parent.mkdir(exist_ok=True)
        with self._lock:
            writer.path.replace(final)
            if self._writers.get(writer.part.name) is writer:
                del self._writers[writer.part.name]
            elif writer.part.name not in self._writers:
                writer.part.unlink(missing_ok=True)
        for folder in (final.parent, self._objects):
            _sync_folder(folder)


class BlobWriter:
    """One upload. Closing it without a commit keeps what arrived, so that it can be gone on with.

    It may be closed while another thread appends or commits: what is under way is done first, what comes later is
    refused. Nobody else can have the file before.
    """

    def __init__(self, store: BlobStore, blob: Blob, path: Path, part: Path) -> None:
        self.blob = blob
        self.path = path
        #: Where an interrupted upload of this kind is kept: `path`, unless another writer has it.
        self.part = part
        self.size = 0
        self._store = store
        self._hash = hashlib.sha256()
        self._fd = -1
        self._on_disk = 0
        self._in_use = threading.RLock()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def append(self, data: Bytes) -> None:
        """Add bytes at the end.

        Raises:
            CorruptBlobError: they go beyond the blob's size.
            DiskFullError, BlobQuotaError: there is no room for them.
        """
        with self._in_use:
            self._check_open()
            self._append(memoryview(data))

    def _append(self, view: memoryview) -> None:
        if self.size + view.nbytes > self.blob.size:
            self._spoil(f"more than the {self.blob.size} bytes that were announced")
        self._store._expect(self, view.nbytes)
        self._hash.update(view)
        try:
            while view.nbytes:
                written = os.write(self._fd, view)
                self.size += written
                view = view[written:]
            if self._store.write_behind and self.size - self._on_disk >= _WRITE_BEHIND_BYTES:
                os.fdatasync(self._fd)
                os.posix_fadvise(self._fd, 0, self.size, os.POSIX_FADV_DONTNEED)
                self._on_disk = self.size
        except OSError as error:
            raise _explain(error, self._store.root) from error

    def commit(self) -> None:
        """Verify, make durable and publish under the digest; raises CorruptBlobError and forgets the bytes if wrong."""
        with self._in_use:
            self._check_open()
            self._commit()

    def _commit(self) -> None:
        if self.size != self.blob.size:
            raise CorruptBlobError(
                f"blob {self.blob.digest}: {self.size} of {self.blob.size} bytes arrived", hint="upload the rest"
            )
        if self._hash.hexdigest() != self.blob.digest:
            self._spoil(f"the bytes are those of {self._hash.hexdigest()}")
        try:
            os.fsync(self._fd)
            self._close_file()
            self._store._publish(self)
        except OSError as error:
            raise _explain(error, self._store.root) from error

    def close(self) -> None:
        """Give the blob up for now; after a commit, nothing."""
        with self._in_use:
            self._close_file()
            self._store._release(self)

    def _check_open(self) -> None:
        if self._fd < 0:
            raise BlobError(f"blob {self.blob.digest}: this upload has ended", hint="begin another one")

    def _start(self, offset: int) -> None:
        """Open the file at `offset`, having hashed (and, beside another writer, copied) what lies before it."""
        try:
            self._fd = os.open(str(self.path), os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
            if offset:
                with self.part.open("rb") as source:
                    while self.size < offset:
                        data = source.read(min(_READ_BYTES, offset - self.size))
                        if not data:
                            raise UploadOffsetError(f"blob {self.blob.digest}: another upload of it started again")
                        self._hash.update(data)
                        if self.path != self.part:
                            os.write(self._fd, data)
                        self.size += len(data)
            os.lseek(self._fd, offset, os.SEEK_SET)
            os.ftruncate(self._fd, offset)
        except BaseException:
            self.close()
            raise

    def _close_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _spoil(self, why: str) -> NoReturn:
        """Nothing of these bytes is worth keeping."""
        self._close_file()
        self.path.unlink(missing_ok=True)
        self._store._release(self)
        raise CorruptBlobError(f"blob {self.blob.digest} is corrupt: {why}", hint="upload it again from the start")


def _check_size(blob: Blob) -> int:
    if blob.size < 0:
        raise BadDigestError(f"blob {blob.digest} has the negative size {blob.size}")
    return blob.size


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable (a no-op where folders cannot be opened)."""
    if os.name != "posix":
        return
    fd = os.open(str(folder), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(error: OSError, root: Path) -> BlobError:
    if error.errno in _FULL:
        return DiskFullError(f"no space is left for blobs in {root}", hint="free space on that disk, then try again")
    return BlobError(f"cannot use the blob store {root}: {error.strerror or error}", hint="check the folder's rights")
