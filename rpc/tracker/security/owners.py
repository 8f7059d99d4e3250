"""Whose blobs are whose: knowing a digest is not enough to read a blob, nor to be told that it is there.

    root/user.ann/ab/abcdef…     ann has sent these bytes herself, or they came of her job
    root/agent.rpi4/ab/abcdef…   the device rpi4 has sent them

Empty files tell all of it: nothing to be migrated, nothing that a crash could leave half written. Trackers that share a
database keep the same in a table of it, since whoever leads next has to know it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import Future
from pathlib import Path

from kedge.rpc.blobs import check_digest
from kedge.rpc.tracker.facts import BlobForgotten, BlobOwned
from kedge.rpc.tracker.schema import StoreAwayError
from kedge.rpc.tracker.security.principal import Principal
from kedge.rpc.tracker.store import Store

_STORE_S = 10.0


class Owners:
    """Whose blobs are whose: owners and digests that were `kept`. Safe from several threads."""

    def __init__(self, kept: Iterable[tuple[str, str]]) -> None:
        self._lock = threading.Lock()
        self._by_owner: defaultdict[str, set[str]] = defaultdict(set)
        for owner, digest in kept:
            self._by_owner[owner].add(digest)

    def add(self, owner: str, digest: str) -> None:
        """The owner has these bytes."""
        with self._lock:
            if check_digest(digest) not in self._by_owner[owner]:
                self._by_owner[owner].add(digest)
                self._keep(owner, digest)

    def has(self, principal: Principal, digest: str) -> bool:
        """Whether the principal may know of the blob and read it."""
        with self._lock:
            return principal.sees_all or check_digest(digest) in self._by_owner.get(principal.owner, ())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """All of them: owner and digest."""
        with self._lock:
            kept = [(owner, digest) for owner, digests in self._by_owner.items() for digest in digests]
        return iter(kept)

    def among(self, owner: str, digests: Set[str]) -> Set[str]:
        """Those of these blobs that the owner has."""
        with self._lock:
            return digests & self._by_owner.get(owner, frozenset())

    def forget(self, digest: str) -> None:
        """Nobody has these bytes: they are about to go."""
        with self._lock:
            whose = [owner for owner, digests in self._by_owner.items() if digest in digests]
            for owner in whose:
                self._by_owner[owner].discard(digest)
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
