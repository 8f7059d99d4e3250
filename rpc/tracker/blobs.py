"""The tracker's blobs: a store that stays within a number of bytes by dropping what nobody has used for longest.

What counts is everything below the folder: committed blobs, what is left of uploads that broke off, and what came of
uploads that are under way. Room is made as bytes come, in steps: leftovers go first, then blobs, the longest unused
first, and those that a kept result names (`keep`) after all others; never one that

- a job holds, as long as it does (`hold`, see `kedge.rpc.tracker.needed`),
- somebody was just told is there, or has just sent: a job that needs it is on its way (`promise`).

What has to stay and what uploads under way have announced never comes to more than the quota. So an upload that cannot
fit is refused before its bytes are sent, and one that was let in finds its room, whoever announces more meanwhile.

When a blob was used last is its file's time of modification; all else is counted anew at every start, so that a crash
leaves nothing to repair.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from kedge.rpc.blobs import BlobQuotaError, BlobStore, BlobWriter
from kedge.rpc.types import Blob

#: Without a quota: the share of the disk's free space (what the store holds counted as free) that it may take.
DISK_SHARE = 0.75
#: What was sent, or was said to be there, stays for so long without a job that needs it.
PROMISE_S = 300.0
#: Between two times that the end of a job is put down as a use: each holds up the store, and its next commit.
_TOUCH_S = 10.0
#: Room is made for so much of an upload at a time.
STEP_BYTES = 64 << 20


class TrackerBlobs(BlobStore):
    """A store of at most `quota_bytes`; None means `DISK_SHARE` of the disk that is free for it, as it is then.

    `on_evict` is told each digest before its blob goes, from whichever thread makes room. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        root: Path,
        quota_bytes: int | None = None,
        *,
        on_evict: Callable[[str], None] = lambda digest: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(root, write_behind=True)
        self._quota_bytes = quota_bytes
        self._on_evict = on_evict
        self._clock = clock
        self._on_keep: Callable[[str, int], None] = lambda digest, size: None
        self._books = threading.RLock()
        self._sizes: dict[str, int] = {}
        self._stored = 0
        #: Blobs that may go, with their sizes, the longest unused first; and the sum of these.
        self._free: OrderedDict[str, int] = OrderedDict()
        self._free_bytes = 0
        self._holds: Counter[str] = Counter()
        #: How many kept results name it.
        self._kept: Counter[str] = Counter()
        #: Until when: the soonest first, as all promises last equally long.
        self._promised: OrderedDict[str, float] = OrderedDict()
        #: What is left of broken-off uploads: the oldest first.
        self._leftovers: OrderedDict[str, int] = OrderedDict()
        #: How much room each upload was given.
        self._under_way: dict[BlobWriter, int] = {}
        self._take_stock()

    def when_evicted(self, told: Callable[[str], None]) -> None:
        """From now on `told` instead hears of blobs that are about to go."""
        self._on_evict = told

    def when_kept(self, told: Callable[[str, int], None]) -> None:
        """From now on `told` hears of each blob that is there and has to stay, with its bytes; 0: not any more.

        It is told at once of those that have to now, and called from whichever thread changes that.
        """
        with self._books:
            self._on_keep = told
            for digest in self._holds:
                self._tell_kept(digest)

    def _tell_kept(self, digest: str) -> None:
        self._on_keep(digest, self._sizes.get(digest, 0) if digest in self._holds else 0)

    # ---- What has to stay ----

    def hold(self, digests: Iterable[str]) -> None:
        """Keep these blobs, and those among them that come later, until they are let go as often as they were held."""
        with self._books:
            for digest in digests:
                self._holds[digest] += 1
                self._no_longer_free(digest)
                if self._holds[digest] == 1:
                    self._tell_kept(digest)

    def let_go(self, digests: Iterable[str]) -> None:
        """Undo one `hold`. What nobody holds any more may go, after all that was unused for longer."""
        with self._books:
            for digest in digests:
                self._holds[digest] -= 1
                if self._holds[digest] <= 0:
                    del self._holds[digest]
                    self._tell_kept(digest)
                    if digest in self._sizes:
                        self._set_free(digest)
                        self._touch_again(digest)

    def keep(self, digests: Iterable[str]) -> None:
        """A result that is kept names these: as long as one does, they go after all that none does."""
        with self._books:
            self._kept.update(digests)

    def keep_no_longer(self, digests: Iterable[str]) -> None:
        """Undo one `keep`."""
        with self._books:
            for digest in digests:
                self._kept[digest] -= 1
                if not self._kept[digest]:
                    del self._kept[digest]

    def promise(self, blobs: Iterable[Blob]) -> set[str]:
        """The digests of those that are there and can stay, beside what was announced: for `PROMISE_S`, or a job."""
        there = set()
        with self._books:
            for blob in blobs:
                free = self._free.get(blob.digest, 0)
                if self.has(blob) and (not free or self._excess(free) <= 0):
                    there.add(blob.digest)
                    self._promise(blob.digest, self._clock() + PROMISE_S)
        return there

    def redeem(self, digests: Iterable[str]) -> None:
        """The job that these were promised for is there, and holds them."""
        with self._books:
            for digest in digests:
                if self._promised.pop(digest, None) is not None:
                    self.let_go((digest,))

    def end_promises(self) -> None:
        """Those whose time is over have to stay no longer for that."""
        with self._books:
            while self._promised and next(iter(self._promised.values())) <= self._clock():
                self.let_go((self._promised.popitem(last=False)[0],))

    def _promise(self, digest: str, until: float) -> None:
        if self._promised.pop(digest, None) is None:
            self.hold((digest,))
        self._promised[digest] = until

    def _set_free(self, digest: str) -> None:
        self._free[digest] = self._sizes[digest]
        self._free_bytes += self._sizes[digest]

    def _no_longer_free(self, digest: str) -> None:
        self._free_bytes -= self._free.pop(digest, 0)

    # ---- How full it is ----

    def quota_bytes(self) -> int:
        """How much may be kept now."""
        if self._quota_bytes is not None:
            return self._quota_bytes
        with self._books:
            coming = sum(_bytes_of(writer.path) for writer in self._under_way)
            here = self._stored + sum(self._leftovers.values()) + coming
        return int((shutil.disk_usage(str(self.root)).free + here) * DISK_SHARE)

    def taken_bytes(self) -> int:
        """What counts against the quota, uploads that are under way with the room that they were given."""
        with self._books:
            return self._stored + sum(self._leftovers.values()) + sum(self._under_way.values())

    def has_digest(self, digest: str) -> bool:
        """Whether it is here, of whatever size."""
        with self._books:
            return digest in self._sizes

    def _excess(self, more_bytes: int) -> int:
        """By how much the quota falls short, if so much more has to stay, of what has to and what was announced."""
        announced = sum(writer.blob.size for writer in self._under_way)
        return self._stored - self._free_bytes + announced + more_bytes - self.quota_bytes()

    def _refusal(self, more_bytes: int, excess: int) -> BlobQuotaError:
        return BlobQuotaError(
            f"{more_bytes} more bytes do not fit into the tracker's blob store: {excess} of the {self.quota_bytes()} "
            "that it may hold would have to go, and jobs and uploads of the last minutes need them",
            hint="wait for jobs to end, send less, or start the tracker with a larger --blob-quota",
        )

    def make_room(self, needed_bytes: int = 0) -> None:
        """Drop what may go until `needed_bytes` more fit; raises BlobQuotaError, and drops nothing, if they cannot."""
        with self._books:
            self.end_promises()
            excess = self.taken_bytes() + needed_bytes - self.quota_bytes()
            leftovers, blobs = [], []
            for name, size in self._leftovers.items():
                if excess <= 0:
                    break
                leftovers.append(name)
                excess -= size
            for digest in sorted(self._free, key=self._kept.__contains__) if excess > 0 else ():
                if excess <= 0:
                    break
                blobs.append(digest)
                excess -= self._sizes[digest]
            if excess > 0:
                raise self._refusal(needed_bytes, excess)
            for name in leftovers:
                (self._partial / name).unlink(missing_ok=True)
                del self._leftovers[name]
            for digest in blobs:
                self._on_evict(digest)
                self.discard(digest)

    # ---- Reading and writing ----

    def open(self, digest: str) -> BinaryIO:
        """As of every store; the blob counts as used now."""
        with self._books:
            file = super().open(digest)
            if digest in self._free:
                self._free.move_to_end(digest)
            self._touch(digest)
            return file

    def discard(self, digest: str) -> None:
        """As of every store."""
        with self._books:
            super().discard(digest)
            self._stored -= self._sizes.pop(digest, 0)
            self._no_longer_free(digest)
            self._tell_kept(digest)

    def _claim(self, blob: Blob, offset: int, part: Path) -> BlobWriter:
        with self._books:
            self.end_promises()
            if (excess := self._excess(blob.size)) > 0:
                raise self._refusal(blob.size, excess)
            # What is gone on with must not go to make room for itself.
            resumed = self._leftovers.pop(part.name, None)
            try:
                if resumed is None:  # else its bytes have their room already
                    self.make_room(offset)
                writer = super()._claim(blob, offset, part)
            except BaseException:
                if resumed is not None:
                    self._count_leftover(part)
                raise
            self._under_way[writer] = offset
            return writer

    def _expect(self, writer: BlobWriter, more_bytes: int) -> None:
        with self._books:
            given = self._under_way[writer]
            lacking = writer.size + more_bytes - given
            if lacking > 0:
                step = min(max(lacking, STEP_BYTES), writer.blob.size - given)
                self.make_room(step)
                self._under_way[writer] = given + step

    def _publish(self, writer: BlobWriter) -> None:
        digest = writer.blob.digest
        # An older copy must not be found to be free in the moment in which this one takes its place.
        self.hold((digest,))
        try:
            super()._publish(writer)
        finally:  # also when the last step, making it durable, has failed
            with self._books:
                if self._object(digest).exists():
                    self._stored += writer.blob.size - self._sizes.get(digest, 0)
                    self._sizes[digest] = writer.blob.size
                    self._tell_kept(digest)
                    self._touch(digest)
                    self._promise(digest, self._clock() + PROMISE_S)
                self.let_go((digest,))
                self._ended(writer)

    def _release(self, writer: BlobWriter) -> None:
        super()._release(writer)
        with self._books:
            self._ended(writer)

    def _ended(self, writer: BlobWriter) -> None:
        if self._under_way.pop(writer, None) is not None:
            self._count_leftover(writer.part)

    def _count_leftover(self, part: Path) -> None:
        self._leftovers.pop(part.name, None)
        if part.name not in self._writers and part.exists():
            self._leftovers[part.name] = part.stat().st_size

    def _touch_again(self, digest: str) -> None:
        with suppress(FileNotFoundError):
            if abs(self._clock() - self._object(digest).stat().st_mtime) >= _TOUCH_S:
                self._touch(digest)

    def _touch(self, digest: str) -> None:
        with suppress(FileNotFoundError):  # somebody has removed it by hand
            os.utime(self._object(digest), (self._clock(),) * 2)

    def _take_stock(self) -> None:
        """Count what an earlier process has left."""
        found = sorted((path.stat().st_mtime, path.name, path.stat().st_size) for path in self._objects.glob("*/*"))
        for used_s, digest, size in found:
            self._sizes[digest] = size
            self._set_free(digest)
            if used_s + PROMISE_S > self._clock():
                self._promise(digest, min(used_s, self._clock()) + PROMISE_S)
        self._stored = sum(self._sizes.values())
        parts = sorted((path.stat().st_mtime, path.name, path.stat().st_size) for path in self._partial.iterdir())
        self._leftovers.update((name, size) for _, name, size in parts)


def _bytes_of(path: Path) -> int:
    """How large a file is; 0 where there is none, as of an upload that has just ended."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
