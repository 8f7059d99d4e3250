"""Whose blobs are whose: knowing a digest is not enough to read a blob, nor to be told that it is there.

    root/user.ann/ab/abcdef…     ann has sent these bytes herself, or they came of her job
    root/agent.rpi4/ab/abcdef…   the device rpi4 has sent them

Empty files tell all of it: nothing to be migrated, nothing that a crash could leave half written. Trackers that share a
database keep the same in a table of it, since whoever leads next has to know it.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

from kedge.rpc.blobs import check_digest
from kedge.rpc.tracker.facts import BlobForgotten, BlobOwned
from kedge.rpc.tracker.schema import StoreAwayError
from kedge.rpc.tracker.security.principal import Principal
from kedge.rpc.tracker.store import Store
from kedge.rpc.types import Blob

_STORE_S = 10.0


class Owners:
    """Whose blobs are whose: owners and digests that were `kept`. Safe from several threads."""

    def __init__(self, kept: Iterable[tuple[str, str]]) -> None:
        self._lock = threading.Lock()
        self._by_owner: defaultdict[str, set[str]] = defaultdict(set)
        self._by_digest: defaultdict[str, set[str]] = defaultdict(set)
        #: The bytes of each blob that has to stay, whose ever it is, and of all those of each owner.
        self._stays: dict[str, int] = {}
        self._bytes: Counter[str] = Counter()
        for owner, digest in kept:
            self._by_owner[owner].add(digest)
            self._by_digest[digest].add(owner)

    def add(self, owner: str, digest: str) -> None:
        """The owner has these bytes. Where that cannot be kept it raises, and does so again when it is told again."""
        with self._lock:
            if check_digest(digest) not in self._by_owner[owner]:
                self._keep(owner, digest)
                self._by_owner[owner].add(digest)
                self._by_digest[digest].add(owner)
                self._bytes[owner] += self._stays.get(digest, 0)

    def has(self, principal: Principal, digest: str) -> bool:
        """Whether the principal may know of the blob and read it."""
        with self._lock:
            return principal.sees_all or check_digest(digest) in self._by_owner.get(principal.owner, ())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """All of them: owner and digest."""
        with self._lock:
            kept = [(owner, digest) for owner, digests in self._by_owner.items() for digest in digests]
        return iter(kept)

    def stays(self, digest: str, size: int) -> None:
        """A blob of so many bytes has to stay; 0: it need not any more."""
        with self._lock:
            more = size - self._stays.pop(digest, 0)
            if size:
                self._stays[digest] = size
            for owner in self._by_digest.get(digest, ()):
                self._bytes[owner] += more

    def staying_bytes(self, owner: str) -> int:
        """Of all blobs of the owner that have to stay."""
        with self._lock:
            return self._bytes[owner]

    def keeps(self, owner: str, blob: Blob) -> bool:
        """Whether this is one of them, and not another size that somebody claims for it."""
        with self._lock:
            return self._stays.get(blob.digest) == blob.size and owner in self._by_digest.get(blob.digest, ())

    def forget(self, digest: str) -> None:
        """Nobody has these bytes: they are about to go."""
        with self._lock:
            whose = sorted(self._by_digest.pop(digest, ()))
            for owner in whose:
                self._by_owner[owner].discard(digest)
                self._bytes[owner] -= self._stays.get(digest, 0)
            if whose:
                self._drop(whose, digest)

    def settle(self) -> None:
        """Wait until what was added is durable; raises StoreAwayError."""
        raise NotImplementedError

    def _keep(self, owner: str, digest: str) -> None:
        raise NotImplementedError

    def _drop(self, owners: Sequence[str], digest: str) -> None:
        raise NotImplementedError


class FileOwners(Owners):
    """The folder `root`, made when it does not exist, and read once: nobody else writes there."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)
        super().__init__((path.parts[-3], path.name) for path in root.glob("*/*/*"))

    def settle(self) -> None:
        """Files are there at once."""

    def _keep(self, owner: str, digest: str) -> None:
        path = self._path(owner, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def _drop(self, owners: Sequence[str], digest: str) -> None:
        for owner in owners:
            self._path(owner, digest).unlink(missing_ok=True)

    def _path(self, owner: str, digest: str) -> Path:
        return self._root / owner / digest[:2] / digest


class StoredOwners(Owners):
    """Those in the database of `store`: the tracker that leads is the only one that writes."""

    def __init__(self, store: Store) -> None:
        self._store = store
        super().__init__((owner, digest) for digest, owner in store.owners().result())

    def _keep(self, owner: str, digest: str) -> None:
        # Stored before all that is told to the store from now on.
        self._store.append([BlobOwned(digest, owner)], lambda: None)

    def _drop(self, owners: Sequence[str], digest: str) -> None:
        self._store.append([BlobForgotten(digest)], lambda: None)

    def settle(self) -> None:
        """Wait until what was added is durable; raises StoreAwayError. Not from the event loop's thread."""
        durable: Future[None] = Future()
        self._store.append([], lambda: durable.set_result(None))
        try:
            durable.result(_STORE_S)
        except TimeoutError as error:
            raise StoreAwayError("the tracker cannot store whose blobs are whose now", hint="try again") from error
